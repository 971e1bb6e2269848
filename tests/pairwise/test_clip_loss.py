"""clip_loss against cross entropy both ways on the whole matrix of similarities."""

import math

import contract
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU
from pairwise_problems import REDUCTIONS, TOLERANCE, WIDE, number

import tilewise
from tilewise.testing import allocated_bytes, assert_accurate, relative_error

SIZES = [(1, 3), (2, 1), (7, 5), (23, 9)] + ([] if INTERPRETED else [(33, 4), (150, 20), (600, 7)])


def eager(image, text, scale, reduction="mean"):
    z = scale * image @ text.t()
    index = torch.arange(len(z), device=z.device)
    reduction = "mean" if reduction == "mean_active" else reduction
    return sum(F.cross_entropy(scores, index, reduction=reduction) for scores in (z, z.t())) / 2


def of_others(image, text, scale, reduction="mean"):
    """The same from the pairs beside the diagonal: float64 has no digits of 1 - p below 1e-16 otherwise."""
    z = scale * image @ text.t()
    others = torch.where(torch.eye(len(z), dtype=torch.bool), -torch.inf, z)
    gaps = torch.stack([torch.logsumexp(others, side) - z.diagonal() for side in (0, 1)])
    losses = torch.logaddexp(gaps, torch.zeros_like(gaps)).mean(0)
    return losses if reduction == "none" else losses.mean()


def pairs(n, d, dtype=WIDE, scale=3.0):
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1) for _ in range(2))
    leaves = image.to(DEVICE, dtype), text.to(DEVICE, dtype), number(scale, dtype if dtype == WIDE else torch.float32)
    return tuple(t.requires_grad_() for t in leaves)


def wide(tensors):
    return tuple(t.detach().cpu().double().requires_grad_(t.requires_grad) for t in tensors)


def run(function, inputs, grad=None, **options):
    loss = function(*inputs, **options)
    grad = torch.ones_like(loss) if grad is None else grad.to(loss)
    return loss, *torch.autograd.grad(loss, inputs, grad)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_cross_entropy(size, reduction, chunk, monkeypatch):
    """Loss and gradients; also of chunks of three rows, the last of them short."""
    n, d = size
    if chunk is not None:
        forward = tilewise.ops.clip_loss._forward
        held = chunk * n * WIDE.itemsize
        monkeypatch.setattr("tilewise.ops.clip_loss._forward", lambda *t, **o: forward(*t, **o, chunk_bytes=held))
    inputs = pairs(n, d)
    grad = torch.randn(n, device=DEVICE) if reduction == "none" else torch.tensor(-1.7)
    found = run(tilewise.clip_loss, inputs, grad, reduction=reduction)
    expected = run(eager, wide(inputs), grad.cpu(), reduction=reduction)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value.cpu().double(), exact, **TOLERANCE)


@pytest.mark.parametrize("scale", [0.0, -4.0, 100.0, 1e3])
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_as_right_as_eager(dtype, scale):
    """Each dtype judged by the composition in it; similarities of a cone, whose gradients cancel."""
    n, d = (20, 8) if INTERPRETED else (90, 24)
    torch.manual_seed(0)
    image, text = (F.normalize(1 + torch.randn(n, d) / 4, dim=1).to(DEVICE, dtype) for _ in range(2))
    inputs = tuple(t.requires_grad_() for t in (image, text, number(scale, torch.float32)))
    found = run(tilewise.clip_loss, inputs)
    truth = run(eager, wide(inputs))
    narrow = run(eager, (*(t.detach().to(dtype).requires_grad_() for t in inputs),))
    for name, value, exact, theirs in zip(("loss", "image", "text", "scale"), found, truth, narrow, strict=True):
        if not exact.any():
            continue
        slack = 1e-3 if name == "scale" else 0.0  # a sum that nearly cancels
        slack += 2.0**-8 if INTERPRETED and dtype == torch.bfloat16 else 0.0  # which truncates to bfloat16
        assert_accurate(value, exact, theirs, dtype if name in ("image", "text") else torch.float32, name, slack=slack)


@pytest.mark.parametrize("left", [1e-2, 1e-4, 1e-7, 1e-9])
def test_confident_pairs(left):
    """p_ii within `left` of 1: loss and gradients, which only the negatives give, keep their digits."""
    n = 24
    image = torch.eye(n, device=DEVICE)
    text = image + torch.randint(0, 9, (n, n), generator=torch.Generator().manual_seed(0)).to(DEVICE) / 64
    text.fill_diagonal_(1.0)
    scale = float(round(8 * math.log(n / left)) / 8)  # similarities and scale of few bits: products are exact
    inputs = tuple(t.requires_grad_() for t in (image, text, number(scale, torch.float32)))
    for reduction in ("mean", "none"):
        found = run(tilewise.clip_loss, inputs, reduction=reduction)
        expected = run(of_others, wide(inputs), reduction=reduction)
        assert found[0].max() < 30 * left
        for value, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(value.cpu().double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_extreme_scores():
    """Of 1e30, of infinities, of NaN: what the formula has, and NaN stays."""
    x = torch.eye(3, device=DEVICE, requires_grad=True)
    assert (
        run(tilewise.clip_loss, (x, x.detach().clone().requires_grad_(), number(1e30, torch.float32).requires_grad_()))[
            0
        ]
        == 0
    )
    y = x.detach().roll(1, 0)
    torch.testing.assert_close(tilewise.clip_loss(x, y, 1e30).item(), 1e30)
    for value in (math.nan, math.inf):
        y = torch.ones(3, 3, device=DEVICE)
        y[1, 1] = value
        assert tilewise.clip_loss(torch.ones(3, 3, device=DEVICE), y, 1.0).isnan()


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(reduction):
    function = lambda *inputs: tilewise.clip_loss(*inputs, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(function, pairs(11, 5), check_forward_ad=reduction == "mean")


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_frozen_inputs(frozen):
    """The gradient of each alone; that of the scale from the side that is formed anyway."""
    inputs = pairs(9, 4)
    everything = run(tilewise.clip_loss, inputs)
    for i in frozen:
        inputs[i].requires_grad_(False)
    open_inputs = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(tilewise.clip_loss(*inputs), open_inputs)
    expected = [g for i, g in enumerate(everything[1:]) if i not in frozen]
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_pairs(reduction):
    inputs = pairs(0, 4)
    loss, *gradients = run(tilewise.clip_loss, inputs, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any()
    assert [g.shape for g in gradients] == [(0, 4), (0, 4), ()] and gradients[2] == 0


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(layout):
    base = torch.randn(16, 16, device=DEVICE)
    view = {"transposed": base.t()[:9, :7], "sliced": base[1:10, 2:9], "expanded": base[:1, :7].expand(9, 7)}[layout]
    other = torch.randn(9, 7, device=DEVICE)
    for order in (slice(None), slice(None, None, -1)):
        inputs = [t.detach().requires_grad_() for t in (view, other)][order]
        copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in inputs]
        found, expected = (run(lambda x, y: tilewise.clip_loss(x, y, 2.0), tensors) for tensors in (inputs, copies))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_16_bit_gradients_of_many_rows():
    """A mean over many rows divides by their number after the products: float16 keeps its digits."""
    inputs = pairs(40, 4, torch.float16)
    found = run(tilewise.clip_loss, inputs, torch.tensor(1e-3))
    expected = run(eager, wide(inputs), torch.tensor(1e-3))
    scaled = [torch.autograd.grad(2**10 * tilewise.clip_loss(*inputs), inputs[:2])]
    for value, large, exact in zip(found[1:3], scaled[0], expected[1:3], strict=True):
        assert relative_error(value, exact) < 2e-2 and relative_error(large / 2**10, 1e3 * exact) < 2e-3


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_backward(reduction):
    inputs = pairs(9, 4, torch.float32)
    loss = tilewise.clip_loss(*inputs, reduction=reduction).sum()
    first = torch.autograd.grad(loss, inputs, torch.tensor(2.0).to(DEVICE), retain_graph=True)
    second = torch.autograd.grad(loss, inputs, torch.tensor(-6.0).to(DEVICE), create_graph=True)
    assert all(relative_error(a, -3 * b) < 1e-6 for a, b in zip(second, first, strict=True))
    for gradient in second:
        with pytest.raises(RuntimeError, match=r"tilewise\.clip_loss: .*got a second"):
            torch.autograd.grad(gradient.square().sum(), inputs, retain_graph=True)


def test_same_bits_every_time():
    inputs = pairs(*((20, 5) if INTERPRETED else (700, 33)), torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (threads, threads, 1, 3):
        torch.set_num_threads(count)
        results.append(run(tilewise.clip_loss, inputs))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_every_output_is_written():
    """Deterministic mode fills fresh memory with NaN: an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        for reduction in ("none", "mean"):
            assert all(
                t.isfinite().all() for t in run(tilewise.clip_loss, pairs(37, 5, torch.float32), reduction=reduction)
            )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(BACKEND == "reference", reason="the reference holds the big matrix")
@pytest.mark.skipif(INTERPRETED, reason="thousands of programs, one after the other")
def test_memory():
    """A chunk of rows, a state of five numbers a row and the gradients, not (N, N): 36 MB here."""
    n, d = 3000, 16
    image, text, scale = pairs(n, d, torch.float32)
    chunk = 4 * 2**20 if DEVICE == "cpu" else 4 * n * n
    call = lambda: tilewise.clip_loss(image, text, scale).backward()  # noqa: E731
    assert allocated_bytes(call, DEVICE) <= chunk + 4 * n * (4 * d + 24)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter makes no fake tensors")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction):
    torch.library.opcheck(torch.ops.tilewise.clip_loss.default, pairs(7, 4, torch.float32), {"reduction": reduction})


def test_forward_mode_of_rows_is_refused():
    image, text, scale = (t.detach() for t in pairs(5, 3, torch.float32))
    with pytest.raises(RuntimeError, match=r"tilewise\.clip_loss: no forward mode .* of losses of rows in image"):
        torch.func.jvp(lambda x: tilewise.clip_loss(x, text, scale, reduction="none"), (image,), (image,))


@hypothesis.settings(deadline=None, max_examples=10 if INTERPRETED else 60)
@hypothesis.given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    rows=st.integers(1, 40),
    scale=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
def test_any_batch(n, d, rows, scale, seed):
    torch.manual_seed(seed)
    image, text = torch.randn(n, d).to(DEVICE, WIDE), torch.randn(n, d).to(DEVICE, WIDE)
    inputs = image.requires_grad_(), text.requires_grad_(), number(scale).requires_grad_()
    held = rows * n * WIDE.itemsize
    function = lambda *t: torch.ops.tilewise.clip_loss(*t, reduction="sum", chunk_bytes=held)[0]  # noqa: E731
    for value, exact in zip(run(function, inputs), run(eager, wide(inputs), reduction="sum"), strict=True):
        torch.testing.assert_close(
            value.cpu().double(), exact, rtol=10 * TOLERANCE["rtol"], atol=1e3 * n * TOLERANCE["atol"]
        )


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X[0], X, 1.0), {}, ValueError, r"image to be 2-D, got shape \(3,\)"),
        ((X.long(), X, 1.0), {}, TypeError, "image to be float64.*got torch.int64"),
        ((X, X[:3], 1.0), {}, ValueError, r"text to have shape \(4, 3\) like image, got \(3, 3\)"),
        ((X, X.double(), 1.0), {}, TypeError, "text to be torch.float32 like image, got torch.float64"),
        ((X, X, math.nan), {}, ValueError, "logit_scale to be a finite number"),
        ((X, X, torch.ones(2)), {}, ValueError, "logit_scale to be a number or a floating tensor of one element"),
        ((X, X, 1.0), {"reduction": "median"}, ValueError, "reduction to be .*, got 'median'"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=r"tilewise\.clip_loss: expected " + message):
        tilewise.clip_loss(*arguments, **options)


@pytest.mark.skipif(BACKEND != "cpu", reason="the checks of the C++ operators themselves")
def test_bad_arguments_of_the_operators():
    one, state = torch.tensor(1.0), torch.ones(21)
    good = {"image": X, "text": X, "logit_scale": one}
    for change, message in [
        ({"image": X[0]}, r"image to be 2-D, got shape \(3,\)"),
        ({"image": X.half(), "text": X.half()}, "image to be float32 or float64 on a CPU, got Half"),
        ({"text": X[:3]}, r"text to have shape \(4, 3\), got \(3, 3\)"),
        ({"text": X.double()}, "text to have dtype Float, got Double"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale to have shape \(\), got \(2,\)"),
        ({"logit_scale": one.double()}, "logit_scale to have dtype Float, got Double"),
        ({"reduction": "median"}, "reduction to be 'none', 'mean' or 'sum', got 'median'"),
        ({"chunk_bytes": -1}, "chunk_bytes not below 0, got -1"),
    ]:
        with pytest.raises(RuntimeError, match=r"tilewise\.clip_loss: expected " + message):
            torch.ops.tilewise.clip_loss(**good | change)
        if "reduction" not in change:
            with pytest.raises(RuntimeError, match=r"tilewise\.clip_loss: expected " + message):
                torch.ops.tilewise.clip_loss_backward(**good | {"state": state} | change)
    for change, message in [
        ({"state": state[:20]}, r"state to have shape \(21,\), got \(20,\)"),
        ({"state": state.double()}, "state to have dtype Float, got Double"),
        ({"grad_loss": state[:3]}, r"grad_loss to have shape \(4,\), got \(3,\)"),
        ({"grad_loss": one.expand(4)}, "grad_loss to be contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=r"tilewise\.clip_loss: expected " + message):
            torch.ops.tilewise.clip_loss_backward(**good | {"state": state} | change)
