"""pair_weighted_loss: any loss of an anchor's similarities, by name or as a function of your own."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.ops.pairwise import check_pair_reduction, check_references, pairwise_loss, prepared
from tilewise.reference.pairwise import relations
from tilewise.weighting import _Weighting

OP = "pair_weighted_loss"
CHUNK = 2**20  # similarities that a function of the user's sees at a time

RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def pair_weighted_loss(
    embeddings: Tensor,
    labels: Tensor,
    weighting: _Weighting | RowLoss,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """A loss of every anchor's similarities to its positives and negatives, without the (N, N) matrix.

    From the general pair weighting of "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning"
    (Wang et al., 2019).

    Args:
        embeddings: (N, d), float64 (on a CPU), float32, bfloat16 or float16; similarities are float32 or better.
        labels: (N,) integers.
        weighting: one of :mod:`tilewise.weighting`, served by the kernels; or a function of PyTorch operations
            ``f(similarities, positive, negative) -> losses`` of a chunk of R anchors: (R, M) similarities, the (R, M)
            masks of positive and negative pairs, (R,) losses. It is differentiated chunk by chunk, with memory for
            about a million similarities (and what f itself keeps); no gradient flows to what it closes over.
        ref_embeddings: (M, d) of the same dtype: pairs are then formed with these, and none is left out.
        ref_labels: (M,) integers.
        normalize: cosine similarities; False takes the embeddings as they are.
        reduction: ``"mean"`` over all N anchors, ``"mean_active"`` over those with the pairs that the loss needs (for a
            function: with any pair), ``"sum"`` or ``"none"``.

    Returns:
        () or (N,) in the dtype of the similarities.

    Raises:
        ValueError: a shape or an option is not as above, or f returns another shape.
        TypeError: a dtype is not as above, or weighting is neither.

    Example:
        >>> import torch, tilewise
        >>> embeddings, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8) // 2
        >>> loss = tilewise.pair_weighted_loss(embeddings, labels, tilewise.weighting.Triplet(margin=0.2))
        >>> def hinge(s, positive, negative):
        ...     return (torch.relu(0.8 - s) * positive + torch.relu(s - 0.3) * negative).sum(1)
        >>> tilewise.pair_weighted_loss(embeddings, labels, hinge).backward()
    """
    x, y, x_labels, y_labels, self_offset = check_references(OP, embeddings, labels, ref_embeddings, ref_labels)
    if isinstance(weighting, _Weighting):
        return pairwise_loss(
            OP,
            x,
            y,
            x_labels,
            y_labels,
            loss=weighting.loss,
            parameters=weighting.parameters,
            self_offset=self_offset,
            normalize=normalize,
            reduction=reduction,
        )
    if not callable(weighting):
        raise TypeError(
            f"tilewise.{OP}: expected weighting to be of tilewise.weighting or a function, "
            f"got {type(weighting).__name__}"
        )
    check_pair_reduction(OP, reduction)
    x, y = prepared(x, y, normalize)
    losses, active = _Chunked.apply(x, y, x_labels, y_labels, self_offset, weighting)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (active.sum().clamp(min=1) if reduction == "mean_active" else max(1, len(x)))


class _Chunked(torch.autograd.Function):
    """Row losses; the backward runs the function again on each chunk."""

    @staticmethod
    def forward(ctx, x, y, x_labels, y_labels, self_offset, function):
        ctx.save_for_backward(x, y, x_labels, y_labels)
        ctx.self_offset, ctx.function = self_offset, function
        losses, active = x.new_empty(len(x)), x.new_empty(len(x))
        for part, similarities, positive, negative in _chunks(x, y, x_labels, y_labels, self_offset):
            losses[part] = _called(function, similarities, positive, negative)
            active[part] = (positive | negative).any(1).to(active.dtype)
        ctx.mark_non_differentiable(active)
        return losses, active

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses, _):
        x, y, x_labels, y_labels = ctx.saved_tensors
        grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
        for part, similarities, positive, negative in _chunks(x, y, x_labels, y_labels, ctx.self_offset):
            with torch.enable_grad():
                losses = _called(ctx.function, similarities.requires_grad_(), positive, negative)
            (g,) = torch.autograd.grad(losses, similarities, grad_losses[part], materialize_grads=True)
            grad_x[part] = g @ y
            grad_y.addmm_(g.t(), x[part])
        return grad_x, grad_y, None, None, None, None


def _chunks(x, y, x_labels, y_labels, self_offset):
    size = max(1, CHUNK // max(1, len(y)))
    for begin in range(0, len(x), size):
        part = slice(begin, begin + size)
        own = None if self_offset is None else self_offset + begin
        yield part, x[part] @ y.t(), *relations(x_labels[part], y_labels, own)


def _called(function: RowLoss, similarities: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    losses = function(similarities, positive, negative)
    if not isinstance(losses, Tensor) or losses.shape != similarities.shape[:1]:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"tilewise.{OP}: expected weighting to return losses of shape ({len(similarities)},), got {got}"
        )
    return losses
