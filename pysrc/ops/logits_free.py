r"""Losses of the spherical family of logits ``hidden @ weight.T + bias``, without ever forming the logits.

A member needs only the target logit, the mean and the sum of squared deviations of a row. With the mean row m of
weight, W = weight - m, B = bias - mean(bias), Q = W^T W and q = W^T B, the row h of hidden has

    mean           mu  = h.m + mean(bias)
    deviations     m2  = h^T Q h + 2 h.q + B.B
    target logit   o_c = mu + h.W_c + B_c

at the cost O((V + N) d^2) of forming and using Q instead of O(N V d). Given dL/do_k = kappa + lambda (o_k - mu) +
gamma 1[k = c], summing over the classes leaves GEMMs with (d, d) matrices and a gather or a scatter of N rows. All of
it is PyTorch operations: one implementation for every device, registered once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tilewise.formulas.rows import reduce_rows, split_target, statistics_dtype
from tilewise.formulas.spherical import OF_STATISTICS
from tilewise.ops import register

CHUNK = 2**20  # elements of weight held in the type of statistics at a time; more only where d^2 is more


def slices(rows: Tensor) -> Iterator[slice]:
    """The first dimension in chunks."""
    size = max(rows[:1].numel(), CHUNK // rows[:1].numel())
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def _less(weight: Tensor, row: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of weight less one row, in its type, chunk by chunk: in one buffer, which the next chunk overwrites."""
    buffer = None
    for part in slices(weight):
        rows = weight[part]
        buffer = row.new_empty(rows.shape) if buffer is None else buffer[: len(rows)]
        yield part, torch.sub(rows, row, out=buffer)


def _mean_row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Exact, so that nothing is left of the rows, when all are equal."""
    first = weight[0].to(dtype)
    total = torch.zeros_like(first)
    for _, rows in _less(weight, first):
        total += rows.sum(0)
    return first + total / len(weight)


def _centred_bias(bias: Tensor | None, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean of bias and its deviations; one zero stands for them all when there is no bias."""
    if bias is None:
        return weight.new_zeros((), dtype=dtype), weight.new_zeros(1, dtype=dtype).expand(len(weight))
    bias = bias.to(dtype)
    mean = bias[0] + (bias - bias[0]).mean()
    return mean, bias - mean


def _forward(member: str):
    of_statistics, coefficients = OF_STATISTICS[member]

    def forward(hidden, weight, target, bias, *, ignore_index, reduction, **parameters):
        dtype, (classes, d) = statistics_dtype(hidden), weight.shape
        op = f"linear_{member}_loss" if member == "z" else f"linear_{member}_softmax_loss"
        index, ignored, outside = split_target(target, classes, ignore_index, op)
        h = hidden.to(dtype).masked_fill(ignored[:, None], 0)
        mean = _mean_row(weight, dtype)
        bias_mean, deviations = _centred_bias(bias, weight, dtype)
        gram = weight.new_zeros((d + 1, d), dtype=dtype)  # Q, and q as its last row
        for part, centred in _less(weight, mean):
            gram[:d].addmm_(centred.t(), centred)
            if bias is not None:
                gram[d].addmv_(centred.t(), deviations[part])
        m2 = (h * torch.addmm(2 * gram[d], h, gram[:d])).sum(1)
        if bias is not None:
            m2 += deviations.dot(deviations)
        # Of squares beyond the type nothing is known: let it show, not pass for an infinite deviation.
        m2 = m2.clamp_(min=0).masked_fill_(m2.isinf(), torch.nan)
        # The z-score is of the difference to the mean: leaving the mean out spares it the rounding of a large one.
        mu = torch.zeros_like(m2) if member == "z" else torch.mv(h, mean) + bias_mean
        o_c = mu + (h * (weight[index] - mean)).sum(1) + deviations[index]
        statistics = o_c, mu, m2, classes, *parameters.values()
        loss_rows = of_statistics(*statistics).masked_fill(ignored, 0).masked_fill(outside, torch.nan)
        loss, total = reduce_rows(loss_rows, (~ignored).to(dtype), reduction)
        row_state = torch.stack(coefficients(*statistics))
        return loss, row_state.masked_fill(ignored, 0).masked_fill(outside, torch.nan), gram, mean, total

    return forward


def _backward(
    grad_loss, hidden, weight, target, bias, row_state, gram, mean, total, *,
    ignore_index, reduction, grad_hidden, grad_weight, grad_bias,
):  # fmt: skip
    dtype, (classes, d) = row_state.dtype, weight.shape
    ignored = target == ignore_index
    index = target.clamp(0, classes - 1)  # ignored rows add 0 there, rows out of range NaN
    upstream = grad_loss.expand(len(hidden)).to(dtype).masked_fill(ignored, 0)
    if reduction == "mean":
        upstream = torch.where(total == 0, 0, upstream / total)
    gamma, slope, kappa = torch.where(upstream == 0, 0, upstream * row_state)
    h = hidden.to(dtype).masked_fill(ignored[:, None], 0)
    deviations = _centred_bias(bias, weight, dtype)[1]

    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), row_state.new_empty(0)
    if grad_hidden:
        d_hidden = torch.addmm(gram[d], h, gram[:d]).mul_(slope[:, None])
        d_hidden.addcmul_(gamma[:, None], weight[index] - mean).addr_(gamma + classes * kappa, mean)
        d_hidden = d_hidden.to(hidden.dtype)
    if grad_weight:
        second_moment, every_row = torch.mm(h.t() * slope, h), torch.mv(h.t(), kappa)
        of_bias = torch.mv(h.t(), slope)

        def dense_rows(select, centred, out=None):
            rows = torch.addmm(every_row, centred, second_moment, out=out)
            return rows if bias is None else rows.addr_(deviations[select], of_bias)

        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        of_target = gamma[:, None] * h
        if d_weight.dtype == dtype:
            for part, centred in _less(weight, mean):
                dense_rows(part, centred, out=d_weight[part])
            d_weight.index_add_(0, index, of_target)
        else:  # rounded once: the rows of target classes are computed again, together with their sum over the batch
            for part, centred in _less(weight, mean):
                d_weight[part] = dense_rows(part, centred)
            d_weight[index] = (dense_rows(index, weight[index] - mean) + sum_of_class(of_target, index)).to(
                weight.dtype
            )
    if grad_bias and bias is not None:
        slope_h = torch.mv(h.t(), slope)
        d_bias = deviations * slope.sum() + kappa.sum()
        for part, centred in _less(weight, mean):
            d_bias[part] += torch.mv(centred, slope_h)
        d_bias = d_bias.index_add_(0, index, gamma).to(bias.dtype)
    return d_hidden, d_weight, d_bias


def sum_of_class(rows: Tensor, index: Tensor) -> Tensor:
    """For every row the sum of all rows of its class; neither waits for the device nor knows the number of classes."""
    ordered, order = index.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    place = torch.empty_like(order)
    place[order] = first.cumsum(0) - 1
    return torch.zeros_like(rows).index_add_(0, place, rows)[place]


LAYER = "hidden n D, weight V D, #target n, bias V"
register.composite("linear_z_loss", _forward("z"), LAYER)
register.composite("linear_taylor_softmax_loss", _forward("taylor"), LAYER)
register.composite("linear_spherical_softmax_loss", _forward("spherical"), LAYER)
register.composite("linear_spherical_backward", _backward, LAYER + ", row_state 3 n, gram D+1 D, mean D, total")
