"""The gradient of cross entropy in PyTorch operations, for its own derivative: it holds (N, V) tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype


def logits_gradient(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    *_,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float | None,
    logit_scale: float,
    reduction: str,
) -> Tensor:
    """With x the scaled and capped logits, p = softmax(x), H the entropy and g the gradient of a row's loss

    dx_k = p_k (g (sum c + 2 lse_square_scale lse) + g_lse - g_H (log p_k + H)) - g c_k
    """
    x = logits.to(statistics_dtype(logits)) * logit_scale
    if grad_lse is None and grad_entropy is None:  # ignored rows may hold anything
        x = x.masked_fill(_ignored(target, ignore_index)[:, None], 0)
    slope = x.new_full((), logit_scale)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
        slope = slope * (1 - (x / softcap).square())
    coefficients, counted = _target_coefficients(x, target, weight, label_smoothing, ignore_index)
    log_p, lse = torch.log_softmax(x, 1), torch.logsumexp(x, 1)
    p = log_p.exp()
    dx = torch.zeros_like(x)
    if grad_loss is not None:
        g = grad_loss.expand(len(x))
        g = g if row_weight is None else g * row_weight
        if reduction == "mean":
            g = g / counted.sum().masked_fill(counted.sum() == 0, 1)
        g = g.masked_fill(_ignored(target, ignore_index), 0)[:, None]
        of_lse = coefficients.sum(1) + 2 * lse_square_scale * lse
        dx = g * (p * of_lse[:, None] - coefficients)
    if grad_lse is not None:
        dx = dx + grad_lse[:, None] * p
    if grad_entropy is not None:
        surprise = p * log_p.masked_fill(p == 0, 0)
        dx = dx - grad_entropy[:, None] * (surprise - p * surprise.sum(1, keepdim=True))
    return (dx * slope).to(logits.dtype)


def _ignored(target: Tensor, ignore_index: int) -> Tensor:
    """(N,), which rows do not count; rows of probabilities all do."""
    return torch.zeros_like(target[:, 0], dtype=torch.bool) if target.dim() == 2 else target == ignore_index


def _target_coefficients(
    x: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """c (N, V), and what each row adds to the mean's denominator."""
    classes = x.shape[1]
    w = x.new_ones(classes) if weight is None else weight
    uniform = label_smoothing / classes
    if target.dim() == 2:
        return w * ((1 - label_smoothing) * target.to(x.dtype) + uniform), x.new_ones(len(x))
    ignored = _ignored(target, ignore_index)
    index = target.masked_fill(ignored, 0).clamp(0, classes - 1)
    one_hot = F.one_hot(index, classes).to(x.dtype)
    return w * ((1 - label_smoothing) * one_hot + uniform), w[index].masked_fill(ignored, 0)


def layer_gradients(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *_,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    chunk_bytes: int,
    **options,
) -> tuple[Tensor | None, ...]:
    """Of the linear layer that the logits come from; the wanted ones."""
    logits = F.linear(input, linear_weight, linear_bias)
    g = logits_gradient(grad_loss, None, None, logits, target, weight, None, logit_scale=1.0, **options)
    return (
        g @ linear_weight if input_grad else None,
        g.t() @ input if weight_grad else None,
        g.sum(0) if bias_grad and linear_bias is not None else None,
    )
