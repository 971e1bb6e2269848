"""Gradients that a forward has formed beside a reduced loss, for the first backward to hand out."""

import torch
from torch import Tensor

from tilewise.ops import register


def forms_gradients(like: Tensor, reduction: str) -> bool:
    """Whether a forward forms the gradients of the summed loss, which the backward scales. Not those of rows that get
    an upstream each; nor in float16, where they come before a loss scale and would vanish: bfloat16 has the range of
    float32."""
    return reduction != "none" and like.dtype != torch.float16


def keep(ctx, like: Tensor, gradients: list[Tensor], asked: list[bool]) -> None:
    """Those asked for, where any were formed. Not by save_for_backward: the backward writes to them."""
    formed = forms_gradients(like, ctx.options["reduction"])
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
    factor = factor.reshape(1)  # a factor of no dimension would be rounded to the gradient's type before
    if type(gradient) is Tensor and not torch.is_grad_enabled() and not register.transforms_active():
        return torch.mul(gradient, factor, out=gradient)
    return (gradient * factor).to(gradient.dtype)
