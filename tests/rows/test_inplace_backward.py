"""cross_entropy(..., inplace_backward=True): the logits' memory becomes their gradient, and nobody is deceived."""

import contract
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED

import tilewise
from tilewise.testing import allocated_bytes, class_targets


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["packed", "transposed", "sliced"])
def test_inplace_backward(dtype, layout):
    base = (3 * torch.randn(48, 48, device=DEVICE)).to(dtype)
    view = {"packed": base, "transposed": base.t(), "sliced": base[:17, 2:35]}[layout]
    target = class_targets(*view.shape, ignored=0.2, device=DEVICE)
    expected = contract.value_and_gradient(tilewise.cross_entropy, view, target)[1]
    leaf = view.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    logits = leaf * 1
    version = logits._version
    gradients = []
    logits.register_hook(gradients.append)
    tilewise.cross_entropy(logits, target, inplace_backward=True).backward()
    assert gradients[0].data_ptr() == logits.data_ptr(), "the gradient lies in the memory of the logits"
    assert logits._version > version
    assert torch.equal(leaf.grad.cpu(), expected)


@pytest.mark.skipif(BACKEND == "reference", reason="the reference holds the big matrix")
def test_inplace_backward_allocates_nothing():
    n, v = 64, 2048
    leaf = torch.randn(n, v, device=DEVICE, requires_grad=True)
    logits = leaf * 1
    loss = tilewise.cross_entropy(logits, class_targets(n, v, device=DEVICE), inplace_backward=True)
    spare = 4096 if DEVICE == "cuda" else 0
    assert allocated_bytes(lambda: torch.autograd.grad(loss, logits), DEVICE) <= 16 + spare


def test_inplace_backward_is_refused_where_it_would_corrupt():
    leaf = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    target = torch.tensor([1, 2, 3, 0], device=DEVICE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tilewise.cross_entropy(leaf.tanh(), target, inplace_backward=True).backward()
    loss = tilewise.cross_entropy(leaf * 2, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 2
    loss = tilewise.cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward cannot be differentiated twice"):
        torch.autograd.grad(loss, logits, create_graph=True)
    for shared in (
        leaf[:1].expand(4, 6),
        leaf[:1, :1].expand(4, 1),
        leaf[:, :1].expand(4, 6),
        leaf.as_strided((4, 6), (2, 1)),
    ):
        with pytest.raises(ValueError, match="elements do not share memory"):
            tilewise.cross_entropy(shared, target * 0, inplace_backward=True)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
def test_inplace_backward_compiles():
    leaf = torch.randn(8, 12, device=DEVICE, requires_grad=True)
    target = class_targets(8, 12, device=DEVICE)

    def step(leaf):
        return tilewise.cross_entropy(leaf * 2, target, inplace_backward=True)

    (expected,) = torch.autograd.grad(step(leaf), leaf)
    (gradient,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(leaf), leaf)
    torch.testing.assert_close(gradient, expected)
