"""The spherical family from its formulas: losses of the target logit, the row's sum and its sum of squares."""

import torch
from torch import Tensor

from tilewise.formulas.rows import pack_state, reduce_rows, split_target, statistics_dtype, unpack_state


def z_rows(o: Tensor, index: Tensor, a: float, b: float) -> Tensor:
    """softplus(a (b - z)) / a with z the standardised target logit; a constant row has z = 0 and no gradient."""
    centred = o - o.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    constant = variance == 0
    z = centred.gather(1, index[:, None])[:, 0] / variance.masked_fill(constant, 1).sqrt()
    z = torch.where(constant, 0, z)
    return torch.nn.functional.softplus(a * (b - z), threshold=1e9) / a


def taylor_rows(o: Tensor, index: Tensor) -> Tensor:
    """-log of the second-order Taylor softmax at the target."""
    n = 1 + o + o.square() / 2
    return n.sum(1).log() - n.gather(1, index[:, None])[:, 0].log()


def spherical_rows(o: Tensor, index: Tensor, eps: float) -> Tensor:
    """-log of the spherical softmax at the target."""
    n = o.square() + eps
    return n.sum(1).log() - n.gather(1, index[:, None])[:, 0].log()


def _reduced(rows, op, logits, target, ignore_index, reduction, *parameters) -> tuple[Tensor, Tensor]:
    o = logits.to(statistics_dtype(logits))
    index, ignored, outside = split_target(target, logits.shape[1], ignore_index, op)
    o = o.masked_fill(ignored[:, None], 0)
    loss_rows = rows(o, index, *parameters).masked_fill(ignored, 0).masked_fill(outside, torch.nan)
    return reduce_rows(loss_rows, (~ignored).to(o.dtype), reduction)


def z_loss(logits, target, *, a, b, ignore_index=-100, reduction="mean") -> Tensor:
    """L = softplus(a (b - z_c)) / a."""
    return _reduced(z_rows, "z_loss", logits, target, ignore_index, reduction, a, b)[0]


def taylor_softmax_loss(logits, target, *, ignore_index=-100, reduction="mean") -> Tensor:
    """L = -log((1 + o_c + o_c^2 / 2) / sum_k (1 + o_k + o_k^2 / 2))."""
    return _reduced(taylor_rows, "taylor_softmax_loss", logits, target, ignore_index, reduction)[0]


def spherical_softmax_loss(logits, target, *, eps=1e-6, ignore_index=-100, reduction="mean") -> Tensor:
    """L = -log((o_c^2 + eps) / sum_k (o_k^2 + eps))."""
    return _reduced(spherical_rows, "spherical_softmax_loss", logits, target, ignore_index, reduction, eps)[0]


# Coefficients gamma, lambda, kappa of dL/do_k = kappa + lambda (o_k - mu) + gamma 1[k = c], from the target logit o_c,
# the row's mean mu, its sum of squared deviations m2 and the number of classes v.


def z_coefficients(o_c, mu, m2, v, a, b) -> tuple[Tensor, ...]:
    sd = (m2 / v).sqrt()
    z = (o_c - mu) / sd
    g = torch.sigmoid(a * (b - z))
    return tuple(torch.where(m2 == 0, 0, term) for term in (-g / sd, g * z / (v * sd**2), g / (sd * v)))


def taylor_coefficients(o_c, mu, m2, v) -> tuple[Tensor, ...]:
    total = v * (1 + mu + mu.square() / 2) + m2 / 2
    return -(1 + o_c) / (1 + o_c + o_c.square() / 2), 1 / total, (1 + mu) / total


def spherical_coefficients(o_c, mu, m2, v, eps) -> tuple[Tensor, ...]:
    total = m2 + v * (mu.square() + eps)
    return -2 * o_c / (o_c.square() + eps), 2 / total, 2 * mu / total


def _member(op, rows, coefficients):
    def forward(logits, target, *, ignore_index, reduction, **parameters):
        values = parameters.values()
        loss, total = _reduced(rows, op, logits, target, ignore_index, reduction, *values)
        o = logits.to(statistics_dtype(logits))
        index, ignored, outside = split_target(target, logits.shape[1], ignore_index, op)
        mu = o.mean(1)
        m2 = (o - mu[:, None]).square().sum(1)
        o_c = o.gather(1, index[:, None])[:, 0]
        row_state = torch.stack([mu, *coefficients(o_c, mu, m2, o.shape[1], *values)])
        return loss, pack_state(row_state.masked_fill(ignored, 0).masked_fill(outside, torch.nan), total)

    return forward


def _backward(grad_loss, logits, target, state, *, ignore_index, reduction) -> Tensor:
    (mu, gamma, slope, kappa), total = unpack_state(state, 4)
    g = grad_loss.expand(len(logits)) * (target != ignore_index)
    if reduction == "mean":
        g = torch.where(total == 0, 0, g / total)
    index, _, outside = split_target(target, logits.shape[1], ignore_index, "spherical_family_backward")
    x = logits.to(state.dtype)
    dx = kappa[:, None] + slope[:, None] * (x - mu[:, None])
    dx = dx.scatter_add(1, index[:, None], gamma.masked_fill(outside, torch.nan)[:, None])
    return torch.where(g[:, None] == 0, 0, g[:, None] * dx).to(logits.dtype)


OPS = {
    "z_loss": _member("z_loss", z_rows, z_coefficients),
    "taylor_softmax_loss": _member("taylor_softmax_loss", taylor_rows, taylor_coefficients),
    "spherical_softmax_loss": _member("spherical_softmax_loss", spherical_rows, spherical_coefficients),
    "spherical_family_backward": _backward,
}
