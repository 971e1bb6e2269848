"""The pairwise engine: every loss and its gradients against the reference that holds the whole matrix."""

import math

import contract
import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, INTERPRETED, NATIVE_CPU
from pairwise_problems import LOSSES, PUBLIC, REDUCTIONS, TOLERANCE, batch, call, leaves, number, truth

import tilewise
from tilewise.reference.pairwise import OPS as REFERENCE
from tilewise.testing import assert_accurate


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("columns", [None, 40, 3])
@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_active"])
@pytest.mark.parametrize("loss", LOSSES)
def test_formed_gradients(loss, reduction, columns, guided):
    """The forward's own: losses, active rows, gradients of the sum; several chunks of rows, the last of them short."""
    x, y, x_labels, y_labels = batch(m=columns)
    guide = [torch.randn(len(t), 3).to(x) for t in (x, y)] if guided else [None, None]
    arguments = [x, y, x_labels, y_labels, number(4.0), number(-0.3), *guide]
    options = {
        "loss": loss,
        "reduction": reduction,
        "self_offset": 0 if columns is None else None,
        "guide_margin": 0.1,
        **{f"form_{name}_grad": True for name in ("x", "y", "bias")},
    }
    found = call(arguments, chunk_bytes=5 * len(y) * x.element_size(), **options)
    for value, expected in zip(found, truth(arguments, **options), strict=True):
        torch.testing.assert_close(value.cpu().double(), expected, **TOLERANCE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_backward_operator(loss, reduction):
    x, y, x_labels, y_labels = batch()
    grad = torch.randn(len(x)).to(x) if reduction == "none" else number(-1.7)
    arguments = [x, y, x_labels, y_labels, number(4.0), None, None, None]
    forward = call(arguments, loss=loss, reduction=reduction, self_offset=0)
    expected = truth(arguments, loss=loss, reduction=reduction, self_offset=0)
    torch.testing.assert_close(forward[0].cpu().double(), expected[0], **TOLERANCE)
    assert [g.shape for g in forward[2:]] == [(0,)] * 3
    options = {
        "loss": loss.removesuffix(" of all pairs"),
        "parameters": LOSSES[loss],
        "self_offset": 0,
        "guide_margin": 0.0,
        "reduction": reduction,
        "chunk_bytes": 700,
    }
    options |= {"x_grad": True, "y_grad": True, "bias_grad": True}
    found = torch.ops.tilewise.pairwise_loss_backward(grad, *arguments, forward[1], **options)
    wide = [None if t is None else t.cpu().double() if t.is_floating_point() else t.cpu() for t in arguments]
    want = REFERENCE["pairwise_loss_backward"](grad.cpu().double(), *wide, forward[1].cpu().double(), **options)
    for value, exact in zip(found, want, strict=True):
        torch.testing.assert_close(value.cpu().double(), exact, **TOLERANCE)


def sixteen_bits(dtype, columns=None):
    return [t.to(dtype) if t.is_floating_point() else t for t in batch(m=columns, dtype=torch.float32)]


needs_sixteen_bits = pytest.mark.skipif(contract.BACKEND == "cpu", reason="the CPU kernels take float32 and float64")


@needs_sixteen_bits
@pytest.mark.parametrize("columns", [None, 40])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_bfloat16_are_formed_with_the_loss(loss, columns):
    """In groups of several chunks of rows; the backward scales them, by a power of two without another rounding."""
    x, y, *labels = sixteen_bits(torch.bfloat16, columns)
    x, y = x.requires_grad_(), y.detach().requires_grad_()
    arguments = [x, y, *labels, number(1.0, torch.float32), number(-0.3, torch.float32), None, None]
    options = {"loss": loss, "reduction": "sum", "self_offset": 0 if columns is None else None}
    options |= {"form_x_grad": True, "form_y_grad": True}
    found = call(arguments, chunk_bytes=4 * len(y), **options)
    truths = truth(arguments, **options)
    for value, expected in zip(found[2:4], truths[2:4], strict=True):
        assert value.dtype == torch.bfloat16
        terms = (expected.abs() + expected.abs().amax()).clamp(min=1e-6)  # G is rounded, and the sum
        assert ((value.detach().cpu().double() - expected).abs() / terms).max() < 2**-7
    formed = [g.detach().clone() for g in found[2:4]]
    gradients = torch.autograd.grad(found[0], (x, y), torch.tensor(2.0**-20, device=DEVICE))
    assert all(torch.equal(g, 2.0**-20 * f) for g, f in zip(gradients, formed, strict=True))


@needs_sixteen_bits
def test_gradients_of_float16_wait_for_the_loss_scale():
    """They are below the least float16 before it and above after it."""
    x, y = (torch.eye(4, dtype=torch.float16, device=DEVICE).requires_grad_() for _ in range(2))
    labels, scale = torch.arange(4, device=DEVICE), 2.0**14
    arguments = [x, y, labels, labels, number(19.0, torch.float32), None, None, None]
    options = {"loss": "softmax", "reduction": "sum", "form_x_grad": True, "form_y_grad": True}
    loss, _, *formed = call(arguments, **options)
    assert [g.shape for g in formed] == [(0,)] * 3
    wide = [t.detach().double() if t is not None and t.is_floating_point() else t for t in arguments]
    exact = [19 * g for g in truth(wide, **options)[2:4]]
    assert max(g.abs().max() for g in exact) < 2**-21
    for gradient, expected in zip(torch.autograd.grad(loss, (x, y), loss.new_tensor(scale)), exact, strict=True):
        torch.testing.assert_close(gradient.cpu().double(), scale * expected, rtol=2e-3, atol=1e-6)


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("reduction", ["none", "mean", "mean_active"])
@pytest.mark.parametrize("name", PUBLIC)
def test_gradcheck(name, reduction):
    x, y, labels = leaves()

    def function(x, y):
        return PUBLIC[name](x, y, labels, reduction=reduction) + 0 * y.sum()

    # What the forward formed and what a later backward forms are sums in another order.
    assert torch.autograd.gradcheck(function, (x, y), nondet_tol=1e-12)


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_scale_bias_and_temperature(frozen):
    x, y, labels = leaves()
    if frozen:
        x, y = x.detach(), y.detach()
    two = torch.tensor([2.0, -0.7], dtype=torch.float64, requires_grad=True)
    functions = [
        lambda t: tilewise.siglip_loss(x, y, t[0], t[1]),
        lambda t: tilewise.siglip_loss(x, y, t[0], t[1], reduction="none"),
        lambda t: tilewise.clip_loss(x, y, t[0]) + t[1],
        lambda t: tilewise.info_nce(x, y, temperature=t[0]) + t[1],
        lambda t: tilewise.supcon(x, labels, temperature=t[0], reduction="mean_active") + t[1],
        lambda t: tilewise.nt_xent(x, y, temperature=t[0]) + t[1],
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (two,), nondet_tol=1e-12)


def test_formulas():
    """The public functions against what a user would write with the matrix in hand."""
    x, y, _ = leaves(dtype=torch.float32)
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    index = torch.arange(len(x), device=DEVICE)
    both = torch.cat([u, v])
    views = (both @ both.t() / 0.5).fill_diagonal_(-math.inf)
    sign = 2 * torch.eye(len(x), device=DEVICE) - 1
    pairs = [
        (tilewise.info_nce(x, y, temperature=0.2), F.cross_entropy(u @ v.t() / 0.2, index)),
        (tilewise.info_nce(x[:5], y, temperature=0.2), F.cross_entropy(u[:5] @ v.t() / 0.2, index[:5])),
        (tilewise.nt_xent(x, y), F.cross_entropy(views, torch.cat([index + len(x), index]))),
        (
            tilewise.clip_loss(x, y, 3.0),
            (F.cross_entropy(3 * x @ y.t(), index) + F.cross_entropy(3 * y @ x.t(), index)) / 2,
        ),
        (tilewise.siglip_loss(x, y, 3.0, -1.0), F.softplus(-sign * (3 * x @ y.t() - 1)).sum() / len(x)),
    ]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)
        for mine, theirs in zip(
            torch.autograd.grad(ours, (x, y)), torch.autograd.grad(expected, (x, y), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)


def test_guide_masks_false_negatives():
    x, y, _ = leaves(dtype=torch.float32)
    guide_x, guide_y = torch.randn(2, len(x), 4, device=DEVICE).unbind()
    s = F.normalize(x, dim=1) @ F.normalize(y, dim=1).t() / 0.07
    guide = F.normalize(guide_x, dim=1) @ F.normalize(guide_y, dim=1).t()
    own = torch.eye(len(x), dtype=torch.bool, device=DEVICE)
    s = s.masked_fill((guide > guide.diagonal()[:, None] - 0.1) & ~own, -math.inf)
    ours = tilewise.info_nce(x, y, guide_query=guide_x, guide_key=guide_y, guide_margin=0.1)
    torch.testing.assert_close(ours, F.cross_entropy(s, torch.arange(len(x), device=DEVICE)), rtol=1e-5, atol=1e-6)


def test_a_function_as_weighting():
    """What a user writes with PyTorch equals the kernels', in chunks of one anchor too."""
    x, _, labels = leaves(n=11 if INTERPRETED else 44, dtype=torch.float32)

    def contrastive(s, positive, negative):
        def mean(gap, mask):
            return (torch.relu(gap) * mask).sum(1) / mask.sum(1).clamp(min=1)

        return mean(1.0 - s, positive) + mean(s - 0.5, negative)

    for reduction in REDUCTIONS:
        for size in (2**20, 1):
            tilewise.ops.pair_weighted_loss.CHUNK, kept = size, tilewise.ops.pair_weighted_loss.CHUNK
            ours = tilewise.pair_weighted_loss(x, labels, contrastive, reduction=reduction)
            tilewise.ops.pair_weighted_loss.CHUNK = kept
            built_in = tilewise.pair_weighted_loss(x, labels, tilewise.weighting.Contrastive(), reduction=reduction)
            torch.testing.assert_close(ours, built_in, rtol=1e-5, atol=1e-6)
            grads = [torch.autograd.grad(loss.square().sum(), x)[0] for loss in (ours, built_in)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"weighting to return losses of shape \(\d+,\), got \(\)"):
        tilewise.pair_weighted_loss(x, labels, lambda s, p, n: s.sum())


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["multi_similarity_loss", "supcon", "info_nce", "siglip_loss"])
def test_accuracy(name, dtype):
    """Against float64, judged by the same composition of PyTorch's operations in the type."""
    torch.manual_seed(2)
    n, d = (16, 16) if INTERPRETED else (300, 32)
    labels = torch.arange(n) // 4
    base = torch.randn(n, d) + 2 * torch.randn(n // 4, d).repeat_interleave(4, 0)
    other = base + torch.randn(n, d)

    def run(dtype, device, wide=None):
        x, y = (t.to(dtype).to(wide or dtype).to(device).requires_grad_() for t in (base, other))
        loss = PUBLIC[name](x, y, labels.to(device), reduction="mean")
        return loss, *torch.autograd.grad(loss, (x, y), allow_unused=True, materialize_grads=True)

    with tilewise.backend("reference"):
        exact = run(dtype, "cpu", torch.float64)
        eager = run(dtype, "cpu")
    ours = run(dtype, DEVICE)
    for what, mine, expected, theirs in zip(("loss", "x", "y"), ours, exact, eager, strict=True):
        if expected.count_nonzero():
            assert_accurate(mine, expected, theirs, dtype, what)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_types_and_hard_batches(name, dtype):
    """One class, all distinct, equal embeddings, one row: finite, in the type of the embeddings."""
    for kind in ("one class", "distinct", "equal", "one row"):
        n = 1 if kind == "one row" else 8
        x, y = (torch.randn(n, 4, device=DEVICE).to(dtype).requires_grad_() for _ in range(2))
        labels = torch.zeros(n, dtype=torch.int32) if kind == "one class" else torch.arange(n, dtype=torch.int32)
        if kind == "equal":
            x = torch.ones(n, 4, device=DEVICE, dtype=dtype, requires_grad=True)
        loss = PUBLIC[name](x, y, labels.to(DEVICE))
        grads = torch.autograd.grad(loss, (x, y), allow_unused=True)
        assert loss.isfinite() and loss.dtype == torch.float32
        assert all(g is None or (g.dtype == dtype and g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("name", PUBLIC)
def test_no_rows(name):
    x, y = (torch.randn(0, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for reduction in ("mean", "mean_active", "sum"):
        loss = PUBLIC[name](x, y, labels, reduction=reduction)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, x)[0].shape == (0, 4)
    assert PUBLIC[name](x, y, labels, reduction="none").shape == (0,)


def test_no_columns():
    x, labels = torch.randn(3, 4, device=DEVICE, requires_grad=True), torch.arange(3, device=DEVICE)
    y = torch.randn(0, 4, device=DEVICE, requires_grad=True)
    for function in (tilewise.supcon, tilewise.multi_similarity_loss):
        loss = function(x, labels, ref_embeddings=y, ref_labels=labels[:0])
        dx, dy = torch.autograd.grad(loss, (x, y))
        assert loss.item() == 0 and dx.count_nonzero() == 0 and dy.shape == (0, 4)


def test_duplicates_are_pairs():
    """An anchor is left out by its index: equal embeddings of one label are positives at similarity 1."""
    x = torch.ones(3, 4, device=DEVICE)
    loss = tilewise.multi_similarity_loss(x, torch.tensor([0, 0, 1], device=DEVICE), reduction="none")
    pull, push = math.log1p(math.exp(-1.0)) / 2, math.log1p(math.exp(25.0)) / 50
    torch.testing.assert_close(loss, torch.tensor([pull + push, pull + push, 0.0], device=DEVICE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "positives, negatives, pulled, pushed",
    [((1.0, 0.25), (0.5,), 0.25, 0.5), ((0.75,), (0.25, 0.5), 0.75, 0.5)],
)
def test_mining_is_strict(positives, negatives, pulled, pushed):
    """A pair exactly epsilon from the hardest of the other kind is not kept."""
    similarities = torch.tensor([[*positives, *negatives]], device=DEVICE)
    labels = torch.tensor([1] * len(positives) + [2] * len(negatives), device=DEVICE)
    options = {"ref_embeddings": similarities.t(), "ref_labels": labels, "epsilon": 0.5, "normalize": False}
    arguments = torch.ones(1, 1, device=DEVICE), torch.tensor([1], device=DEVICE)
    expected = math.log1p(math.exp(-2 * (pulled - 0.5))) / 2 + math.log1p(math.exp(2 * (pushed - 0.5))) / 2
    assert tilewise.multi_similarity_loss(*arguments, beta=2.0, **options).item() == pytest.approx(expected, rel=1e-5)
    assert [len(t) for t in tilewise.multi_similarity_mine(*arguments, **options)] == [1] * 4
