"""pair_weighted_loss: any loss of an anchor's similarities, by name or as a function of your own."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import autocast, register
from tilewise.ops.pairwise import (
    check_pair_reduction,
    check_references,
    pairwise_loss,
    prepared,
    similarity_chunks,
)
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
            about a million similarities (and what f itself keeps), once; with reduction ``"none"`` it runs again in the
            backward. No gradient flows to what it closes over.
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
    wide = statistics_dtype(x)
    arguments = (x.to(wide), y.to(wide), x_labels, y_labels, self_offset, weighting)
    if not torch.compiler.is_compiling() and register.transforms_active():
        losses, active = _composed(*arguments)
        total = losses if reduction == "none" else losses.sum()
    elif reduction == "none":
        total = _Rows.apply(*arguments)
    else:
        grad = torch.is_grad_enabled()
        total, active = _Total.apply(*arguments, grad and x.requires_grad, grad and y.requires_grad)
    if reduction in ("sum", "none"):
        return total
    return total / (active.clamp(min=1) if reduction == "mean_active" else max(1, len(x)))


def _composed(x, y, x_labels, y_labels, self_offset, function) -> tuple[Tensor, Tensor]:
    """Row losses and how many rows have pairs, for transforms of torch.func: they differentiate the function itself."""
    chunks = list(similarity_chunks(x, y, x_labels, y_labels, self_offset, CHUNK))
    losses = [_called(function, *pairs) for _, *pairs in chunks]
    active = sum((positive | negative).any(1).sum() for *_, positive, negative in chunks)
    return torch.cat(losses) if losses else x.new_zeros(0), x.new_zeros(()) + active


class _Rows(torch.autograd.Function):
    """Row losses; the backward, which alone knows their weights, runs the function again."""

    @staticmethod
    def forward(ctx, x, y, x_labels, y_labels, self_offset, function):
        ctx.save_for_backward(x, y, x_labels, y_labels)
        ctx.self_offset, ctx.function = self_offset, function
        losses = x.new_empty(len(x))
        for part, *pairs in similarity_chunks(x, y, x_labels, y_labels, self_offset, CHUNK):
            losses[part] = _called(function, *pairs)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        x, y, x_labels, y_labels = ctx.saved_tensors
        with torch.no_grad():
            gradients = _Gradients(x, y, *ctx.needs_input_grad[:2])
            for part, *pairs in similarity_chunks(x, y, x_labels, y_labels, ctx.self_offset, CHUNK):
                gradients.add(part, ctx.function, *pairs, grad_losses[part])
        return *_final(gradients.x, gradients.y, sources=(x, y, grad_losses)), None, None, None, None


class _Total(torch.autograd.Function):
    """The sum of row losses and how many rows have pairs; the forward forms the gradients beside the losses."""

    @staticmethod
    def forward(ctx, x, y, x_labels, y_labels, self_offset, function, form_x, form_y):
        gradients = _Gradients(x, y, form_x, form_y)
        total, active = x.new_zeros(()), x.new_zeros(())
        for part, similarities, *masks in similarity_chunks(x, y, x_labels, y_labels, self_offset, CHUNK):
            total += gradients.add(part, function, similarities, *masks).sum()
            active += (masks[0] | masks[1]).any(1).sum()
        ctx.save_for_backward(x, y, gradients.x, gradients.y)
        ctx.mark_non_differentiable(active)
        return total, active

    @staticmethod
    def backward(ctx, grad_total, _):
        x, y, *gradients = ctx.saved_tensors
        with torch.no_grad():
            found = [None if gradient is None else gradient * grad_total for gradient in gradients]
        return *_final(*found, sources=(x, y, grad_total)), None, None, None, None, None, None


class _Final(torch.autograd.Function):
    """A gradient that depends on `sources` in a way that is not known: who asks for its derivative is told so."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"tilewise.{OP}: expected one differentiation of a function of yours, got a second: "
            "its gradients have no derivative"
        )


def _final(*gradients: Tensor | None, sources: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():  # the backward of an ordinary step
        return gradients
    return tuple(None if gradient is None else _Final.apply(gradient, *sources) for gradient in gradients)


class _Gradients:
    """What the chunks of rows give for x and y, where wanted."""

    def __init__(self, x: Tensor, y: Tensor, wants_x: bool, wants_y: bool):
        self.of = x, y
        self.x = torch.zeros_like(x) if wants_x else None
        self.y = torch.zeros_like(y) if wants_y else None

    def add(self, part, function, similarities, positive, negative, upstream=None) -> Tensor:
        """Runs the function on a chunk and returns its losses."""
        wanted = self.x is not None or self.y is not None
        with torch.set_grad_enabled(wanted):
            losses = _called(function, similarities.requires_grad_(wanted), positive, negative)
        if losses.requires_grad:  # not where the function gave constants
            upstream = torch.ones_like(losses) if upstream is None else upstream.to(losses.dtype)
            (g,) = torch.autograd.grad(losses, similarities, upstream, materialize_grads=True)
            x, y = self.of
            with autocast.off(x.device.type):
                if self.x is not None:
                    self.x[part] = g @ y
                if self.y is not None:
                    self.y.addmm_(g.t(), x[part])
        return losses.detach()


def _called(function: RowLoss, similarities: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    losses = function(similarities, positive, negative)
    if not isinstance(losses, Tensor) or losses.shape != similarities.shape[:1]:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"tilewise.{OP}: expected weighting to return losses of shape ({len(similarities)},), got {got}"
        )
    return losses
