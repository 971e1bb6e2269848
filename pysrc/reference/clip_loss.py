"""clip_loss from the whole matrix of similarities, in plain PyTorch; see csrc/library.h for the signatures.

The state is that of csrc/clip_loss/clip_loss.h: of every row and of every column the maximum of z and
1 / (2 sum e^(z - max)), then the mean of 1 - p_ii over both, then the number of rows.
"""

import torch
from torch import Tensor

from tilewise.formulas.rows import reduce_rows, statistics_dtype


def _scores(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    wide = statistics_dtype(image)
    return image.to(wide) @ text.to(wide).t() * logit_scale


def _side(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows: maximum, weight, loss and 1 - p_ii."""
    positive, none = z.diagonal(), z.new_full((len(z), 1), -torch.inf)
    others = torch.cat([torch.where(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf, z), none], 1)
    gap = torch.logsumexp(others, 1) - positive
    top = torch.maximum(others.amax(1), positive)
    weight = 0.5 / torch.exp(z - top[:, None]).sum(1)
    return top, weight, torch.logaddexp(gap, torch.zeros_like(gap)), torch.sigmoid(gap)


def _forward(image, text, logit_scale, *, reduction="mean", chunk_bytes=0):
    z = _scores(image, text, logit_scale)
    *row, row_loss, row_share = _side(z)
    *column, column_loss, column_share = _side(z.t())
    loss, total = reduce_rows((row_loss + column_loss) / 2, torch.ones_like(row_loss), reduction)
    return loss, torch.cat([*row, *column, (row_share + column_share) / 2, total[None]])


def _backward(
    image, text, logit_scale, state, grad_loss=None, *, chunk_bytes=0, image_grad=True, text_grad=True
):  # fmt: skip
    z = _scores(image, text, logit_scale)
    row_max, row_weight, column_max, column_weight, share = state[:-1].view(5, -1)
    upstream = torch.ones_like(share) if grad_loss is None else grad_loss
    weights = torch.exp(z - row_max[:, None]) * (upstream * row_weight)[:, None]
    weights += torch.exp(z - column_max) * (upstream * column_weight)
    weights.diagonal().copy_(-upstream * share)
    d_image = (weights @ text.to(z.dtype)).to(image.dtype) if image_grad else image.new_empty(0)
    d_text = (weights.t() @ image.to(z.dtype)).to(text.dtype) if text_grad else text.new_empty(0)
    return d_image, d_text


OPS = {"clip_loss": _forward, "clip_loss_backward": _backward}
