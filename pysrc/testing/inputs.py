"""Inputs that random logits never reach: confident rows, masked classes, ignored targets."""

import torch
from torch import Tensor


def class_targets(rows: int, classes: int, *, ignored: float = 0.0, ignore_index: int = -100, device="cpu") -> Tensor:
    """(rows,) int64 class indices, about the share `ignored` of them equal to ignore_index."""
    target = torch.randint(0, classes, (rows,), device=device)
    return torch.where(torch.rand(rows, device=device) < ignored, ignore_index, target)


def confident_logits(target: Tensor, classes: int, dtype: torch.dtype, *, margin: float = 16.0) -> Tensor:
    """Random logits whose target stands `margin` above: the probability of the target is within 1e-3 of 1.

    Here p - 1 cancels: a kernel that rounds p to 16 bits before it subtracts loses the whole gradient.
    """
    logits = torch.randn(len(target), classes, device=target.device)
    index = target.clamp(0, classes - 1)[:, None]
    return logits.scatter_add(1, index, torch.full_like(logits[:, :1], margin)).to(dtype)


def masked_logits(target: Tensor, classes: int, dtype: torch.dtype, *, share: float = 0.3) -> Tensor:
    """Random logits with about the share `share` of the classes at -inf, the target's never."""
    logits = 3 * torch.randn(len(target), classes, device=target.device)
    mask = torch.rand_like(logits) < share
    mask.scatter_(1, target.clamp(0, classes - 1)[:, None], False)
    return logits.masked_fill(mask, -torch.inf).to(dtype)
