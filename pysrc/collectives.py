"""The collective steps of tilewise.distributed: columns that are gathered, or travel around a ring of ranks."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tilewise.ops import register

_pairwise_loss, _pairwise_gradients = map(register.operator, ("pairwise_loss", "pairwise_loss_backward"))
Group = dist.ProcessGroup | None


class GatherRows(torch.autograd.Function):
    """Every rank's rows; the gradient goes back to the rank whose rows they are."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
        dist.all_gather(list(out.chunk(dist.get_world_size(group))), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        own = gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)]
        if dist.get_backend(ctx.group) == "nccl":
            own = torch.empty_like(own)
            dist.reduce_scatter_tensor(own, gradient, group=ctx.group)
            return own, None
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)].clone(), None


class RingLoss(torch.autograd.Function):
    """Row losses of a softmax or sigmoid loss whose columns travel around the ring."""

    @staticmethod
    def forward(ctx, x, y, x_labels, y_labels, scale, bias, self_offset, loss, group):
        kinds = ("log_sum_exp", "positive_sum") if loss == "softmax" else (loss,)
        found = {kind: [] for kind in kinds}
        positives = torch.zeros(len(x), dtype=scale.dtype, device=x.device)
        for y_part, labels, offset, _ in _hops(y, y_labels, self_offset, None, group):
            tensors = (x, y_part, x_labels, labels)
            for kind in kinds:
                found[kind].append(_rows(kind, *tensors, scale, bias, offset))
            if loss == "softmax":
                positives += _rows("positive_sum", *tensors, torch.zeros_like(scale), torch.ones_like(scale), offset)
        ctx.save_for_backward(x, y, x_labels, y_labels, scale, bias, positives, *found[kinds[0]])
        ctx.self_offset, ctx.loss, ctx.group = self_offset, loss, group
        if loss != "softmax":
            return sum(found[loss])
        lse = torch.logsumexp(torch.stack(found["log_sum_exp"]), 0)
        return torch.where(positives > 0, lse - sum(found["positive_sum"]) / positives.clamp(min=1), 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, y, x_labels, y_labels, scale, bias, positives, *parts = ctx.saved_tensors
        dx, dbias = torch.zeros_like(x), torch.zeros_like(scale)
        grad = grad.to(scale.dtype).contiguous()
        if ctx.loss == "softmax":
            grad = torch.where(positives > 0, grad, 0)
            lse = torch.logsumexp(torch.stack(parts), 0)
            share = -grad / positives.clamp(min=1)
        for hop, (y_part, labels, offset, dy) in enumerate(
            _hops(y, y_labels, ctx.self_offset, torch.zeros_like(y), ctx.group)
        ):
            upstreams = {ctx.loss: grad}
            if ctx.loss == "softmax":
                upstreams = {"log_sum_exp": grad * torch.exp(parts[hop] - lse), "positive_sum": share}
            for kind, upstream in upstreams.items():
                part = _row_gradients(upstream, kind, x, y_part, x_labels, labels, scale, bias, offset)
                dx += part[0]
                dy += part[1]
                if bias is not None:
                    dbias += part[2].sum()
        dy = _shifted(dy, ctx.group)  # the last hop's columns are the next rank's own
        dscale = (dx * x).sum(dtype=scale.dtype)
        return scale * dx, scale * dy, None, None, dscale, None if bias is None else dbias, None, None, None


class MiningRingLoss(torch.autograd.Function):
    """Row losses of multi_similarity_loss. The first time around finds each row's extremes, the second sums what they
    keep: with one more feature, -extreme in x and 1 in y, a row's threshold is the same number for all rows."""

    @staticmethod
    def forward(ctx, x, y, x_labels, y_labels, self_offset, parameters, group):
        alpha, beta, base, epsilon = parameters
        least, most = x.new_full((len(x),), math.inf), x.new_full((len(x),), -math.inf)
        for y_part, labels, offset, _ in _hops(y, y_labels, self_offset, None, group):
            tensors = (x, y_part, x_labels, labels, x.new_ones(()), None, offset)
            least = torch.minimum(least, _rows("least_positive", *tensors))
            most = torch.maximum(most, _rows("most_negative", *tensors))
        mines = epsilon < math.inf
        possible = (least < math.inf) & (most > -math.inf) if mines else (least < math.inf) | (most > -math.inf)
        shifts = [torch.where(possible & mines, extreme, 0) for extreme in (most, least)]
        windows = [(-alpha, epsilon, 1.0), (beta, epsilon, -1.0)]
        parts = [[], []]
        for y_part, labels, offset, _ in _hops(y, y_labels, self_offset, None, group):
            for found, shift, window in zip(parts, shifts, windows, strict=True):
                tensors = (_with(x, -shift), _with(y_part, 1), x_labels, labels, x.new_ones(()), None, offset)
                found.append(_rows("window_log_sum_exp", *tensors, window))
        pull, push = (torch.logsumexp(torch.stack(found), 0) for found in parts)
        kept = possible & (pull > -math.inf) & (push > -math.inf) if mines else possible
        pull, push = pull - alpha * (shifts[0] - base), push + beta * (shifts[1] - base)
        ctx.save_for_backward(x, y, x_labels, y_labels, kept, pull, push, *shifts, *parts[0], *parts[1])
        ctx.self_offset, ctx.parameters, ctx.windows, ctx.group = self_offset, parameters, windows, group
        return torch.where(kept, F.softplus(pull) / alpha + F.softplus(push) / beta, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, y, x_labels, y_labels, kept, pull, push, shift_p, shift_n, *parts = ctx.saved_tensors
        alpha, beta, base, _ = ctx.parameters
        hops, grad = len(parts) // 2, torch.where(kept, grad, 0)
        sides = [  # of the loss with respect to each hop's sum, e^(part - total) of it
            (grad * torch.sigmoid(pull) / alpha, pull + alpha * (shift_p - base), shift_p, parts[:hops]),
            (grad * torch.sigmoid(push) / beta, push - beta * (shift_n - base), shift_n, parts[hops:]),
        ]
        dx = torch.zeros_like(x)
        for hop, (y_part, labels, offset, dy) in enumerate(
            _hops(y, y_labels, ctx.self_offset, torch.zeros_like(y), ctx.group)
        ):
            for (upstream, total, shift, found), window in zip(sides, ctx.windows, strict=True):
                share = torch.where(found[hop] > -math.inf, upstream * torch.exp(found[hop] - total), 0)
                tensors = (_with(x, -shift), _with(y_part, 1), x_labels, labels, x.new_ones(()), None, offset)
                part = _row_gradients(share, "window_log_sum_exp", *tensors, window)
                dx += part[0][:, :-1]
                dy += part[1][:, :-1]
        dy = _shifted(dy, ctx.group)  # the last hop's columns are the next rank's own
        return dx, dy, None, None, None, None, None


def _with(x: Tensor, feature: Tensor | float) -> Tensor:
    """x with one more feature."""
    column = torch.as_tensor(feature, dtype=x.dtype, device=x.device).expand(len(x))
    return torch.cat([x, column[:, None]], 1)


def _rows(loss, x, y, x_labels, y_labels, scale, bias, self_offset, parameters=()) -> Tensor:
    return _pairwise_loss(
        x,
        y,
        x_labels,
        y_labels,
        scale,
        bias,
        loss=loss,
        parameters=list(parameters),
        self_offset=self_offset,
        reduction="none",
    )[0]


def _row_gradients(upstream, loss, x, y, x_labels, y_labels, scale, bias, self_offset, parameters=()):
    """The gradients of scale x, scale y and the rows of bias."""
    return _pairwise_gradients(
        upstream,
        x,
        y,
        x_labels,
        y_labels,
        scale,
        bias,
        None,
        None,
        torch.ones_like(scale),
        loss=loss,
        parameters=list(parameters),
        self_offset=self_offset,
        guide_margin=0.0,
        reduction="none",
        chunk_bytes=0,
        x_grad=True,
        y_grad=True,
        bias_grad=bias is not None,
    )


def _hops(y, y_labels, self_offset, travelling, group):
    """Every rank's columns and labels, this rank's first; the offset of a row's own column among them; and a tensor
    that travels with the columns, as the caller left it."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for hop in range(world):
        owner = (rank - hop) % world
        offset = None if self_offset is None else self_offset - owner * len(y)
        yield y, y_labels, offset, travelling
        if hop + 1 < world:
            y, y_labels = _shifted(y, group), _shifted(y_labels, group)
            if travelling is not None:
                travelling = _shifted(travelling, group)


def _shifted(x: Tensor, group: Group) -> Tensor:
    """What the previous rank has; the next gets ours."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if world == 1:
        return x
    out, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
    following, previous = (dist.get_global_rank(group or dist.group.WORLD, (rank + step) % world) for step in (1, -1))
    transfers = [dist.P2POp(dist.isend, x, following, group), dist.P2POp(dist.irecv, out, previous, group)]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    return out
