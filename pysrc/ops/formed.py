"""Gradients that a forward has formed beside a reduced loss, for the first backward to hand out."""

import torch
from torch import Tensor

from tilewise.ops import register


def keep(ctx, formed: bool, gradients: list[Tensor], asked: list[bool]) -> None:
    """Those asked for, where any were formed. Not by save_for_backward: the backward writes to them."""
    ctx.formed = [g if formed and wish else None for g, wish in zip(gradients, asked, strict=True)]


def take(ctx, wanted: list[bool]) -> list[Tensor | None] | None:
    """The gradients of the summed loss, once, for they are scaled in place; None where they must be computed."""
    formed, ctx.formed = ctx.formed, [None] * len(wanted)
    if torch.is_grad_enabled() or any(g is None and wish for g, wish in zip(formed, wanted, strict=True)):
        return None
    return formed


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """In place, but for tracers (whose tensors are subclasses) and transforms, which choose the place themselves, and
    where the product is recorded."""
    if type(gradient) is Tensor and not torch.is_grad_enabled() and not register.transforms_active():
        return gradient.mul_(factor)
    return (gradient * factor).to(gradient.dtype)
