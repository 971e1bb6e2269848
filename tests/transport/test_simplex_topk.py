"""simplex_topk against the reference in float64: any k, any size, ties, gradients."""

import contract  # noqa: F401  (marks this module for every backend)
import hypothesis
import pytest
import torch
from contract import BACKEND, DEVICE, DTYPES, INTERPRETED, NATIVE_CPU
from hypothesis import strategies

import tilewise
from tilewise.reference.sparse_ot import OPS as REFERENCE
from tilewise.testing import allocated_bytes, assert_accurate

SIZES = [1, 2, 15, 16, 33, 256, 1000] + ([] if INTERPRETED else [20011])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def eager(x, k, scale):
    """What a user would write today."""
    values, indices = x.topk(k, -1)
    levels = (values.cumsum(-1) - scale) / torch.arange(1, k + 1, device=x.device)
    support = (values > levels).sum(-1, keepdim=True)
    level = levels.gather(-1, support - 1)
    return torch.zeros_like(x).scatter(-1, indices, (values - level).clamp(min=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_accuracy(size, share, dtype):
    k = max(1, int(share * size))
    x = torch.randn(3, 2, size).to(dtype)
    for scale in (0.5, 0.8 * k):
        wide = x.detach().double().requires_grad_()
        p = REFERENCE["simplex_topk"](wide, k=k, scale=scale)
        grad = torch.randn_like(p).to(dtype)
        (truth,) = torch.autograd.grad(p, wide, grad.double())
        ours = x.to(DEVICE).requires_grad_()
        found = tilewise.simplex_topk(ours, k, scale=scale)
        (gradient,) = torch.autograd.grad(found, ours, grad.to(DEVICE))
        plain = x.float().requires_grad_()
        of_plain = eager(plain, k, scale)
        (eager_gradient,) = torch.autograd.grad(of_plain, plain, grad.float())
        assert found.dtype == gradient.dtype == dtype
        assert int((found > 0).sum(-1).max()) <= k
        if dtype == torch.float32:  # 16-bit inputs have ties, of which ours takes the first
            assert_accurate(found.cpu(), p, of_plain, dtype, "p")
            assert_accurate(gradient.cpu(), truth, eager_gradient, dtype, "gradient", slack=1e-6)
        order = found.cpu().sort(-1).values.double() - p.detach().sort(-1).values
        assert order.abs().max() <= 2 * torch.finfo(dtype).eps * max(1.0, scale)


@hypothesis.settings(deadline=None, max_examples=10 if INTERPRETED else 100)
@hypothesis.given(
    values=strategies.lists(strategies.floats(-100, 100, width=32), min_size=1, max_size=40),
    share=strategies.floats(0, 1),
    scale=strategies.floats(0.01, 50),
)
def test_properties(values, share, scale):
    """On the simplex, at most k entries, the largest get the most, a shift of the row changes nothing."""
    k = max(1, round(share * len(values)))
    x = torch.tensor(values, device=DEVICE)
    p = tilewise.simplex_topk(x, k, scale=scale)
    assert (p >= 0).all() and int((p > 0).sum()) <= k
    assert abs(float(p.double().sum()) - scale) <= 1e-5 * (scale + 1)
    by_size = p[x.sort(descending=True, stable=True).indices]
    assert (by_size.diff() <= 0).all()
    shifted = tilewise.simplex_topk(x + 32, k, scale=scale)
    assert (p.sort().values - shifted.sort().values).abs().max() <= 1e-4 * (scale + 1)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_of_equal_entries_the_first_count(k):
    x = torch.tensor([[0.5, 1.0, 1.0, 1.0, -2.0, 1.0, 1.0, 1.0, 1.0, 0.5]], device=DEVICE)
    p = tilewise.simplex_topk(x, k)
    first = torch.tensor([1, 2, 3, 5, 6, 7, 8])[:k]
    expected = torch.zeros(1, 10)
    expected[0, first] = 1 / k
    torch.testing.assert_close(p.cpu(), expected)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0.0, -3.073333263397217], 3.073333501815796),
        ([0.0, -0.3120002746582031, -6.312000274658203, -6.680000305175781], 0.3120003044605255),
        ([0.0, -0.6065988540649414, -1.342639684677124, -3.340101718902588, -4.733502388000488], 13.644670486450195),
    ],
    ids=str,
)
def test_a_threshold_at_an_entry(values, scale):
    """Rounding decides whether the last entry counts, and must not decide again and again."""
    x = torch.tensor(values, device=DEVICE)
    p = tilewise.simplex_topk(x, len(values), scale=scale)
    expected = REFERENCE["simplex_topk"](x.cpu().double(), k=len(values), scale=scale)
    torch.testing.assert_close(p.cpu().double(), expected, rtol=0, atol=1e-6 * scale)


def test_a_tie_at_zero():
    """The k-th entry is 0 between numbers of both signs: it is found among the smallest numbers there are."""
    p = tilewise.simplex_topk(torch.tensor([0.0, 0.0, 35.359375], device=DEVICE), 2, scale=46.74778377369581)
    torch.testing.assert_close(p.cpu(), torch.tensor([5.6942062, 0.0, 41.0535838]))


def test_zeros_of_both_signs_are_equal():
    p = tilewise.simplex_topk(torch.tensor([-0.0, 0.0, -0.0, 0.0], device=DEVICE), 2)
    assert p.tolist() == [0.5, 0.5, 0, 0]


def test_extreme_rows():
    inf, nan = torch.inf, torch.nan
    rows = [[1e30, 1e30, 0, 5], [-inf, 3, -inf, 3], [1, nan, 2, 3], [inf, 1, 2, 3], [-inf] * 4]
    x = torch.tensor(rows, device=DEVICE)
    p = tilewise.simplex_topk(x, 3).cpu()
    assert p[:2].tolist() == [[0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5]]
    assert p[2:].isnan().all()


def test_strides_and_no_rows():
    base = torch.randn(40, 12, device=DEVICE)
    torch.testing.assert_close(tilewise.simplex_topk(base.t(), 5), tilewise.simplex_topk(base.t().contiguous(), 5))
    repeated = tilewise.simplex_topk(base[:1].expand(4, 12), 5)
    torch.testing.assert_close(repeated, tilewise.simplex_topk(base[0], 5).expand(4, 12))
    empty = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    assert torch.autograd.grad(tilewise.simplex_topk(empty, 2).sum(), empty)[0].shape == (0, 5)


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("k", [1, 3, 9])
def test_gradcheck(k):
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tilewise.simplex_topk(x, k, scale=1.3), x)
    assert torch.autograd.gradgradcheck(lambda x: tilewise.simplex_topk(x, k, scale=1.3), x)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be compiled")
def test_compile_and_opcheck():
    x = torch.randn(4, 20, device=DEVICE, requires_grad=True)
    compiled = torch.compile(lambda x: tilewise.simplex_topk(x, 3).square().sum(), fullgraph=True)
    torch.testing.assert_close(compiled(x), tilewise.simplex_topk(x, 3).square().sum())
    torch.library.opcheck(torch.ops.tilewise.simplex_topk, (x,), {"k": 3})


@pytest.mark.skipif(BACKEND == "reference", reason="the reference sorts")
def test_memory():
    """The result, and on a CPU 20 bytes per number of a row and thread."""
    x = torch.randn(32 if INTERPRETED else 512, 256, device=DEVICE)
    spare = 20 * 256 * torch.get_num_threads() if DEVICE == "cpu" else 1024
    assert allocated_bytes(lambda: tilewise.simplex_topk(x, 8), DEVICE) <= x.nbytes + spare


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.randn(3), 0), {}, ValueError, r"expected k to be an integer in \[1, 3\], the size of x, got 0"),
        ((torch.randn(3), 4), {}, ValueError, "got 4"),
        ((torch.randn(3), 1.0), {}, ValueError, "got 1.0"),
        ((torch.randn(3), 1), {"scale": 0.0}, ValueError, "scale to be a finite number above 0"),
        ((torch.randn(()), 1), {}, ValueError, "shape"),
        ((torch.randn(2, 0), 1), {}, ValueError, "shape"),
        ((torch.arange(3), 1), {}, TypeError, "got torch.int64"),
        (([1.0], 1), {}, TypeError, "tensor"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message) as raised:
        tilewise.simplex_topk(*arguments, **options)
    assert str(raised.value).startswith("tilewise.simplex_topk: ")
