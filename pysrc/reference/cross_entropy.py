"""Cross entropy from its formula, differentiable any number of times."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.formulas.rows import pack_state, reduce_rows, split_target, statistics_dtype, unpack_state


class Result(NamedTuple):
    """loss (N,) or (); lse, entropy, argmax (N,); state: max, log sum exp(x - max), sum of c of each row, and total."""

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    state: Tensor


def effective_logits(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """x = softcap tanh(logit_scale logits / softcap), in the type of statistics."""
    x = logits.to(statistics_dtype(logits)) * logit_scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def coefficients(
    x: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, ...]:
    """c (N, V); what each row adds to the denominator of the mean; which rows are ignored; which are out of range."""
    classes = x.shape[1]
    w = x.new_ones(classes) if weight is None else weight.to(x.dtype)
    uniform = label_smoothing / classes
    if target.is_floating_point():
        nowhere = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return w * ((1 - label_smoothing) * target.to(x.dtype) + uniform), x.new_ones(len(x)), nowhere, nowhere
    index, ignored, outside = split_target(target, classes, ignore_index, "cross_entropy")
    one_hot = torch.nn.functional.one_hot(index, classes).to(x.dtype)
    return (
        w * ((1 - label_smoothing) * one_hot + uniform),
        w[index].masked_fill(outside, 1).masked_fill(ignored, 0),
        ignored,
        outside,
    )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    return_stats: bool = True,
) -> Result:
    """loss_n = row_weight_n (sum_k c_k (lse - x_k) + lse_square_scale lse^2), x the scaled and capped logits.

    c_k = (1 - eps) w_y 1[k = y] + eps / V w_k for class indices, w_k ((1 - eps) t_k + eps / V) for probabilities.
    """
    x = effective_logits(logits, logit_scale, softcap)
    c, shares, ignored, outside = coefficients(x, target, weight, label_smoothing, ignore_index)
    if not return_stats:
        x = x.masked_fill(ignored[:, None], 0)
    log_p = torch.log_softmax(x, 1)
    lse = torch.logsumexp(x, 1)
    top, argmax = x.detach().max(1)
    log_sum = torch.logsumexp(x.detach() - top[:, None], 1)
    rows = -torch.where(c == 0, 0, c * log_p).sum(1) + lse_square_scale * lse**2
    rows = rows.masked_fill(outside, torch.nan)
    rows = torch.where(ignored, 0, rows if row_weight is None else rows * row_weight)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(1)
    loss, total = reduce_rows(rows, shares, reduction)
    mass = c.sum(1).masked_fill(ignored, 0).masked_fill(outside, torch.nan)
    return Result(loss, lse, entropy, argmax, pack_state(torch.stack([top, log_sum, mass]), total).detach())


def gradient(grads: tuple[Tensor | None, ...], logits: Tensor, *tensors, **options) -> Tensor:
    """d(sum of grads x (loss, lse, entropy)) / d logits; differentiable when gradients are recorded."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        if not (differentiable and logits.requires_grad):
            logits = logits.detach().requires_grad_()
        result = cross_entropy(logits, *tensors, **options)
        outputs = [output for output, grad in zip(result, grads, strict=False) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
        return torch.autograd.grad(outputs, logits, grads, create_graph=differentiable)[0]


def _forward(*tensors, inplace_backward=False, **options) -> tuple[Tensor, Tensor]:
    result = cross_entropy(*tensors, **options, return_stats=False)
    return result.loss, result.state


def _forward_with_stats(*tensors, inplace_backward=False, **options) -> tuple[Tensor, ...]:
    loss, *stats, state = cross_entropy(*tensors, **options)
    return loss, state, *stats


# Runs below autograd, hence from the formula:
#   dx_k = p_k (g (W + 2 lam lse) + g_lse - g_H H - g_H d_k) - g c_k,   d_k = log p_k,   g = gradient of the row's loss
def _backward(
    grad_loss,
    grad_lse,
    grad_entropy,
    logits,
    target,
    weight,
    row_weight,
    entropy,
    state,
    *,
    ignore_index,
    label_smoothing,
    lse_square_scale,
    softcap,
    logit_scale,
    reduction,
) -> Tensor:
    (row_max, log_sum, mass), total = unpack_state(state, 3)
    x = effective_logits(logits, logit_scale, softcap)
    slope = logit_scale * (1 if softcap is None else 1 - (x / softcap).square())
    c, _, ignored, _ = coefficients(x, target, weight, label_smoothing, ignore_index)
    g = x.new_zeros(len(x)) if grad_loss is None else grad_loss.expand(len(x))
    g = g if row_weight is None else g * row_weight
    if reduction == "mean":
        g = torch.where(total == 0, 0, g / total)
    g = g.masked_fill(ignored, 0)
    a = g * (mass + 2 * lse_square_scale * (row_max + log_sum))
    a = a if grad_lse is None else a + grad_lse
    log_p = (x - row_max[:, None]) - log_sum[:, None]
    p = log_p.exp()
    dx = p * a[:, None] - g[:, None] * c
    untouched = g == 0
    if grad_lse is not None:
        untouched = untouched & (grad_lse == 0)
    if grad_entropy is not None:
        dx = dx - (grad_entropy * entropy)[:, None] * p - grad_entropy[:, None] * torch.where(p == 0, 0, p * log_p)
        untouched = untouched & (grad_entropy == 0)
    return (dx * slope).masked_fill(untouched[:, None], 0).to(logits.dtype)


def _backward_(grad_loss, grad_lse, grad_entropy, logits, *tensors, **options) -> None:
    logits.copy_(_backward(grad_loss, grad_lse, grad_entropy, logits, *tensors, **options))


OPS = {
    "cross_entropy": _forward,
    "cross_entropy_with_stats": _forward_with_stats,
    "cross_entropy_backward": _backward,
    "cross_entropy_backward_": _backward_,
}
