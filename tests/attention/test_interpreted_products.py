"""In the interpreter a product in tf32 has operands of 10 bits, as on a device: what claims a precision is tested."""

import contract
import pytest
import torch

pytestmark = pytest.mark.skipif(not contract.INTERPRETED, reason="of Triton's interpreter")


def product(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
        place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        found = tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place), input_precision=PRECISION)
        tl.store(out_ptr + place, found)

    out = torch.empty_like(a)
    kernel[(1,)](a, b, out, SIZE=len(a), PRECISION=precision)
    return out


def test_tf32_keeps_ten_bits():
    fine = torch.full((16, 16), 1 + 2.0**-10 + 2.0**-11)  # the last bit is the eleventh
    identity = torch.eye(16)
    assert torch.equal(product(fine, identity, "tf32"), torch.full((16, 16), 1 + 2.0**-10))
    assert torch.equal(product(identity, -fine, "tf32"), torch.full((16, 16), -1 - 2.0**-10))
    assert torch.equal(product(fine, identity, "ieee"), fine)


def test_numbers_of_ten_bits_stay():
    halves = torch.randn(16, 16).half().float()
    assert torch.equal(product(halves, torch.eye(16), "tf32"), halves)
