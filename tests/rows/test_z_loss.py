"""The spherical family: the invariances of its members, the numbers of the formulas."""

import math

import contract
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED

import tilewise
from tilewise.reference import z_loss as reference
from tilewise.testing import class_targets, relative_error


def test_known_values():
    """o = (1, 2, 3): mean 2, variance 2/3, z_c = sqrt(3/2); Taylor terms 2.5, 5, 8.5; squares 1, 4, 9."""
    logits, target = torch.tensor([[1.0, 2.0, 3.0]], device=DEVICE), torch.tensor([2], device=DEVICE)
    expected = math.log1p(math.exp(2 * (0.5 - math.sqrt(1.5)))) / 2
    assert tilewise.z_loss(logits, target, a=2.0, b=0.5).item() == pytest.approx(expected, rel=1e-6)
    assert tilewise.taylor_softmax_loss(logits, target).item() == pytest.approx(math.log(16 / 8.5), rel=1e-6)
    assert tilewise.spherical_softmax_loss(logits, target).item() == pytest.approx(math.log(14 / 9), rel=1e-5)


def test_large_mean_does_not_cancel():
    """With mean 100, q/D - mu^2 in float32 is off by a quarter of a per mille; Welford is not."""
    torch.manual_seed(0)
    logits = torch.randn(4, 30000, device=DEVICE) + 100
    target = class_targets(4, 30000, device=DEVICE)
    ours = contract.value_and_gradient(tilewise.z_loss, logits, target, a=1.0, b=0.0)
    truth = contract.value_and_gradient(reference.z_loss, logits.double().cpu(), target.cpu(), a=1.0, b=0.0)
    assert relative_error(ours[0], truth[0]) < 5e-6
    assert relative_error(ours[1], truth[1]) < 5e-6


LOSSES = {"z_loss": {"a": 1.0, "b": 2.0}, "taylor_softmax_loss": {}, "spherical_softmax_loss": {}}


@pytest.mark.skipif(contract.BACKEND == "reference", reason="the reference in float32 squares as PyTorch does")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("v", [33, 3000])
@pytest.mark.parametrize("magnitude", [1e14, 1e17, 1e19, 1e22, 1e30, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_beyond_the_type(name, v, magnitude, dtype):
    """Losses and gradients of logits whose squares overflow float32: everywhere, in one element, or in the mean."""
    torch.manual_seed(0)
    logits = magnitude * torch.randn(6, v)
    logits[1:3] /= magnitude
    logits[1, 7] = magnitude  # one large, not the target
    logits[2, 5:7] = torch.tensor([-magnitude, magnitude / 2])  # two large, one the target
    logits[3] += 10 * magnitude
    logits[4, v // 2 :] /= magnitude
    logits, target = logits.to(dtype), torch.tensor([0, 1, 5, 3, v - 1, 5])
    call, options = getattr(tilewise, name), LOSSES[name] | {"reduction": "none"}
    grad = torch.full((6,), magnitude / 64)  # the gradient is of the order of 1 / magnitude
    loss, gradient = contract.value_and_gradient(call, logits.to(DEVICE), target.to(DEVICE), grad.to(DEVICE), **options)
    expected, slope = contract.value_and_gradient(
        getattr(reference, name), logits.double(), target, grad.double(), **options
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for row in range(6):
        assert relative_error(gradient[row], slope[row]) < 2e-5 + (
            torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
        )


def test_constant_row():
    logits = torch.full((2, 1030), 7.25, device=DEVICE)
    target = torch.tensor([3, 5], device=DEVICE)
    loss, gradient = contract.value_and_gradient(tilewise.z_loss, logits, target, a=2.0, b=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.0)) / 2, rel=1e-6)
    assert gradient.count_nonzero() == 0


@pytest.mark.skipif(BACKEND != "cpu", reason="4.3 GB of zero pages exist only in the CPU's memory")
def test_more_than_2_31_elements():
    contract.check_more_than_2_31_elements(
        lambda *tensors, **options: tilewise.z_loss(*tensors, a=1.0, b=0.0, **options)
    )


@hypothesis.settings(max_examples=10 if INTERPRETED else 40, deadline=None)
@hypothesis.given(v=st.integers(3, 70), seed=st.integers(0, 2**20), shift=st.floats(-10, 10), scale=st.floats(0.5, 4))
def test_z_loss_sees_neither_shift_nor_scale(v, seed, shift, scale):
    torch.manual_seed(seed)
    logits, target = torch.randn(3, v, device=DEVICE), class_targets(3, v, device=DEVICE)
    loss, gradient = contract.value_and_gradient(tilewise.z_loss, logits, target, a=1.5, b=0.2)
    moved, moved_gradient = contract.value_and_gradient(tilewise.z_loss, scale * logits + shift, target, a=1.5, b=0.2)
    torch.testing.assert_close(moved, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_gradient * scale, gradient, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close((gradient * logits.cpu()).sum(1), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="opcheck traces; the interpreter is NumPy")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction):
    logits, target = torch.randn(4, 7, device=DEVICE), class_targets(4, 7, device=DEVICE)
    ops = torch.ops.tilewise
    options = {"ignore_index": -100, "reduction": reduction}
    for leaf in (logits, logits.clone().requires_grad_()):
        torch.library.opcheck(ops.z_loss.default, (leaf, target), options | {"a": 1.0, "b": 0.5})
        torch.library.opcheck(ops.taylor_softmax_loss.default, (leaf, target), options)
        torch.library.opcheck(ops.spherical_softmax_loss.default, (leaf, target), options | {"eps": 1e-3})
    loss, state = ops.taylor_softmax_loss(logits, target, **options)
    torch.library.opcheck(
        ops.spherical_family_backward.default, (torch.ones_like(loss), logits, target, state), options
    )


def test_second_derivative_is_refused():
    logits = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    loss = tilewise.z_loss(logits, torch.tensor([0, 1, 2], device=DEVICE), a=1.0, b=0.0)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tilewise\.z_loss: .*cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"a": 0.0, "b": 0.0}, "a to be a finite number above 0, got 0.0"),
        ({"a": -1.0, "b": 0.0}, "a to be a finite number above 0"),
        ({"a": 1.0, "b": float("nan")}, "b to be a finite number, got nan"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=f"tilewise.z_loss: expected {message}"):
        tilewise.z_loss(torch.randn(2, 3, device=DEVICE), torch.tensor([0, 1], device=DEVICE), **options)


def test_modules_equal_functions():
    logits, target = torch.randn(4, 9, device=DEVICE), class_targets(4, 9, device=DEVICE)
    assert torch.equal(tilewise.nn.ZLoss()(logits, target), tilewise.z_loss(logits, target, a=1.0, b=0.0))
    assert torch.equal(
        tilewise.nn.TaylorSoftmaxLoss(reduction="sum")(logits, target),
        tilewise.taylor_softmax_loss(logits, target, reduction="sum"),
    )
    assert torch.equal(
        tilewise.nn.SphericalSoftmaxLoss(eps=0.1)(logits, target),
        tilewise.spherical_softmax_loss(logits, target, eps=0.1),
    )
