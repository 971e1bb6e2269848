"""What the losses of rows share: the type of statistics, kept rows, the reduction."""

import torch
from torch import Tensor


def statistics_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def split_target(target: Tensor, classes: int, ignore_index: int, op: str) -> tuple[Tensor, Tensor, Tensor]:
    """Class indices safe to gather with, which rows are ignored, which are out of range (an error on the CPU)."""
    ignored = target == ignore_index
    outside = ((target < 0) | (target >= classes)) & ~ignored
    if not target.is_cuda and outside.any():
        i = int(outside.nonzero()[0])
        raise RuntimeError(
            f"tilewise.{op}: expected target[{i}] in [0, {classes}) or ignore_index ({ignore_index}), "
            f"got {int(target[i])}"
        )
    return target.masked_fill(ignored | outside, 0), ignored, outside


def reduce_rows(loss_rows: Tensor, share_rows: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The reduced loss and its denominator; an empty denominator gives 0."""
    total = share_rows.sum()
    if reduction == "none":
        return loss_rows, total
    loss = loss_rows.sum()
    if reduction == "sum":
        return loss, total
    return torch.where(total == 0, loss * 0, loss / total.masked_fill(total == 0, 1)), total


def pack_state(row_state: Tensor, total: Tensor) -> Tensor:
    """What a forward leaves for its backward: numbers of every row, line by line, and then the denominator."""
    return torch.cat([row_state.flatten(), total[None]])


def unpack_state(state: Tensor, per_row: int) -> tuple[Tensor, Tensor]:
    """(row_state (per_row, N), total ())."""
    return state[:-1].view(per_row, -1), state[-1]
