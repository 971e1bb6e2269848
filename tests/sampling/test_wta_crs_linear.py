"""wta_crs_linear: torch's linear layer but for the gradient of the weight, which is that of the rows it chose."""

from functools import partial

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import BACKEND, DEVICE, DTYPES, INTERPRETED, NATIVE_CPU
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tilewise
from tilewise.ops.wta_crs import METHODS
from tilewise.testing import allocated_bytes, saved_bytes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def step(function, x, weight, bias, grad):
    y = function(x, weight, bias)
    leaves = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    return y, *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 8), (4, 10, 8), (2, 3, 10, 8)], ids=str)
def test_all_but_the_weight_is_exact(shape, with_bias, method):
    """y, dX and db bit by bit; dW from the rows that were chosen."""
    for dtype in DTYPES[:1] if INTERPRETED else DTYPES:
        dense = torch.randn(shape).to(dtype).to(DEVICE)
        for x in (dense, torch.randn(*shape[:-2], 8, shape[-2]).to(dtype).to(DEVICE).mT):
            x = x.detach().requires_grad_()
            weight = torch.randn(5, 8).to(dtype).to(DEVICE).requires_grad_()
            bias = torch.randn(5).to(dtype).to(DEVICE).requires_grad_() if with_bias else None
            grad = torch.randn(*shape[:-1], 5).to(dtype).to(DEVICE)
            exact = step(functional.linear, x, weight, bias, grad)
            options = {"k": 9, "seed": 7, "method": method}
            ours = step(lambda *a, o=options: tilewise.wta_crs_linear(*a, **o), x, weight, bias, grad)
            for i in [0, 1] + ([3] if with_bias else []):
                assert torch.equal(ours[i], exact[i])
            sample = tilewise.wta_crs_sample(x, **options)
            y = grad.reshape(-1, 5)[sample.indices.long()].double() * sample.scales[:, None]
            expected = y.T @ sample.rows.double()
            tolerance = {torch.float32: 1e-5}.get(dtype, 3e-2)
            torch.testing.assert_close(ours[2].double(), expected, rtol=tolerance, atol=tolerance * 30)
            assert ours[2].dtype == dtype


def test_all_rows_are_exact():
    """k >= n samples nothing; n = 1; no rows; no gradient at all."""
    weight = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    for n, options in ((5, {"k": 5}), (5, {"k": 99}), (5, {"ratio": 1.0}), (1, {"ratio": 0.1}), (0, {"ratio": 0.1})):
        x, grad = torch.randn(n, 4, device=DEVICE), torch.randn(n, 3, device=DEVICE)
        ours = step(lambda *a, o=options: tilewise.wta_crs_linear(*a, **o), x, weight, None, grad)
        exact = step(functional.linear, x, weight, None, grad)
        assert all(torch.equal(*pair) for pair in zip(ours, exact, strict=True))
    y = tilewise.wta_crs_linear(torch.randn(50, 4, device=DEVICE), weight, k=5)
    (gradient,) = torch.autograd.grad(y, weight, torch.zeros_like(y))
    assert (gradient == 0).all()


def test_saved_bytes():
    """k rows, 4-byte indices, 4-byte scales, beside the weight."""
    for dtype in DTYPES:
        x = torch.randn(500, 64).to(dtype).to(DEVICE).requires_grad_()
        weight = torch.randn(32, 64).to(dtype).to(DEVICE).requires_grad_()
        full = saved_bytes(partial(functional.linear, x, weight), apart_from=[weight])
        ours = saved_bytes(partial(tilewise.wta_crs_linear, x, weight, k=50), apart_from=[weight])
        assert full == x.nbytes and ours == 50 * 64 * dtype.itemsize + 8 * 50


@pytest.mark.skipif(BACKEND == "reference", reason="the reference sorts")
def test_memory():
    """Sampling n rows takes 12 n bytes beside what it returns, and a forward one result."""
    x = torch.randn(1000, 256, device=DEVICE)
    weight = torch.randn(8, 256, device=DEVICE, requires_grad=True)
    spare = 6 * 512 if DEVICE == "cuda" else 64
    peak = allocated_bytes(lambda: tilewise.wta_crs_sample(x, k=10), DEVICE)
    assert peak <= 12 * 1000 + 10 * (256 * 4 + 8) + spare
    out = tilewise.wta_crs_linear(x, weight, k=100)
    grad = torch.randn(1000, 8, device=DEVICE)
    backward = allocated_bytes(lambda: torch.autograd.grad(out, weight, grad, retain_graph=True), DEVICE)
    assert backward <= weight.nbytes + 100 * 8 * 4 + spare


def test_norms_are_recorded():
    """The backward writes the norms of its rows where the samples are; other samples and tokens stay."""
    x, ids = torch.randn(3, 6, 4, device=DEVICE), torch.tensor([4, 0, 2], device=DEVICE)
    weight = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    grad = torch.randn(3, 6, 5, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({"k": 4}, {"k": 18}):
            table = torch.full((7, 8), -1, dtype=dtype, device=DEVICE)
            torch.autograd.grad(tilewise.wta_crs_linear(x, weight, record=(table, ids), **options), weight, grad)
            torch.testing.assert_close(table[ids, :6], grad.norm(dim=2).to(dtype))
            assert (table[ids, 6:] == -1).all() and (table[[1, 3, 5, 6]] == -1).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_rows(reentrant):
    x = torch.randn(60, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(5, 8, device=DEVICE, requires_grad=True)

    def gradient(wrap):
        torch.manual_seed(5)
        y = wrap(lambda x: tilewise.wta_crs_linear(x, weight, k=7).square())
        torch.rand(3)  # the generator moves on before the backward
        weight.grad = None
        y.sum().backward()
        return weight.grad

    plain = gradient(lambda f: f(x))
    again = gradient(lambda f: checkpoint(f, x, use_reentrant=reentrant))
    assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Rows are kept in the type that is computed in; gradients have the types of their leaves."""
    if DEVICE == "cpu" and dtype == torch.float16:
        pytest.skip("a linear layer of float16 is nothing for a CPU")
    x = torch.randn(60, 8, device=DEVICE, requires_grad=True)
    weight, bias = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((5, 8), (5,)))
    grad = torch.randn(60, 5, device=DEVICE).to(dtype)
    with torch.autocast(DEVICE, dtype):
        assert tilewise.wta_crs_sample(x, k=7).rows.dtype == dtype
        ours = step(lambda *a: tilewise.wta_crs_linear(*a, k=7, seed=1), x, weight, bias, grad)
        exact = step(functional.linear, x, weight, bias, grad)
    assert ours[0].dtype == dtype and [t.dtype for t in ours[1:]] == [torch.float32] * 3
    assert all(torch.equal(ours[i], exact[i]) for i in (0, 1, 3))


def test_written_in_place():
    """A result is no view: what often follows writes into it."""
    x = torch.randn(4, 10, 8, device=DEVICE, requires_grad=True)
    weight, bias = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((5, 8), (5,)))
    grad = torch.randn(4, 10, 5, device=DEVICE)
    ours = step(lambda *a: tilewise.wta_crs_linear(*a, k=40 - 1, seed=1).relu_(), x, weight, bias, grad)
    exact = step(lambda *a: functional.linear(*a).relu_(), x, weight, bias, grad)
    assert all(torch.equal(ours[i], exact[i]) for i in (0, 1, 3))
    assert (ours[2] - exact[2]).norm() < 0.5 * exact[2].norm()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be compiled")
def test_compile_and_opcheck():
    x, weight = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((60, 8), (5, 8)))
    ids, seed = torch.arange(6, device=DEVICE), torch.tensor([3], device=DEVICE)

    def loss(x, weight, table):
        return tilewise.wta_crs_linear(x, weight, k=7, seed=seed, record=(table, ids)).square().sum()

    tables = [torch.full((6, 10), -1.0, device=DEVICE) for _ in range(2)]
    found, expected = (
        torch.autograd.grad(f(x, weight, table), (x, weight))
        for f, table in zip((torch.compile(loss, fullgraph=True), loss), tables, strict=True)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*tables)
    drawn = torch.compile(lambda x: tilewise.wta_crs_linear(x, weight, ratio=0.1).square().sum(), fullgraph=True)
    drawn(x).backward()
    ops = torch.ops.tilewise
    torch.library.opcheck(ops.wta_crs_linear, (x, weight), {"k": 7, "seed": seed})
    torch.library.opcheck(ops.wta_crs_matmul, (weight, x.mT.reshape(8, 60)), {"k": 3, "seed": seed})
    norms = ops.wta_crs_norms(x.detach()[None])
    torch.library.opcheck(ops.wta_crs_norms, (x.detach()[None],))
    torch.library.opcheck(ops.wta_crs_sample, (norms, norms, seed), {"k": 7})
    indices, scales = ops.wta_crs_sample(norms, None, seed, k=7)
    torch.library.opcheck(ops.wta_crs_gather, (x[None], indices, scales))
    torch.library.opcheck(ops.wta_crs_gather, (x[None], indices))


def test_no_second_derivative():
    x, weight = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((60, 8), (5, 8)))
    y = tilewise.wta_crs_linear(x, weight, k=7).square().sum()
    (gradient,) = torch.autograd.grad(y, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_frozen_weights_sample_nothing():
    x, weight = torch.randn(60, 8, device=DEVICE, requires_grad=True), torch.randn(5, 8, device=DEVICE)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    y = tilewise.wta_crs_linear(x, weight, k=7)
    with torch.no_grad():
        tilewise.wta_crs_linear(x, weight.requires_grad_(), k=7)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(y, functional.linear(x, weight))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none(bad):
    """In x they make the gradient NaN, as with torch; in norms they are an error where a CPU can see them."""
    x, weight = torch.randn(60, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE, requires_grad=True)
    norms = torch.ones(60, device=DEVICE)
    norms[7] = bad
    x[3, 2] = bad
    (gradient,) = torch.autograd.grad(tilewise.wta_crs_linear(x, weight, k=7).sum(), weight)
    assert gradient.isnan().all()
    for value in (bad, -1.0):
        norms[7] = value
        if NATIVE_CPU and BACKEND != "reference":
            with pytest.raises(RuntimeError, match=r"norms to hold finite numbers >= 0, got (-1|nan|inf)"):
                tilewise.wta_crs_sample(x, k=7, norms=norms)
        else:
            sample = tilewise.wta_crs_sample(x.nan_to_num(), k=7, norms=norms)
            assert sample.scales.isnan().all()


X, W = torch.randn(6, 4), torch.randn(3, 4, requires_grad=True)
TABLE = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, W), {}, ValueError, "expected either k or ratio, got k=None and ratio=None"),
        ((X, W), {"k": 1, "ratio": 0.5}, ValueError, "either k or ratio"),
        ((X, W), {"k": 0}, ValueError, "expected k to be an integer in"),
        ((X, W), {"k": 1.5}, ValueError, "got 1.5"),
        ((X, W), {"ratio": 0.0}, ValueError, r"ratio to be a number in \(0, 1\], got 0.0"),
        ((X, W), {"ratio": 1.5}, ValueError, "got 1.5"),
        ((X, W), {"k": 2, "method": "top"}, ValueError, "systematic, wta, crs, got 'top'"),
        ((X, W), {"k": 2, "mix": -0.1}, ValueError, r"mix to be a number in \[0, 1\], got -0.1"),
        ((X, W), {"k": 2, "norms": torch.ones(5)}, ValueError, "norms to have 6 elements, one for a row"),
        ((X, W), {"k": 2, "norms": torch.ones(6, dtype=torch.int64)}, TypeError, "norms to be a floating tensor"),
        ((X, W), {"k": 2, "seed": -1}, ValueError, "seed to be an integer in"),
        ((X, W), {"k": 2, "seed": torch.ones(2)}, ValueError, "seed to be int64 with one element"),
        ((X, W), {"k": 2, "record": (TABLE, torch.arange(4))}, ValueError, "6 rows to be those of 4 samples"),
        ((X, W), {"k": 2, "record": (TABLE, torch.arange(2))}, ValueError, "at most 2 tokens"),
        ((X, W), {"k": 2, "record": (TABLE, torch.ones(3))}, ValueError, "int64 ids"),
        ((X, torch.randn(3, 5)), {"k": 2}, ValueError, r"weight to have shape \(d_out, 4\), got \(3, 5\)"),
        ((X, None), {"k": 2}, ValueError, "got NoneType"),
        ((torch.arange(4), W), {"k": 2}, TypeError, "got torch.int64"),
        (([1.0], W), {"k": 2}, TypeError, "tensor"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message) as raised:
        tilewise.wta_crs_linear(*arguments, **options)
    assert str(raised.value).startswith("tilewise.wta_crs_")
