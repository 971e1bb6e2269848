"""Who is tested, and what tests of rows of logits share. A module that imports `contract` is part of the contract:
what every operator keeps on every backend. TILEWISE_BACKEND chooses who is tested:

    unset            the C++ kernels, CPU tensors
    triton           Triton: CUDA tensors, or CPU tensors when TRITON_INTERPRET=1
    cuda             the CUDA library, CUDA tensors
    reference        the plain PyTorch reference, CPU tensors
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewise.testing import assert_accurate, confident_logits, masked_logits

BACKEND = os.environ.get("TILEWISE_BACKEND", "cpu")
INTERPRETED = BACKEND == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if BACKEND in ("cuda", "triton") and not INTERPRETED else "cpu"
NATIVE_CPU = DEVICE == "cpu" and not INTERPRETED

# Rows of one tile, of several, and of several with a remainder, whatever the backend's tile. The interpreter runs one
# program after another in Python: it is spared the largest.
SHAPES = [(7, 5), (1, 33), (5, 1030), (3, 20011)] + ([] if INTERPRETED else [(64, 50257)])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """Keyword options of one call; tensors are built for the shape by `options`."""

    name: str
    options: Callable[[int, int], dict] = lambda n, v: {}
    soft: bool = False  # probability targets


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator over rows of logits.

    call(logits, target, **options): the public function under test.
    reference(...): the same from the formula, for float64.
    eager(...): what a user would write today, in the type of the logits.
    """

    name: str
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    cases: Sequence[Case]
    state_per_row: int  # numbers kept for the backward, per row
    required: dict = field(default_factory=dict)  # options without a default
    polynomial: bool = False  # a function of the row's sum and sum of squares, so not finite for -inf

    def __call__(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        return self.call(logits, target, **{**self.required, **options})


def to(device_or_dtype, options: dict) -> dict:
    """Options with their floating tensors moved or cast."""
    return {k: v.to(device_or_dtype) if isinstance(v, Tensor) else v for k, v in options.items()}


def soft_targets(n: int, v: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.softmax(2 * torch.randn(n, v), 1).to(dtype)


def logits_of(kind: str, target: Tensor, v: int, dtype: torch.dtype) -> Tensor:
    if kind == "confident":
        return confident_logits(target, v, dtype)
    if kind == "masked":
        return masked_logits(target, v, dtype)
    columns = torch.arange(v)
    base = {
        "random": 3 * torch.randn(len(target), v),
        "huge": 1e4 * torch.randn(len(target), v),
        "rising": torch.randn(len(target), v) + 60 * columns / v,  # every tile has a higher maximum
        "jump": torch.randn(len(target), v) + 200 * (columns > v - 20),  # e^200 overflows float32
    }
    return base[kind].to(dtype)


def value_and_gradient(function, logits: Tensor, target: Tensor, grad: Tensor | None = None, **options):
    """The loss and its gradient in the logits, on the CPU."""
    logits = logits.detach().requires_grad_()
    loss = function(logits, target, **options)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss) if grad is None else grad.to(loss))
    return loss.detach().cpu(), gradient.cpu()


def check_against_reference(op: Operator, logits: Tensor, target: Tensor, options: dict) -> None:
    """Loss and gradient against float64, judged by what the eager composition achieves in the same type."""
    dtype = logits.dtype
    ours = value_and_gradient(op.call, logits.to(DEVICE), target.to(DEVICE), **to(DEVICE, options))
    wide = target.double() if target.is_floating_point() else target
    truth = value_and_gradient(op.reference, logits.double(), wide, **to(torch.float64, options))
    narrow = target.to(dtype) if target.is_floating_point() else target
    eager = value_and_gradient(op.eager, logits, narrow, **to(dtype, options))
    assert_accurate(ours[0], truth[0], eager[0], ours[0].dtype, "loss")
    # Triton's interpreter truncates to bfloat16 where the device rounds: once more the rounding error.
    slack = torch.finfo(dtype).eps / 2 if INTERPRETED and dtype == torch.bfloat16 else 0.0
    assert_accurate(ours[1], truth[1], eager[1], dtype, "gradient", slack=slack)


def check_more_than_2_31_elements(call: Callable[..., Tensor]) -> None:
    """The last row of a matrix of zero pages (4.3 GB, never written) is found beyond 2^31 elements."""
    n, v = 2**16 + 1, 2**15
    logits = torch.zeros(n, v, dtype=torch.bfloat16)
    logits[-1, -1] = 2.0
    target = torch.zeros(n, dtype=torch.int64)
    target[-1] = v - 1
    rows = call(logits, target, reduction="none")
    expected = call(logits[-1:].clone(), target[-1:], reduction="none")
    assert torch.equal(rows[-1:], expected) and rows[-1] != rows[-2]
