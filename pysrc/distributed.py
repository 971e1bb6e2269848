"""Losses and routing over a process group.

Pairwise losses: each rank has its own rows, and every row is compared with all ranks' columns.

A rank's loss is that of its own anchors. The mean of the ranks' losses is the loss of the concatenated batch, and so
are the gradients that DistributedDataParallel averages: nothing has to be rescaled by the number of ranks. (Without
DDP, the gradient of a rank's embeddings is that of the sum of all ranks' losses.) All ranks bring the same number of
rows.

Two forms. ``"gather"``: the columns are gathered, O(world N d) on every rank, and their gradient is reduced back.
``"ring"``: the columns and their gradients travel from rank to rank, O(N d) at a time.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from tilewise.collectives import GatherRows, Group, MiningRingLoss, RingLoss
from tilewise.formulas.rows import statistics_dtype
from tilewise.formulas.sparse_transport import adam, largest, project
from tilewise.ops import contrastive, pairwise
from tilewise.ops.multi_similarity_loss import parameters_of
from tilewise.ops.sparse_ot_router import Routing, check_arguments

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
    query, key = pairwise.cast_embeddings(query, key)
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
    image, text = contrastive.check_features(op, image, text)
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
    image, text = contrastive.check_features(op, image, text)
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
    (embeddings,) = pairwise.cast_embeddings(embeddings)
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
    form: str = "gather",
) -> Tensor:
    """:func:`tilewise.multi_similarity_loss` of each rank's anchors, mined among all ranks' embeddings.

    Args:
        embeddings: (N, d) of this rank.
        labels: (N,) integers, of one meaning on all ranks.
        alpha, beta, base, epsilon, normalize: as of the function.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` of this rank's anchors.
        group: the process group; None is the whole world.
        form: ``"gather"`` or ``"ring"``.

    Raises:
        ValueError: a shape or an option is not as above, or the ranks have different numbers of rows.
        TypeError: a dtype is not as above.
    """
    op = "distributed.multi_similarity_loss"
    (embeddings,) = pairwise.cast_embeddings(embeddings)
    pairwise.check_embeddings(op, "embeddings", embeddings)
    labels = pairwise.check_labels(op, "labels", labels, embeddings, "embeddings")
    parameters = parameters_of(op, alpha, beta, base, epsilon)
    own = dist.get_rank(group) * len(embeddings)
    x = embeddings
    return _loss(
        op, x, x, labels, labels, own, "multi_similarity", None, None, normalize, reduction, group, form, parameters
    )


def sparse_ot_router(
    logits: Tensor, capacity: int, *, gamma: float = 1.0, steps: int = 20, lr: float = 1e-2, group: Group = None
) -> Routing:
    """:func:`tilewise.sparse_ot_router` of all ranks' tokens together, of which each rank has its own.

    A step gathers the `capacity` best scores of every expert and rank; potentials of tokens stay where the tokens are.

    Args:
        logits: (tokens, experts) of this rank; ranks may have different numbers of tokens.
        capacity: places of each expert, for the tokens of all ranks, at most their number.
        gamma, steps, lr: as in :func:`tilewise.sparse_ot_router`.
        group: the process group; None is the whole world.

    Returns:
        This rank's part: indices (experts, capacity) of its own tokens, their weights, and its load (experts,).

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.
    """
    op = "distributed.sparse_ot_router"
    check_arguments(op, logits, capacity, gamma, steps, lr)
    if logits.dim() != 2:
        raise ValueError(f"tilewise.{op}: expected logits to have shape (tokens, experts), got {tuple(logits.shape)}")
    tokens, experts = logits.shape
    total = torch.tensor([tokens], device=logits.device)
    dist.all_reduce(total, group=group)
    if capacity > (everything := int(total)):
        raise ValueError(f"tilewise.{op}: expected capacity to be at most {everything}, all tokens, got {capacity}")
    probabilities = torch.softmax(logits.to(statistics_dtype(logits)), -1).T
    costs, own = -probabilities.detach(), min(capacity, tokens)
    mass = costs.new_full((experts,), gamma * everything / experts)
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    def entries(alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Of the experts the entries (E, own) of this rank's best tokens, and which tokens they are."""
        scores, indices = largest(alpha - costs, own)
        padded = scores.new_full((experts, capacity), -torch.inf)
        padded[:, :own] = scores
        gathered = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded, group=group)
        values, places, below, _ = project(torch.cat(gathered, 1), mass, capacity)
        found = torch.zeros(experts, world * capacity, dtype=values.dtype, device=values.device)
        found.scatter_(1, places, (values - below).clamp(min=0) / gamma)
        return found[:, rank * capacity : rank * capacity + own], indices

    def gradient(alpha: Tensor) -> Tensor:
        values, indices = entries(alpha)
        return torch.zeros_like(alpha).scatter_add(0, indices.flatten(), values.flatten()) - 1

    alpha = adam(gradient, costs.new_zeros(tokens), steps=steps, lr=lr)
    values, indices = entries(alpha)
    used = values > 0
    order = torch.where(used, indices, tokens).argsort(1)
    used = used.gather(1, order)
    result = torch.zeros(experts, capacity, dtype=torch.int64, device=logits.device)
    result[:, :own] = torch.where(used, indices.gather(1, order), 0)
    weights = torch.nn.functional.pad(used, (0, capacity - own)) * probabilities.gather(1, result)
    return Routing(result, weights.to(logits.dtype), used.sum(1))


def gather_rows(x: Tensor, group: Group = None) -> Tensor:
    """(world N, d): every rank's rows in the order of ranks; a gradient goes back to the rank whose rows they are.

    The ranks compare their numbers of rows first, for which a GPU is waited for.

    Args:
        x: (N, ...) of this rank, of one shape on all.
        group: the process group; None is the whole world.

    Raises:
        ValueError: on every rank, where they bring different numbers of rows or rows of different sizes.
    """
    op = "distributed.gather_rows"
    if x.dim() == 0:
        raise ValueError(f"tilewise.{op}: expected x to have rows, got shape ()")
    _check_same_rows(op, x, group)
    return _gathered(x, group)


def _gathered(x: Tensor, group: Group) -> Tensor:
    return GatherRows.apply(x, group) if dist.get_world_size(group) > 1 else x


def _own_indices(x: Tensor, group: Group) -> Tensor:
    return torch.arange(len(x), device=x.device) + dist.get_rank(group) * len(x)


def _check_same_rows(op: str, x: Tensor, group: Group) -> None:
    """Ranks that bring different numbers of rows, or of their bytes, would hang, or read what nobody sent."""
    own = torch.tensor([len(x), math.prod(x.shape[1:]) * x.element_size()], device=x.device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    counts, sizes = torch.stack(gathered, 1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"tilewise.{op}: expected all ranks to have the same number of rows, got {counts}")
    if len(set(sizes)) > 1:
        raise ValueError(f"tilewise.{op}: expected all ranks to have rows of the same size, got {sizes} bytes")


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
            _gathered(y, group),
            x_labels,
            _gathered(y_labels, group),
            loss=loss,
            parameters=parameters,
            scale=scale,
            bias=bias,
            self_offset=self_offset,
            reduction=reduction,
        )
    x, y = pairwise.prepared(x, y, normalize)
    if loss == "multi_similarity":
        losses = MiningRingLoss.apply(x, y, x_labels, y_labels, self_offset, parameters, group)
    else:
        losses = RingLoss.apply(x, y, x_labels, y_labels, scale, bias, self_offset, loss, group)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / max(1, len(x))
