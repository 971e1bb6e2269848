"""cross_entropy: softmax cross-entropy in one read of the logits, its gradient in one read and one write."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.formulas.cross_entropy import logits_gradient
from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import derivatives, register, rows

OP = "cross_entropy"
WITH_STATS = f"{OP}_with_stats"
_forward, _forward_with_stats = register.operator(OP), register.operator(WITH_STATS)
_gradient, _overwrite = register.operator(f"{OP}_backward"), register.operator(f"{OP}_backward_")
_DEFAULTS = tuple(register.defaults(OP).values())


class CrossEntropyStats(NamedTuple):
    """Statistics of each row of the scaled and capped logits; all have shape (N,).

    Attributes:
        lse: log sum_k exp(x_k), differentiable.
        entropy: of softmax(x), in nats, differentiable.
        argmax: int64, the lowest index on ties.
        correct: bool, argmax equals the target (its most probable class); False for ignored rows.
    """

    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    correct: Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""Cross entropy between logits and class indices or class probabilities.

    With x the effective logits and c_k the target coefficients of a row, its loss is
    ``row_weight * (sum_k c_k (lse(x) - x_k) + lse_square_scale * lse(x)**2)``. Drop-in for
    :func:`torch.nn.functional.cross_entropy` on 2-D logits, with these differences: statistics and the loss are
    float32 (float64 for float64 logits) whatever the type of the logits; when every row is ignored the mean is 0, not
    NaN; on a GPU an out-of-range target gives that row a NaN loss instead of stopping the device.

    The forward pass keeps O(N) numbers beside its inputs, the backward allocates the gradient and nothing else.

    Args:
        logits: (N, V), V >= 1, float32, bfloat16, float16 or (on the CPU) float64; any strides.
        target: (N,) integer class indices in [0, V) or ``ignore_index``, or (N, V) floating class probabilities.
        weight: (V,) weight of each class. The mean divides by the sum of the targets' weights.
        ignore_index: class indices equal to it give loss 0 and gradient 0 and do not count in the mean. It must stay
            negative with probability targets, to which it does not apply.
        label_smoothing: in [0, 1], the share of the target spread evenly over all V classes.
        lse_square_scale: adds ``lse_square_scale * lse**2`` to each kept row's loss, which holds the softmax
            normaliser near 1 (large language models' auxiliary loss; not :func:`tilewise.z_loss`).
        softcap: positive; x becomes ``softcap * tanh(x / softcap)`` (after ``logit_scale``).
        logit_scale: x = logit_scale * logits; the inverse temperature.
        row_weight: (N,) factor on each row's loss. It does not enter the denominator of the mean.
        reduction: "mean", "sum" or "none".
        return_stats: also return the rows' :class:`CrossEntropyStats`, from the same pass.
        inplace_backward: the backward pass overwrites ``logits`` with their gradient instead of allocating it. Other
            operations that saved the logits, and a second backward, then raise.

    Returns:
        The loss: shape (), or (N,) with reduction "none"; a pair (loss, stats) with ``return_stats``.

    Raises:
        TypeError: a tensor argument is no tensor or of an unsupported dtype.
        ValueError: a shape, a device or an option does not fit; ``target``, ``weight`` or ``row_weight`` requires a
            gradient.
        RuntimeError: on the CPU, a class index is out of range.

    Differentiable twice with respect to ``logits``; the second derivative is composed of PyTorch operations that hold
    (N, V) tensors. With ``inplace_backward`` it raises.

    Reference: Mao, Mohri, Zhong, *Cross-Entropy Loss Functions: Theoretical Analysis and Applications*, ICML 2023;
    Milakov, Gimelshein, *Online normalizer calculation for softmax*, arXiv 1805.02867.

    Example:
        >>> import torch, tilewise
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> loss = tilewise.cross_entropy(logits, torch.tensor([1, 3]))
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad[0].tolist()
        (1.3863, [0.125, -0.375, 0.125, 0.125])
    """
    rows.check_logits(OP, logits)
    if isinstance(target, Tensor) and target.is_floating_point():
        target = rows.check_probabilities(OP, target, logits.shape, ignore_index, logits)
    else:
        target = rows.check_class_index(OP, target, logits)
    if weight is not None:
        weight = rows.check_vector(OP, "weight", weight, logits.shape[1], logits)
    if row_weight is not None:
        row_weight = rows.check_vector(OP, "row_weight", row_weight, logits.shape[0], logits)
    given = ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction, inplace_backward
    options = {} if given == _DEFAULTS else _checked_options(*given)
    if inplace_backward:
        _check_overwritable(logits)
    if not return_stats:
        return _forward(logits, target, weight, row_weight, **options)[0]
    loss, _, lse, entropy, argmax = _forward_with_stats(logits, target, weight, row_weight, **options)
    if target.is_floating_point():
        correct = argmax == target.argmax(1)
    else:
        correct = (argmax == target) & (target != ignore_index)
    return loss, CrossEntropyStats(lse, entropy, argmax, correct)


def _checked_options(
    ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction, inplace_backward
) -> dict:
    rows.check_reduction(OP, reduction)
    return {
        "ignore_index": ignore_index,
        "label_smoothing": rows.check_number(OP, "label_smoothing", label_smoothing, low=0, high=1),
        "lse_square_scale": rows.check_number(OP, "lse_square_scale", lse_square_scale),
        "softcap": None if softcap is None else rows.check_positive(OP, "softcap", softcap),
        "logit_scale": rows.check_number(OP, "logit_scale", logit_scale),
        "reduction": reduction,
        "inplace_backward": inplace_backward,
    }


def _check_overwritable(logits: Tensor) -> None:
    """Elements that share memory (expanded dimensions) cannot each hold their own gradient; under a transform of
    torch.func a tensor is not one place in memory."""
    if not torch.compiler.is_compiling() and register.transforms_active():
        raise ValueError(f"tilewise.{OP}: inplace_backward is not available under torch.func transforms")
    (n, v), (row_stride, column_stride) = logits.shape, logits.stride()
    by_rows = (v == 1 or column_stride >= 1) and (n <= 1 or row_stride > (v - 1) * column_stride)
    by_columns = (n <= 1 or row_stride >= 1) and (v == 1 or column_stride > (n - 1) * row_stride)
    if not (by_rows or by_columns):
        raise ValueError(
            f"tilewise.{OP}: inplace_backward expects logits whose elements do not share memory, "
            f"got shape {(n, v)} with strides {(row_stride, column_stride)}"
        )


@register.fake(OP)
def _forward_fake(logits, target, weight, row_weight, *, reduction, **options):
    n = logits.shape[0]
    loss = logits.new_empty((n,) if reduction == "none" else (), dtype=statistics_dtype(logits))
    return loss, loss.new_empty(3 * n + 1)


@register.fake(WITH_STATS)
def _forward_with_stats_fake(logits, *arguments, **options):
    loss, state = _forward_fake(logits, *arguments, **options)
    n = logits.shape[0]
    return loss, state, state.new_empty(n), state.new_empty(n), logits.new_empty(n, dtype=torch.int64)


@register.fake("cross_entropy_backward")
def _backward_fake(grad_loss, grad_lse, grad_entropy, logits, *tensors, **options):
    return logits.new_empty(logits.shape)


@register.fake("cross_entropy_backward_")
def _backward_in_place_fake(*tensors, **options):
    return None


def _setup_context(ctx, inputs, options, output):
    _, state, *stats = output
    ctx.options = options
    ctx.inplace = options.pop("inplace_backward")
    ctx.save_for_backward(*inputs, stats[1] if stats else None, state)


def _backward(ctx, grad_loss, grad_lse=None, grad_entropy=None):
    logits, *saved = ctx.saved_tensors
    if not ctx.inplace:
        return _gradient(grad_loss, grad_lse, grad_entropy, logits, *saved, **ctx.options), None, None, None
    if torch.is_grad_enabled():
        raise RuntimeError(f"tilewise.{OP}: inplace_backward cannot be differentiated twice (create_graph=True)")
    gradient = logits.detach()
    _overwrite(grad_loss, grad_lse, grad_entropy, gradient, *saved, **ctx.options)
    return gradient, None, None, None


_jvp = derivatives.of_losses(OP, _backward, by_row=(0,))
register.autograd(OP, _backward, _setup_context, _jvp, outputs=(0,))
register.autograd(WITH_STATS, _backward, _setup_context, _jvp, outputs=(0, 2, 3))
derivatives.second(f"{OP}_backward", logits_gradient)
derivatives.refuse_derivative(f"{OP}_backward_", "expected no gradient through an operator that writes to its argument")
register.writes(f"{OP}_backward_", place=3)
