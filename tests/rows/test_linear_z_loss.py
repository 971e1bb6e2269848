"""The logits-free spherical family against the loss of F.linear: values, all gradients, memory, costs not paid."""

import contract
import pytest
import torch
import torch.nn.functional as F
from contract import BACKEND, DEVICE

import tilewise
from tilewise.ops import logits_free
from tilewise.reference import linear_z_loss as reference
from tilewise.reference import z_loss as dense_reference
from tilewise.testing import allocated_bytes, class_targets, relative_error

MEMBERS = {
    "z": (tilewise.linear_z_loss, dense_reference.z_loss, {"a": 1.5, "b": 0.4}),
    "taylor": (tilewise.linear_taylor_softmax_loss, dense_reference.taylor_softmax_loss, {}),
    "spherical": (tilewise.linear_spherical_softmax_loss, dense_reference.spherical_softmax_loss, {"eps": 1e-2}),
}
by_member = pytest.mark.parametrize("member", MEMBERS)
pytestmark = pytest.mark.skipif(contract.INTERPRETED, reason="has no Triton kernel to interpret")
needs_composite = pytest.mark.skipif(BACKEND == "reference", reason="the reference holds the logits")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of weight with a remainder, at the sizes of tests."""
    monkeypatch.setattr(logits_free, "CHUNK", 64)


def inputs(n=12, d=6, v=40, dtype=torch.float64, ignored=0.2, mean=0.0):
    """hidden, weight, bias with gradients, and targets with duplicates; the first row is ignored and NaN."""
    torch.manual_seed(n + d + v)
    target = class_targets(n, v, ignored=ignored)
    target[1:4] = v // 2
    target[:1] = -100
    hidden, weight, bias = torch.randn(n, d), torch.randn(v, d) + mean, torch.randn(v)
    hidden[:1] = torch.nan
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight, bias)]
    return *leaves, target.to(DEVICE)


def linear_then(loss, hidden, weight, target, *, bias=None, **options):
    kept = (target != -100)[:, None]
    return loss(F.linear(torch.where(kept, hidden, 0), weight, bias), target, **options)


def value_and_gradients(loss, leaves, upstream):
    gradients = torch.autograd.grad(loss, leaves, upstream[: loss.numel()].view(loss.shape).to(loss))
    return [loss.detach(), *gradients]


@by_member
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(12, 6, 40), (5, 9, 3), (4, 2, 7)])
def test_equals_the_dense_composition_in_float64(member, reduction, with_bias, shape):
    linear, dense, options = MEMBERS[member]
    hidden, weight, bias, target = inputs(*shape)
    leaves = [hidden, weight, bias][: 2 + with_bias]
    options = options | {"reduction": reduction, "bias": bias if with_bias else None}
    upstream = torch.randn(len(hidden), device=DEVICE, dtype=torch.float64)
    ours = value_and_gradients(linear(hidden, weight, target, **options), leaves, upstream)
    truth = value_and_gradients(linear_then(dense, hidden, weight, target, **options), leaves, upstream)
    for value, expected in zip(ours, truth, strict=True):
        assert relative_error(value.cpu(), expected.cpu()) < 1e-9
    assert ours[1][0].count_nonzero() == 0  # the ignored row, whose hidden is NaN


@by_member
def test_the_references_agree(member):
    linear, dense, options = MEMBERS[member]
    hidden, weight, bias, target = inputs()
    options = options | {"bias": bias}
    ours = getattr(reference, linear.__name__)(hidden, weight, target, **options)
    torch.testing.assert_close(ours, linear_then(dense, hidden, weight, target, **options))


@by_member
def test_gradcheck(member):
    linear, _, options = MEMBERS[member]
    hidden, weight, bias, target = inputs(5, 3, 6, ignored=0.0)
    hidden = torch.randn_like(hidden).requires_grad_()

    def loss(h, w, b):
        return linear(h, w, target, bias=b, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_large_mean_weight_is_centred():
    """At mean 100 the float32 logits have already lost what the z-score is made of."""
    hidden, weight, bias, target = inputs(64, 32, 500, torch.float32, mean=100.0)
    options = {"bias": bias, "a": 1.0, "b": 0.0}
    leaves, upstream = [hidden, weight, bias], torch.ones(1, device=DEVICE)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours = value_and_gradients(tilewise.linear_z_loss(hidden, weight, target, **options), leaves, upstream)
    loss = linear_then(dense_reference.z_loss, *wide[:2], target, bias=wide[2], a=1.0, b=0.0)
    truth = value_and_gradients(loss, wide, upstream)
    limit = 1e-3 if BACKEND == "reference" else 1e-5
    assert all(relative_error(x.cpu(), y.cpu()) < limit for x, y in zip(ours, truth, strict=True))


@by_member
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(member, dtype):
    linear, dense, options = MEMBERS[member]
    hidden, weight, bias, target = inputs(60, 16, 50, dtype)
    leaves, upstream = [hidden, weight, bias], torch.ones(1, device=DEVICE)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    loss = linear(hidden, weight, target, bias=bias, reduction="sum", **options)
    assert loss.dtype == torch.float32
    ours = value_and_gradients(loss, leaves, upstream)
    loss = linear_then(dense, *wide[:2], target, bias=wide[2], reduction="sum", **options)
    truth = value_and_gradients(loss, wide, upstream)
    for value, expected in zip(ours[1:], truth[1:], strict=True):
        assert value.dtype == dtype
        half_ulp = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(value.double(), expected, rtol=1.01 * half_ulp, atol=2e-5)


def test_types_mix_under_autocast():
    hidden, weight, bias, target = inputs(dtype=torch.float32)
    narrow = hidden.detach().bfloat16()
    expected = tilewise.linear_z_loss(narrow.float(), weight, target, bias=bias, a=1.0, b=0.0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = tilewise.linear_z_loss(narrow, weight, target, bias=bias, a=1.0, b=0.0)
        (gradient,) = torch.autograd.grad(ours, weight)
    assert torch.equal(ours, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, weight)[0])


@by_member
def test_no_rows_one_class_all_ignored(member):
    linear, _, options = MEMBERS[member]
    weight, bias = torch.randn(5, 3, device=DEVICE).requires_grad_(), torch.randn(5, device=DEVICE).requires_grad_()
    for target in (torch.empty(0, dtype=torch.int64), torch.full((4,), -100)):
        hidden = torch.randn(len(target), 3, device=DEVICE).requires_grad_()
        loss = linear(hidden, weight, target.to(DEVICE), bias=bias, **options)
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        assert loss.item() == 0 and all(g.count_nonzero() == 0 for g in gradients)
    hidden, target = torch.randn(4, 3, device=DEVICE).requires_grad_(), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    loss = linear(hidden, weight[:1], target, reduction="none", **options)
    expected = MEMBERS[member][1](hidden @ weight[:1].t(), target, reduction="none", **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_constant_weight_has_no_gradient():
    hidden, target = torch.randn(4, 3, device=DEVICE).requires_grad_(), class_targets(4, 7, device=DEVICE)
    weight = torch.tensor([0.1, 0.7, -0.3], device=DEVICE).expand(7, 3).requires_grad_()
    if BACKEND == "reference":
        pytest.skip("the reference's mean of equal numbers rounds")
    loss = tilewise.linear_z_loss(hidden, weight, target, a=2.0, b=0.5)
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(1.0)).item() / 2, rel=1e-6)
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_custom_ignore_index_and_retained_graph():
    hidden, weight, bias, _ = inputs(ignored=0.0)
    target = torch.tensor([3, 3, 1, 2], device=DEVICE)
    loss = tilewise.linear_z_loss(hidden[:4], weight, target, bias=bias, a=1.0, b=0.0, ignore_index=3)
    expected = tilewise.linear_z_loss(hidden[2:4], weight, target[2:], bias=bias, a=1.0, b=0.0)
    torch.testing.assert_close(loss, expected)
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(first, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True))


def test_second_derivative_is_refused():
    hidden, weight, _, target = inputs()
    loss = tilewise.linear_z_loss(hidden, weight, target, a=1.0, b=0.0)
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tilewise\.linear_z_loss: .*cannot be differentiated twice"):
        gradient.sum().backward()


@needs_composite
def test_memory(monkeypatch):
    """Neither logits nor a second weight; a frozen tensor costs nothing."""
    chunk, (n, d, v) = 2**10, (256, 16, 8192)
    monkeypatch.setattr(logits_free, "CHUNK", chunk)
    hidden, weight, _, target = inputs(n, d, v, torch.float32)
    spare = 2**16 if DEVICE == "cuda" else 2**12
    small = 4 * (8 * n * d + 4 * chunk + 4 * d * d) + 40 * n + spare
    assert small < 4 * v * d < 4 * n * v

    def loss(h, w):
        return tilewise.linear_z_loss(h, w, target, a=1.0, b=0.0)

    both = loss(hidden, weight)
    torch.autograd.grad(both, (hidden, weight), retain_graph=True)  # a GPU's libraries have their workspaces now
    assert allocated_bytes(lambda: loss(hidden, weight), DEVICE) < small
    backward = allocated_bytes(lambda: torch.autograd.grad(both, (hidden, weight), retain_graph=True), DEVICE)
    assert 4 * v * d < backward < 4 * v * d + small
    frozen = loss(hidden, weight.detach())
    assert allocated_bytes(lambda: torch.autograd.grad(frozen, hidden, retain_graph=True), DEVICE) < small


@needs_composite
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_computed(wanted):
    hidden, weight, bias, target = inputs()
    outputs = torch.ops.tilewise.linear_z_loss(hidden, weight, target, bias, a=1.0, b=0.0)
    flags = dict(zip(("grad_hidden", "grad_weight", "grad_bias"), wanted, strict=True))
    gradients = torch.ops.tilewise.linear_spherical_backward(
        torch.ones_like(outputs[0]),
        hidden,
        weight,
        target,
        bias,
        *outputs[1:],
        ignore_index=-100,
        reduction="mean",
        **flags,
    )
    assert [g.numel() > 0 for g in gradients] == list(wanted)


def test_out_of_range_target():
    hidden, weight, _, _ = inputs(4, 3, 5, torch.float32)
    for bad in (5, -1, 2**40):
        target = torch.tensor([-100, bad, 2, 3], device=DEVICE)
        if DEVICE == "cpu":
            with pytest.raises(RuntimeError, match=rf"tilewise\.\w*z_loss: .*target\[1\].* got {bad}"):
                tilewise.linear_z_loss(hidden, weight, target, a=1.0, b=0.0)
            continue
        loss = tilewise.linear_z_loss(hidden, weight, target, a=1.0, b=0.0, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        assert loss.isnan().tolist() == [False, True, False, False]
        assert gradient[1].isnan().all() and gradient[[0, 2, 3]].isfinite().all()


H, W, T = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "hidden, weight, target, options, error, message",
    [
        (H[0], W, T, {}, ValueError, r"hidden to be 2-D, got shape \(4,\)"),
        ([[0.0]], W, T, {}, TypeError, "hidden to be a tensor, got list"),
        (H.long(), W, T, {}, TypeError, "hidden to be float64, float32.*got torch.int64"),
        (H, W[0], T, {}, ValueError, r"weight to be 2-D, got shape \(4,\)"),
        (H, W[:0], T, {}, ValueError, r"weight to have at least one class and one column, got shape \(0, 4\)"),
        (H, W[:, :3], T, {}, ValueError, r"hidden to have 3 columns like weight, got shape \(3, 4\)"),
        (H, W.double(), T, {}, TypeError, "weight to be float32.*with torch.float32 hidden, got torch.float64"),
        (H, W, T[:2], {}, ValueError, r"target to have shape \(3,\), got \(2,\)"),
        (H, W, T.float(), {}, TypeError, "target to hold integer class indices, got torch.float32"),
        (H, W, T, {"bias": torch.zeros(4)}, ValueError, r"bias to have shape \(5,\), got \(4,\)"),
        (H, W, T, {"bias": 1.0}, TypeError, "bias to be a tensor or None, got float"),
        (H, W, T, {"bias": torch.zeros(5).long()}, TypeError, "bias to be float32.*got torch.int64"),
        (H, W.to("meta"), T, {}, ValueError, r"weight on (cpu|cuda:0) like hidden, got meta"),
        (H, W, T, {"a": 0.0}, ValueError, "a to be a finite number above 0, got 0.0"),
        (H, W, T, {"b": float("nan")}, ValueError, "b to be a finite number, got nan"),
        (H, W, T, {"reduction": "median"}, ValueError, "reduction to be 'none', 'mean' or 'sum', got 'median'"),
    ],
)
def test_bad_arguments(hidden, weight, target, options, error, message):
    def place(value):
        return value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value

    options = {"a": 1.0, "b": 0.0} | {name: place(value) for name, value in options.items()}
    with pytest.raises(error, match=rf"^tilewise\.linear_z_loss: expected {message}"):
        tilewise.linear_z_loss(place(hidden), place(weight), place(target), **options)


@by_member
def test_compile(member):
    linear, _, options = MEMBERS[member]

    def step(hidden, weight, target):
        return linear(hidden * 2, weight, target, **options)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (6, 11):
        hidden, weight, _, target = inputs(n, dtype=torch.float32)
        results = [f(hidden, weight, target) for f in (compiled, step)]
        gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in results]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*gradients, equal_nan=True)


def test_opcheck():
    ops, options = torch.ops.tilewise, {"ignore_index": -100, "reduction": "mean"}
    hidden, weight, bias, target = inputs(dtype=torch.float32)
    hidden = torch.randn_like(hidden).requires_grad_()  # opcheck compares bit by bit, and NaN is not equal to itself
    for arguments in (
        (hidden, weight, target, None),
        (hidden, weight, target, bias),
        (hidden.detach(), weight, target, None),
    ):
        torch.library.opcheck(ops.linear_z_loss.default, arguments, options | {"a": 1.0, "b": 0.5})
        torch.library.opcheck(ops.linear_taylor_softmax_loss.default, arguments, options)
        torch.library.opcheck(ops.linear_spherical_softmax_loss.default, arguments, options | {"eps": 1e-3})
    leaves = [x.detach() for x in (hidden, weight)]
    loss, *state = ops.linear_z_loss(*leaves, target, bias.detach(), a=1.0, b=0.5, **options)
    flags = {"grad_hidden": True, "grad_weight": True, "grad_bias": False}
    arguments = (torch.ones_like(loss), *leaves, target, bias.detach(), *state)
    torch.library.opcheck(ops.linear_spherical_backward.default, arguments, options | flags)
