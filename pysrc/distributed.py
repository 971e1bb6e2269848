"""Pairwise losses over a process group: each rank has its own rows, and every row is compared with all ranks' columns.

A rank's loss is that of its own anchors. The mean of the ranks' losses is the loss of the concatenated batch, and so
are the gradients that DistributedDataParallel averages: nothing has to be rescaled by the number of ranks. (Without
DDP, the gradient of a rank's embeddings is that of the sum of all ranks' losses.) All ranks bring the same number of
rows.

Two forms. ``"gather"``: the columns are gathered, O(world N d) on every rank, and their gradient is reduced back.
``"ring"``: the columns and their gradients travel from rank to rank, O(N d) at a time.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tilewise.ops import contrastive, pairwise
from tilewise.ops.multi_similarity_loss import parameters_of

Group = dist.ProcessGroup | None
REDUCTIONS = ("none", "sum", "mean")


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    form: str = "gather",
) -> Tensor:
    """:func:`tilewise.info_nce` of each rank's queries against all ranks' keys; key i of the same rank is the positive.

    Args:
        query: (N, d) of this rank.
        key: (N, d) of this rank.
        temperature: above 0; a tensor of one element gets this rank's share of its gradient.
        normalize: cosine similarities.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` of this rank's queries.
        group: the process group; None is the whole world.
        form: ``"gather"`` or ``"ring"``.

    Raises:
        ValueError: a shape or an option is not as above, or the ranks have different numbers of rows.
        TypeError: a dtype is not as above.
    """
    op = "distributed.info_nce"
    pairwise.check_embeddings(op, "query", query)
    pairwise.check_embeddings(op, "key", key, query, "query")
    if key.shape != query.shape:
        raise ValueError(
            f"tilewise.{op}: expected key to have shape {tuple(query.shape)} like query, got {tuple(key.shape)}"
        )
    scale = pairwise.check_number(op, "temperature", temperature, query, positive=True).reciprocal()
    labels = _own_indices(query, group)
    return _loss(op, query, key, labels, labels, None, "softmax", scale, None, normalize, reduction, group, form)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    reduction: str = "mean",
    group: Group = None,
    form: str = "gather",
) -> Tensor:
    """:func:`tilewise.clip_loss` of each rank's pairs against all ranks' images and texts.

    Args:
        image: (N, d) of this rank, as it is compared.
        text: (N, d) of this rank.
        logit_scale: the factor of similarities; a tensor gets this rank's share of its gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` of this rank's pairs.
        group: the process group; None is the whole world.
        form: ``"gather"`` or ``"ring"``.

    Raises:
        ValueError: a shape or an option is not as above, or the ranks have different numbers of rows.
        TypeError: a dtype is not as above.
    """
    op = "distributed.clip_loss"
    contrastive.check_features(op, image, text)
    scale = pairwise.check_number(op, "logit_scale", logit_scale, image)
    labels = _own_indices(image, group)
    rest = (labels, labels, None, "softmax", scale, None, False, reduction, group, form)
    return (_loss(op, image, text, *rest) + _loss(op, text, image, *rest)) / 2


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    reduction: str = "mean",
    group: Group = None,
    form: str = "gather",
) -> Tensor:
    """:func:`tilewise.siglip_loss` of each rank's images against all ranks' texts.

    Args:
        image: (N, d) of this rank, as it is compared.
        text: (N, d) of this rank.
        logit_scale: the factor of similarities; a tensor gets this rank's share of its gradient.
        logit_bias: added to them; a tensor gets this rank's share of its gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` of this rank's images.
        group: the process group; None is the whole world.
        form: ``"gather"`` or ``"ring"``.

    Raises:
        ValueError: a shape or an option is not as above, or the ranks have different numbers of rows.
        TypeError: a dtype is not as above.
    """
    op = "distributed.siglip_loss"
    contrastive.check_features(op, image, text)
    scale = pairwise.check_number(op, "logit_scale", logit_scale, image)
    bias = pairwise.check_number(op, "logit_bias", logit_bias, image)
    labels = _own_indices(image, group)
    return _loss(op, image, text, labels, labels, None, "sigmoid", scale, bias, False, reduction, group, form)


def supcon(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    form: str = "gather",
) -> Tensor:
    """:func:`tilewise.supcon` of each rank's anchors against all ranks' embeddings.

    Args:
        embeddings: (N, d) of this rank.
        labels: (N,) integers, of one meaning on all ranks.
        temperature: above 0; a tensor of one element gets this rank's share of its gradient.
        normalize: cosine similarities.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` of this rank's anchors.
        group: the process group; None is the whole world.
        form: ``"gather"`` or ``"ring"``.

    Raises:
        ValueError: a shape or an option is not as above, or the ranks have different numbers of rows.
        TypeError: a dtype is not as above.
    """
    op = "distributed.supcon"
    pairwise.check_embeddings(op, "embeddings", embeddings)
    labels = pairwise.check_labels(op, "labels", labels, embeddings, "embeddings")
    scale = pairwise.check_number(op, "temperature", temperature, embeddings, positive=True).reciprocal()
    own = dist.get_rank(group) * len(embeddings)
    x = embeddings
    return _loss(op, x, x, labels, labels, own, "softmax", scale, None, normalize, reduction, group, form)


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
) -> Tensor:
    """:func:`tilewise.multi_similarity_loss` of each rank's anchors, mined among all ranks' embeddings, by gathering.

    Args:
        embeddings: (N, d) of this rank.
        labels: (N,) integers, of one meaning on all ranks.
        alpha, beta, base, epsilon, normalize: as of the function.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` of this rank's anchors.
        group: the process group; None is the whole world.

    Raises:
        ValueError: a shape or an option is not as above, or the ranks have different numbers of rows.
        TypeError: a dtype is not as above.
    """
    op = "distributed.multi_similarity_loss"
    pairwise.check_embeddings(op, "embeddings", embeddings)
    labels = pairwise.check_labels(op, "labels", labels, embeddings, "embeddings")
    parameters = parameters_of(op, alpha, beta, base, epsilon)
    own = dist.get_rank(group) * len(embeddings)
    x = embeddings
    return _loss(
        op, x, x, labels, labels, own, "multi_similarity", None, None, normalize, reduction, group, "gather", parameters
    )


def gather_rows(x: Tensor, group: Group = None) -> Tensor:
    """(world N, d): every rank's rows in the order of ranks; a gradient goes back to the rank whose rows they are.

    Args:
        x: (N, ...) of this rank, N the same on all.
        group: the process group; None is the whole world.
    """
    return _Gather.apply(x, group) if dist.get_world_size(group) > 1 else x


class _Gather(torch.autograd.Function):
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


def _own_indices(x: Tensor, group: Group) -> Tensor:
    return torch.arange(len(x), device=x.device) + dist.get_rank(group) * len(x)


def _check_same_rows(op: str, x: Tensor, group: Group) -> None:
    """Ranks that bring different numbers of rows would hang, or read what nobody sent."""
    count = torch.tensor([len(x)], device=x.device)
    gathered = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, count, group=group)
    counts = torch.cat(gathered).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"tilewise.{op}: expected all ranks to have the same number of rows, got {counts}")


def _loss(
    op, x, y, x_labels, y_labels, self_offset, loss, scale, bias, normalize, reduction, group, form, parameters=()
) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"tilewise.{op}: expected reduction to be 'none', 'sum' or 'mean', got {reduction!r}")
    if form not in ("gather", "ring"):
        raise ValueError(f"tilewise.{op}: expected form to be 'gather' or 'ring', got {form!r}")
    _check_same_rows(op, x, group)
    if form == "gather":
        x, y = pairwise.prepared(x, y, normalize)
        return pairwise.pairwise_loss(
            op,
            x,
            gather_rows(y, group),
            x_labels,
            gather_rows(y_labels, group),
            loss=loss,
            parameters=parameters,
            scale=scale,
            bias=bias,
            self_offset=self_offset,
            reduction=reduction,
        )
    x, y = pairwise.prepared(x, y, normalize)
    losses = _Ring.apply(x, y, x_labels, y_labels, scale, bias, self_offset, loss, group)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / max(1, len(x))


class _Ring(torch.autograd.Function):
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
                part = torch.ops.tilewise.pairwise_loss_backward(
                    upstream, x, y_part, x_labels, labels, scale, bias, None, None, torch.ones_like(scale), loss=kind,
                    parameters=[], self_offset=offset, guide_margin=0.0, reduction="none", chunk_bytes=0, x_grad=True,
                    y_grad=True, bias_grad=bias is not None,
                )  # fmt: skip
                dx += part[0]
                dy += part[1]
                if bias is not None:
                    dbias += part[2].sum()
        dy = _shifted(dy, ctx.group)  # the last hop's columns are the next rank's own
        dscale = (dx * x).sum(dtype=scale.dtype)
        return scale * dx, scale * dy, None, None, dscale, None if bias is None else dbias, None, None, None


def _rows(loss, x, y, x_labels, y_labels, scale, bias, self_offset) -> Tensor:
    return torch.ops.tilewise.pairwise_loss(
        x, y, x_labels, y_labels, scale, bias, loss=loss, parameters=[], self_offset=self_offset, reduction="none"
    )[0]


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
