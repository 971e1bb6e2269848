"""Pairwise losses from the whole matrix of similarities, in plain PyTorch; see csrc/library.cpp for the signatures.

Each loss maps z (N, M) and the masks of positive and negative pairs to the loss of every row and to which rows have the
pairs that their loss needs. PyTorch differentiates it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.reference.rows import statistics_dtype


def _least(z: Tensor, mask: Tensor) -> Tensor:
    return _or(z.masked_fill(~mask, math.inf), math.inf).amin(1, keepdim=True)


def _most(z: Tensor, mask: Tensor) -> Tensor:
    return _or(z.masked_fill(~mask, -math.inf), -math.inf).amax(1, keepdim=True)


def _or(z: Tensor, empty: float) -> Tensor:
    """z with one more column, so that a reduction over no columns is `empty`."""
    return torch.cat([z, z.new_full((len(z), 1), empty)], 1)


def _lse(x: Tensor, mask: Tensor) -> Tensor:
    """logsumexp over the masked columns; rows without any give 0 and no gradient."""
    found = torch.logsumexp(_or(x.masked_fill(~mask, -math.inf), -math.inf), 1)
    return torch.where(mask.any(1), found, 0)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1)


def softmax(z, positive, negative):
    return _lse(z, positive | negative) - _mean(z, positive), positive.any(1)


def decoupled_softmax(z, positive, negative):
    lse = _lse(z, negative)[:, None]
    return torch.where(negative.any(1), _mean(F.softplus(lse - z), positive), 0), positive.any(1)


def sigmoid(z, positive, negative):
    loss = torch.where(positive | negative, F.softplus(torch.where(positive, -z, z)), 0).sum(1)
    return loss, torch.ones_like(positive[:, :1].any(1))


def multi_similarity(z, positive, negative, alpha, beta, base, epsilon):
    both = positive.any(1) & negative.any(1)
    if epsilon == math.inf:
        active = positive.any(1) | negative.any(1)
    else:
        with torch.no_grad():
            least, most = _least(z, positive), _most(z, negative)
            positive = positive & both[:, None] & (z - epsilon < most)
            negative = negative & both[:, None] & (z + epsilon > least)
        active = positive.any(1) & negative.any(1)
    zero = torch.zeros_like(z[:, :1].sum(1))

    def one_plus(x, mask):
        return torch.logaddexp(torch.where(mask.any(1), _lse(x, mask), -math.inf), zero)

    return one_plus(-alpha * (z - base), positive) / alpha + one_plus(beta * (z - base), negative) / beta, active


def binomial_deviance(z, positive, negative, alpha, beta, base):
    loss = _mean(F.softplus(-alpha * (z - base)), positive) + _mean(F.softplus(beta * (z - base)), negative)
    return loss, positive.any(1) | negative.any(1)


def lifted_structure(z, positive, negative, positive_margin, negative_margin):
    both = positive.any(1) & negative.any(1)
    return F.relu(_lse(positive_margin - z, positive) + _lse(z - negative_margin, negative)), both


def contrastive(z, positive, negative, positive_margin, negative_margin):
    loss = _mean(F.relu(positive_margin - z), positive) + _mean(F.relu(z - negative_margin), negative)
    return loss, positive.any(1) | negative.any(1)


def triplet(z, positive, negative, margin):
    both = positive.any(1) & negative.any(1)
    if z.shape[1] == 0:
        return z.sum(1), both
    hardest_positive = (z == _least(z, positive)).logical_and(positive).int().argmax(1, keepdim=True)  # the first
    hardest_negative = (z == _most(z, negative)).logical_and(negative).int().argmax(1, keepdim=True)
    return F.relu(z.gather(1, hardest_negative) - z.gather(1, hardest_positive) + margin)[:, 0], both


LOSSES = {
    function.__name__: function
    for function in (
        softmax,
        decoupled_softmax,
        sigmoid,
        multi_similarity,
        binomial_deviance,
        lifted_structure,
        contrastive,
        triplet,
    )
}


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


def row_losses(z, positive, negative, loss: str, parameters=()) -> tuple[Tensor, Tensor]:
    """(N,) losses, 0 for the rows without the pairs that the loss needs, and which rows those are not."""
    found, active = LOSSES[loss](z, positive, negative, *parameters)
    return torch.where(active, found, 0), active


def _similarities(x, y, scale, bias):
    wide = statistics_dtype(x)
    z = scale * (x.to(wide) @ y.to(wide).t())
    return z if bias is None else z + bias


def _masks(x_labels, y_labels, guide_x, guide_y, self_offset, guide_margin):
    guide = None
    if guide_x is not None:
        wide = statistics_dtype(guide_x)
        guide = guide_x.to(wide) @ guide_y.to(wide).t()
    return relations(x_labels, y_labels, self_offset, guide, guide_margin)


def _gradients(upstream, z, masks, loss, parameters, x, y, wanted):
    empty = x.new_empty(0), y.new_empty(0), z.new_empty(0)
    if not any(wanted):
        return empty
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        rows, _ = row_losses(z, *masks, loss, parameters)
        (g,) = torch.autograd.grad(rows, z, upstream.expand_as(rows))
    found = (g @ y.to(g.dtype)).to(x.dtype), (g.t() @ x.to(g.dtype)).to(y.dtype), g.sum(1)
    return tuple(f if wish else e for f, e, wish in zip(found, empty, (*wanted[:2], True), strict=True))


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
    rows, active = row_losses(z, *masks, loss, parameters)
    total = active.sum().to(z.dtype)
    divisor = {"mean": max(1, len(x)), "mean_active": total.clamp(min=1)}.get(reduction, 1)
    value = rows if reduction == "none" else rows.sum() / divisor
    formed = reduction != "none" and x.dtype == z.dtype
    wanted = [formed and wish for wish in (form_x_grad, form_y_grad, form_bias_grad)]
    return value, total, *_gradients(torch.ones_like(total), z, masks, loss, parameters, x, y, wanted)


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
    return _gradients(grad_loss / divisor, z, masks, loss, parameters, x, y, (x_grad, y_grad, bias_grad))


OPS = {"pairwise_loss": _forward, "pairwise_loss_backward": _backward}
