"""Pairwise losses from the whole matrix of similarities, in plain PyTorch; see csrc/library.h for the signatures.

Each loss maps z (N, M) and the masks of positive and negative pairs to the loss of every row, which rows have the pairs
that their loss needs (the others count 0), and dL/dz.
"""

import math

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype


def _least(z: Tensor, mask: Tensor) -> Tensor:
    return _with(z.masked_fill(~mask, math.inf), math.inf).amin(1, keepdim=True)


def _most(z: Tensor, mask: Tensor) -> Tensor:
    return _with(z.masked_fill(~mask, -math.inf), -math.inf).amax(1, keepdim=True)


def _with(z: Tensor, value: float) -> Tensor:
    """z with one more column, so that a reduction over no columns is `value`."""
    return torch.cat([z, z.new_full((len(z), 1), value)], 1)


def _lse(x: Tensor, mask: Tensor) -> Tensor:
    """(N, 1) logsumexp over the masked columns, 0 where there are none."""
    found = torch.logsumexp(_with(x.masked_fill(~mask, -math.inf), -math.inf), 1, keepdim=True)
    return torch.where(mask.any(1, keepdim=True), found, 0)


def _exp(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, torch.exp(x), 0)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1)


def _share(mask: Tensor, z: Tensor) -> Tensor:
    return mask.to(z.dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # F.softplus is linear above 20


def softmax(z, positive, negative):
    top = _most(z, positive | negative)
    pulled, pushed = (_exp(z - top, mask).sum(1, keepdim=True) for mask in (positive, negative))
    loss = torch.log1p((pulled - 1) + pushed)[:, 0] - _mean(z - top, positive)
    # p - 1 / #P with the two sums apart: 0 - pushed of one positive
    count = positive.sum(1, keepdim=True)
    e = _exp(z - top, positive | negative)
    weights = torch.where(positive, ((count * e - pulled) - pushed) / count, e) / (pulled + pushed)
    return loss, positive.any(1), weights


def decoupled_softmax(z, positive, negative):
    lse = _lse(z, negative)
    some = negative.any(1, keepdim=True)
    loss = torch.where(some[:, 0], _mean(_softplus(lse - z), positive), 0)
    pull = torch.where(some, _share(positive, z) * torch.sigmoid(lse - z), 0)
    return loss, positive.any(1), pull.sum(1, keepdim=True) * _exp(z - lse, negative) - pull


def sigmoid(z, positive, negative):
    sign = negative.to(z.dtype) - positive.to(z.dtype)
    loss = torch.where(positive | negative, _softplus(sign * z), 0).sum(1)
    return loss, _every_row(z), sign * torch.sigmoid(sign * z)


def multi_similarity(z, positive, negative, alpha, beta, base, epsilon):
    if epsilon == math.inf:
        active = positive.any(1) | negative.any(1)
    else:
        both = (positive.any(1) & negative.any(1))[:, None]
        least, most = _least(z, positive), _most(z, negative)
        positive = positive & both & (z - epsilon < most)
        negative = negative & both & (z + epsilon > least)
        active = positive.any(1) & negative.any(1)

    def one_plus(x, mask):
        lse = torch.where(mask.any(1, keepdim=True), _lse(x, mask), -math.inf)
        return torch.logaddexp(lse, torch.zeros_like(lse))

    pull, push = -alpha * (z - base), beta * (z - base)
    pulled, pushed = one_plus(pull, positive), one_plus(push, negative)
    loss = pulled / alpha + pushed / beta
    return loss[:, 0], active, _exp(push - pushed, negative) - _exp(pull - pulled, positive)


def binomial_deviance(z, positive, negative, alpha, beta, base):
    pull, push = -alpha * (z - base), beta * (z - base)
    loss = _mean(_softplus(pull), positive) + _mean(_softplus(push), negative)
    weights = beta * _share(negative, z) * torch.sigmoid(push) - alpha * _share(positive, z) * torch.sigmoid(pull)
    return loss, positive.any(1) | negative.any(1), weights


def lifted_structure(z, positive, negative, positive_margin, negative_margin):
    pull, push = positive_margin - z, z - negative_margin
    pulled, pushed = _lse(pull, positive), _lse(push, negative)
    loss = torch.relu(pulled + pushed)
    weights = (loss > 0) * (_exp(push - pushed, negative) - _exp(pull - pulled, positive))
    return loss[:, 0], positive.any(1) & negative.any(1), weights


def contrastive(z, positive, negative, positive_margin, negative_margin):
    pull, push = positive_margin - z, z - negative_margin
    loss = _mean(torch.relu(pull), positive) + _mean(torch.relu(push), negative)
    return loss, positive.any(1) | negative.any(1), _share(negative, z) * (push > 0) - _share(positive, z) * (pull > 0)


def triplet(z, positive, negative, margin):
    least, most = _least(z, positive), _most(z, negative)
    loss = torch.relu(most - least + margin)
    weights = (loss > 0) * (_first(negative & (z == most)).to(z.dtype) - _first(positive & (z == least)).to(z.dtype))
    return loss[:, 0], positive.any(1) & negative.any(1), weights


def circle(z, positive, negative, margin, gamma):
    x_p = gamma * torch.relu(1 + margin - z) * (1 - margin - z)
    x_n = gamma * torch.relu(margin + z) * (z - margin)
    pulled, pushed = _lse(x_p, positive), _lse(x_n, negative)
    pull = gamma * torch.relu(1 + margin - z) * _exp(x_p - pulled, positive)
    push = gamma * torch.relu(margin + z) * _exp(x_n - pushed, negative)
    weights = torch.sigmoid(pulled + pushed) * (push - pull)
    return _softplus(pulled + pushed)[:, 0], positive.any(1) & negative.any(1), weights


def log_sum_exp(z, positive, negative):
    pairs = positive | negative
    lse = torch.where(pairs.any(1, keepdim=True), _lse(z, pairs), -math.inf)
    return lse[:, 0], _every_row(z), _exp(z - lse, pairs)


def positive_sum(z, positive, negative):
    return torch.where(positive, z, 0).sum(1), _every_row(z), positive.to(z.dtype)


def least_positive(z, positive, negative):
    least = _least(z, positive)
    return least[:, 0], _every_row(z), _first(positive & (z == least)).to(z.dtype)


def most_negative(z, positive, negative):
    most = _most(z, negative)
    return most[:, 0], _every_row(z), _first(negative & (z == most)).to(z.dtype)


def window_log_sum_exp(z, positive, negative, slope, limit, side):
    kept = positive & (z < limit) if side > 0 else negative & (z > -limit)
    lse, _, weights = log_sum_exp(slope * z, kept, torch.zeros_like(kept))
    return lse, _every_row(z), slope * weights


def _every_row(z: Tensor) -> Tensor:
    return torch.ones(len(z), dtype=torch.bool, device=z.device)


def _first(mask: Tensor) -> Tensor:
    """The first of the masked columns alone."""
    return mask & (mask.cumsum(1) == 1)


LOSSES = (
    softmax, decoupled_softmax, sigmoid, multi_similarity, binomial_deviance, lifted_structure, contrastive, triplet
) + (circle,)  # fmt: skip
SHARES = (log_sum_exp, positive_sum, least_positive, most_negative, window_log_sum_exp)
FORMULAS = {function.__name__: function for function in LOSSES + SHARES}


def relations(
    x_labels: Tensor,
    y_labels: Tensor,
    self_offset: int | None = None,
    guide: Tensor | None = None,
    guide_margin: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The masks (N, M) of positive and of negative pairs."""
    positive = x_labels[:, None] == y_labels
    negative = ~positive
    if self_offset is not None:
        own = torch.arange(len(x_labels), device=x_labels.device)[:, None] + self_offset
        other = torch.arange(len(y_labels), device=x_labels.device) != own
        positive, negative = positive & other, negative & other
    if guide is not None and guide.shape[1] > 0:
        of_positive = guide.gather(1, positive.int().argmax(1, keepdim=True))
        negative = negative & ~(positive.any(1, keepdim=True) & (guide > of_positive - guide_margin))
    return positive, negative


def row_losses(z, positive, negative, loss: str, parameters=()) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) losses, which rows have one, and (N, M) dL/dz."""
    if loss not in FORMULAS:
        raise ValueError(f"tilewise.pairwise_loss: expected loss to be the name of a loss, got {loss!r}")
    found, active, weights = FORMULAS[loss](z, positive, negative, *parameters)
    return torch.where(active, found, 0), active, torch.where(active[:, None], weights, 0)


def _product(a, b):
    """In the type of statistics, whatever autocast says."""
    wide = statistics_dtype(a)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(wide) @ b.to(wide)


def _similarities(x, y, scale, bias):
    z = scale * _product(x, y.t())
    return z if bias is None else z + bias


def _masks(x_labels, y_labels, guide_x, guide_y, self_offset, guide_margin):
    guide = None
    if guide_x is not None:
        guide = _product(guide_x, guide_y.t())
    return relations(x_labels, y_labels, self_offset, guide, guide_margin)


def _gradients(g, x, y, wanted):
    """G y, G^T x and the row sums of G, where they are wanted; the sums with any."""
    found = (lambda: _product(g, y).to(x.dtype), lambda: _product(g.t(), x).to(y.dtype), lambda: g.sum(1))
    wanted = (*wanted[:2], any(wanted))
    return tuple(f() if wish else e for f, wish, e in zip(found, wanted, _empty(x, y, g), strict=True))


def _empty(x, y, g):
    return x.new_empty(0), y.new_empty(0), g.new_empty(0)


def _forward(
    x,
    y,
    x_labels,
    y_labels,
    scale,
    bias=None,
    guide_x=None,
    guide_y=None,
    *,
    loss,
    parameters,
    self_offset=None,
    guide_margin=0.0,
    reduction="mean",
    chunk_bytes=0,
    form_x_grad=False,
    form_y_grad=False,
    form_bias_grad=False,
):
    z = _similarities(x, y, scale, bias)
    masks = _masks(x_labels, y_labels, guide_x, guide_y, self_offset, guide_margin)
    rows, active, weights = row_losses(z, *masks, loss, parameters)
    total = active.sum().to(z.dtype)
    divisor = {"mean": max(1, len(x)), "mean_active": total.clamp(min=1)}.get(reduction, 1)
    value = rows if reduction == "none" else rows.sum() / divisor
    formed = reduction != "none" and x.dtype != torch.float16
    wanted = [formed and wish for wish in (form_x_grad, form_y_grad, form_bias_grad)]
    return value, total, *_gradients(weights, x, y, wanted)


def _backward(
    grad_loss,
    x,
    y,
    x_labels,
    y_labels,
    scale,
    bias,
    guide_x,
    guide_y,
    total,
    *,
    loss,
    parameters,
    self_offset,
    guide_margin,
    reduction,
    chunk_bytes,
    x_grad,
    y_grad,
    bias_grad,
):
    z = _similarities(x, y, scale, bias)
    masks = _masks(x_labels, y_labels, guide_x, guide_y, self_offset, guide_margin)
    divisor = {"mean": max(1, len(x)), "mean_active": total.clamp(min=1)}.get(reduction, 1)
    upstream = (grad_loss / divisor).expand(len(x))[:, None]
    weights = row_losses(z, *masks, loss, parameters)[2]
    return _gradients(upstream * weights, x, y, (x_grad, y_grad, bias_grad))


OPS = {"pairwise_loss": _forward, "pairwise_loss_backward": _backward}
