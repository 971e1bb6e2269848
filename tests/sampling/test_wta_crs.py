"""Sampled products: the same rows everywhere, unbiased, with the variance of the paper's formulas or less."""

import contract  # noqa: F401  (marks this module for every backend)
import hypothesis
import pytest
import torch
from contract import BACKEND, DEVICE, DTYPES, INTERPRETED, NATIVE_CPU
from hypothesis import strategies

import tilewise
from tilewise.ops.wta_crs import METHODS
from tilewise.reference.wta_crs import OPS as REFERENCE
from tilewise.reference.wta_crs import weights_of

ROWS = [1, 7, 100] + ([] if INTERPRETED else [2, 3000])
once = pytest.mark.skipif(not NATIVE_CPU or BACKEND == "reference", reason="test_same_rows has it for every backend")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def norms_of(kind: str, *shape: int) -> torch.Tensor:
    return {
        "normal": lambda: torch.randn(shape).abs(),
        "heavy": lambda: (3 * torch.randn(shape)).exp(),
        "equal": lambda: torch.full(shape, 0.3),
        "zero": lambda: torch.zeros(shape),
        "few": lambda: torch.rand(shape) * (torch.rand(shape) < 0.05),
        "tiny": lambda: torch.full(shape, 1e-45),
        "huge": lambda: 3e38 * torch.rand(shape),
    }[kind]()


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("kind", ["normal", "heavy", "equal", "zero", "few", "tiny", "huge"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", ROWS)
def test_same_rows(rows, method, kind):
    """As the reference chooses, which sorts: for every k, with and without norms of the gradients, in batches."""
    for k in sorted({1, (rows + 9) // 10, rows // 2 + 1, rows}):
        for mix, other in ((0.05, None), (0.0, norms_of(kind, 3, rows)), (1.0, norms_of("normal", 3, rows))):
            norms, seed = norms_of(kind, 3, rows), torch.randint(2**63 - 1, (1,))
            options = {"k": k, "method": method, "mix": mix}
            expected = REFERENCE["wta_crs_sample"](norms, other, seed, **options)
            indices, scales = torch.ops.tilewise.wta_crs_sample(*on_device(norms, other, seed), **options)
            assert indices.dtype == torch.int32 and torch.equal(indices.cpu(), expected[0])
            assert torch.equal(scales.cpu(), expected[1])
            if k == rows and method != "crs":
                assert torch.equal(indices.cpu(), torch.arange(rows, dtype=torch.int32).expand(3, -1))
                assert (scales == 1).all()


@hypothesis.settings(deadline=None, max_examples=15 if INTERPRETED else 200)
@hypothesis.given(
    norms=strategies.lists(strategies.floats(0, 2.0**100, width=32), min_size=1, max_size=60),
    share=strategies.floats(0, 1),
    mix=strategies.sampled_from([0.0, 0.05, 1.0]),
    seed=strategies.integers(0, 2**63 - 1),
    method=strategies.sampled_from(METHODS),
)
def test_properties(norms, share, mix, seed, method):
    """k rows in range, distinct where drawn apart; scales of at least 1; what is estimated of the weights is exact."""
    n = len(norms)
    k = max(1, round(share * n))
    norms, seed = torch.tensor([norms], device=DEVICE), torch.tensor([seed], device=DEVICE)
    options = {"k": k, "method": method, "mix": mix}
    indices, scales = (t[0].cpu() for t in torch.ops.tilewise.wta_crs_sample(norms, None, seed, **options))
    assert indices.shape == (k,) and indices.min() >= 0 and indices.max() < n
    if method == "systematic":
        assert (indices.diff() > 0).all()
    if method != "crs":
        assert (scales >= 1).all()
    weights, _ = weights_of(norms.cpu(), None, k, mix)
    estimate = (scales.double() * weights[0, indices.long()].double()).sum()
    assert abs(float(estimate / weights.sum()) - 1) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES + ([torch.float64] if NATIVE_CPU else []), ids=str)
@pytest.mark.parametrize("layout", ["dense", "transposed", "sliced", "expanded"])
def test_norms_and_gather(layout, dtype):
    base = torch.randn(2, 70, 70).to(dtype).to(DEVICE)
    x = {
        "dense": base,
        "transposed": base.mT,
        "sliced": base[:, 1::3, 3:36],
        "expanded": base[:1, :1].expand(2, 9, 70),
    }[layout]
    expected = x.cpu().double().square().sum(2).sqrt()
    torch.testing.assert_close(torch.ops.tilewise.wta_crs_norms(x).cpu(), expected.float(), rtol=1e-7, atol=0)
    indices = torch.randint(x.shape[1], (2, 13), dtype=torch.int32)
    scales = torch.rand(2, 13) * 9
    every = indices.long()[:, :, None].expand(-1, -1, x.shape[2])
    rows = x.cpu().gather(1, every)
    found = torch.ops.tilewise.wta_crs_gather(x, indices.to(DEVICE))
    assert torch.equal(found.cpu(), rows) and found.is_contiguous()
    wide = torch.promote_types(dtype, torch.float32)
    scaled = torch.ops.tilewise.wta_crs_gather(x, *on_device(indices, scales)).cpu()
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates
        torch.testing.assert_close(scaled, (rows.to(wide) * scales[:, :, None]).to(dtype), rtol=2**-7, atol=0)
    else:
        assert torch.equal(scaled, (rows.to(wide) * scales[:, :, None]).to(dtype))


def test_more_than_2_31_elements():
    """A row of zero pages (4.3 GB, never written) beyond 2^31 elements is found."""
    if DEVICE == "cuda":
        pytest.skip("pages of a GPU are memory")
    x = torch.zeros(1, 2**16 + 1, 2**15, dtype=torch.bfloat16)
    x[0, -1, -1] = 2.0
    found = torch.ops.tilewise.wta_crs_gather(x, torch.tensor([[2**16]], dtype=torch.int32))
    assert found[0, 0, -1] == 2 and torch.ops.tilewise.wta_crs_norms(x[:, -1:]).item() == 2


def heavy_problem(n=64, d_in=7, d_out=5):
    x = torch.randn(n, d_in, dtype=torch.float64) * torch.randn(n, 1, dtype=torch.float64).exp()
    y = torch.randn(n, d_out, dtype=torch.float64) * torch.randn(n, 1, dtype=torch.float64).exp()
    return x, y


@once
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norms", ["fresh", "stale", "zero", "none"])
def test_unbiased(norms, method):
    """The mean of 1500 draws lies within 5 standard errors of the exact gradient, entry by entry."""
    x, y = heavy_problem()
    given = {"fresh": y.norm(dim=1), "stale": torch.rand(64), "zero": torch.zeros(64), "none": None}[norms]
    weight = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    draws = []
    for seed in range(1500):
        out = tilewise.wta_crs_linear(x, weight, k=16, norms=given, seed=seed, method=method)
        draws += torch.autograd.grad(out, weight, y)
    draws = torch.stack(draws)
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - y.T @ x).abs() <= 5 * standard_error).all()


def variance(x, y, k, method, draws=20000):
    """Total variance of the estimate of y^T x: one product of a batch is one draw."""
    product = tilewise.wta_crs_matmul(
        y.T.expand(draws, -1, -1), x.expand(draws, -1, -1), k=k, method=method, mix=0.0, seed=1
    )
    return (product - y.T @ x).square().sum((1, 2)).mean().item()


@once
@pytest.mark.parametrize("k", [8, 24])
def test_variance_is_that_of_the_formulas(k):
    """(L^2 - |G|^2) / k, and (L^2 (1 - P_C)^2 - |G of the rest|^2) / (k - |C|), within 5 %; apart is less."""
    x, y = heavy_problem()
    sizes = (x.norm(dim=1) * y.norm(dim=1)).sort(descending=True)
    total = sizes.values.sum()
    rest = total - torch.cat([torch.zeros(1), sizes.values.cumsum(0)[: k - 1]])
    c = int((rest / (k - torch.arange(k))).argmin())
    tail = sizes.indices[c:]
    of_rest = y[tail].T @ x[tail]
    expected = {
        "crs": (total**2 - (y.T @ x).square().sum()) / k,
        "wta": (rest[c] ** 2 - of_rest.square().sum()) / (k - c),
    }
    found = {method: variance(x, y, k, method) for method in METHODS}
    for method, value in expected.items():
        assert abs(found[method] / value.item() - 1) < 0.05, (method, found, expected)
    assert c > 0 and found["systematic"] < found["wta"] < found["crs"]


@once
def test_gradients_of_a_product():
    """Those of the sampled pairs with their scales; unbiased for those of the product."""
    a = torch.randn(2, 3, 6, 30, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 3, 30, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    exact = torch.autograd.grad(a @ b, (a, b), grad)
    sums = [torch.zeros_like(t) for t in (a, b)]
    squares = [torch.zeros_like(t) for t in (a, b)]
    for seed in range(1500):
        found = torch.autograd.grad(tilewise.wta_crs_matmul(a, b, k=10, seed=seed, method="wta"), (a, b), grad)
        for g, total, square in zip(found, sums, squares, strict=True):
            total += g
            square += g * g
    for total, square, expected in zip(sums, squares, exact, strict=True):
        mean = total / 1500
        error = ((square / 1500 - mean**2).clamp(min=0) / 1500).sqrt()
        assert ((mean - expected).abs() <= 5 * error + 1e-12).all()
    assert int((found[0].abs().sum(2) > 0).sum(-1).max()) <= 10  # of the pairs that were drawn


def test_product_on_every_backend():
    a, b = torch.randn(3, 6, 40, device=DEVICE), torch.randn(3, 40, 4, device=DEVICE)
    found = tilewise.wta_crs_matmul(a, b, k=12, seed=5)
    norms = [REFERENCE["wta_crs_norms"](t.cpu()) for t in (a.mT, b)]
    indices, scales = REFERENCE["wta_crs_sample"](*norms, torch.tensor([5]), k=12)
    left = REFERENCE["wta_crs_gather"](a.mT.cpu(), indices, scales)
    expected = left.mT @ REFERENCE["wta_crs_gather"](b.cpu(), indices)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tilewise.wta_crs_matmul(a, b, k=40), a @ b)
    assert torch.equal(tilewise.wta_crs_matmul(a[0], b[0], k=99), a[0] @ b[0])


def test_seeds():
    """An integer is a tensor of it; none follows torch's generator."""
    x = torch.randn(100, 4, device=DEVICE)

    def rows(seed):
        return tilewise.wta_crs_sample(x, k=10, seed=seed).indices.tolist()

    assert rows(3) == rows(torch.tensor([3], device=DEVICE)) == rows(torch.tensor(3, device=DEVICE)) != rows(4)
    torch.manual_seed(1)
    first, second = rows(None), rows(None)
    torch.manual_seed(1)
    assert first == rows(None) != second


@pytest.mark.parametrize(
    ("a", "b", "options", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 2), {"k": 1}, ValueError, r"b to be torch.float32 of shape \(3, p\)"),
        (torch.ones(5, 2, 3), torch.ones(3, 2), {"k": 1}, ValueError, r"of shape \(5, 3, p\)"),
        (torch.ones(2, 3), torch.ones(3, 2).double(), {"k": 1}, ValueError, "got torch.float64"),
        (torch.ones(2, 3), torch.ones(3, 2), {"k": 0}, ValueError, "k to be an integer in"),
        (torch.ones(3), torch.ones(3, 2), {"k": 1}, ValueError, "m, n"),
    ],
)
def test_bad_products(a, b, options, error, message):
    with pytest.raises(error, match=message):
        tilewise.wta_crs_matmul(a, b, **options)


@pytest.mark.skipif(not NATIVE_CPU or BACKEND == "reference", reason="the binding's own checks")
def test_bad_calls_of_the_operators():
    ops, x, norms = torch.ops.tilewise, torch.randn(2, 5, 3), torch.ones(2, 5)
    seed, indices = torch.tensor([1]), torch.zeros(2, 2, dtype=torch.int32)
    for call, message in (
        (lambda: ops.wta_crs_norms(x[0]), r"x to have shape \(batch, rows, columns\), got \(5, 3\)"),
        (lambda: ops.wta_crs_norms(x.int()), "float64, got Int"),
        (lambda: ops.wta_crs_sample(norms, None, seed, k=6), r"k to be in \[1, 5\], the rows, got 6"),
        (lambda: ops.wta_crs_sample(norms, None, seed, k=1, method="top"), "got 'top'"),
        (lambda: ops.wta_crs_sample(norms, None, seed, k=1, mix=2.0), r"mix to be in \[0, 1\], got 2"),
        (lambda: ops.wta_crs_sample(norms, norms[:1], seed, k=1), r"norms to have shape \(2, 5\), got \(1, 5\)"),
        (lambda: ops.wta_crs_sample(norms, None, seed.int(), k=1), "seed to have dtype Long"),
        (lambda: ops.wta_crs_gather(x, indices + 5), r"indices to be in \[0, 5\), the rows, got 5"),
        (lambda: ops.wta_crs_gather(x, indices - 1), "got -1"),
        (lambda: ops.wta_crs_gather(x, indices.long()), "indices to have dtype Int"),
        (lambda: ops.wta_crs_gather(x, indices, torch.ones(2, 3)), r"scales to have shape \(2, 2\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
