"""The spherical family of a linear layer in its dense form: F.linear, then the loss of the logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.formulas.rows import pack_state, statistics_dtype, unpack_state
from tilewise.reference import z_loss as rows


def _logits(hidden, weight, bias) -> Tensor:
    dtype = statistics_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def linear_z_loss(hidden, weight, target, *, bias=None, a, b, ignore_index=-100, reduction="mean") -> Tensor:
    """z_loss of hidden @ weight.T + bias."""
    logits = _logits(hidden, weight, bias)
    return rows.z_loss(logits, target, a=a, b=b, ignore_index=ignore_index, reduction=reduction)


def linear_taylor_softmax_loss(hidden, weight, target, *, bias=None, ignore_index=-100, reduction="mean") -> Tensor:
    """taylor_softmax_loss of hidden @ weight.T + bias."""
    logits = _logits(hidden, weight, bias)
    return rows.taylor_softmax_loss(logits, target, ignore_index=ignore_index, reduction=reduction)


def linear_spherical_softmax_loss(
    hidden, weight, target, *, bias=None, eps=1e-6, ignore_index=-100, reduction="mean"
) -> Tensor:
    """spherical_softmax_loss of hidden @ weight.T + bias."""
    logits = _logits(hidden, weight, bias)
    return rows.spherical_softmax_loss(logits, target, eps=eps, ignore_index=ignore_index, reduction=reduction)


def _member(op):
    def forward(hidden, weight, target, bias, **options):
        loss, state = rows.OPS[op](_logits(hidden, weight, bias), target, **options)
        row_state, total = unpack_state(state, 4)
        # The logits are formed again in the backward: the mean row and the Gram matrix are not looked at.
        mean = loss.new_zeros(weight.shape[1])
        return loss, row_state[1:].clone(), loss.new_zeros(len(mean) + 1, len(mean)), mean, total.clone()

    return forward


def _backward(
    grad_loss, hidden, weight, target, bias, row_state, gram, mean, total, *,
    ignore_index, reduction, grad_hidden, grad_weight, grad_bias,
):  # fmt: skip
    ignored = (target == ignore_index)[:, None]
    hidden = hidden.masked_fill(ignored, 0)
    logits = _logits(hidden, weight, bias)
    state = pack_state(torch.cat([logits.mean(1)[None], row_state]), total)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    d_logits = rows.OPS["spherical_family_backward"](grad_loss, logits, target, state, **options)
    empty = logits.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        return (
            (d_logits @ weight.to(logits.dtype)).to(hidden.dtype) if grad_hidden else empty.to(hidden.dtype),
            (d_logits.t() @ hidden.to(logits.dtype)).to(weight.dtype) if grad_weight else empty.to(weight.dtype),
            d_logits.sum(0).to(bias.dtype) if grad_bias else empty,
        )


OPS = {
    "linear_z_loss": _member("z_loss"),
    "linear_taylor_softmax_loss": _member("taylor_softmax_loss"),
    "linear_spherical_softmax_loss": _member("spherical_softmax_loss"),
    "linear_spherical_backward": _backward,
}
