"""What only a full GPU makes the Triton kernels do: several tiles of a row in one backward program."""

import contract
import pytest
import torch

import tilewise
from tilewise.testing import class_targets


@pytest.mark.skipif(contract.BACKEND != "triton", reason="concerns the Triton kernels: TILEWISE_BACKEND=triton")
def test_several_tiles_in_one_backward_program(monkeypatch):
    from tilewise.triton_kernels import rows

    logits = torch.randn(2, 40011, device=contract.DEVICE)
    target = class_targets(2, 40011, device=contract.DEVICE)

    def gradients():
        _, plain = contract.value_and_gradient(tilewise.cross_entropy, logits, target)
        _, spherical = contract.value_and_gradient(tilewise.z_loss, logits, target, a=1.0, b=0.0)
        return plain, spherical

    one_each = gradients()
    monkeypatch.setattr(rows, "FULL_GRID", 1)
    several = gradients()
    assert all(torch.equal(a, b) for a, b in zip(one_each, several, strict=True))
