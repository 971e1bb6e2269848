"""z_loss, taylor_softmax_loss, spherical_softmax_loss: losses of the target logit and the row's mean and variance."""

from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import derivatives, register, rows

FAMILY = ("z_loss", "taylor_softmax_loss", "spherical_softmax_loss")
_z, _taylor, _spherical, _gradient = map(register.operator, (*FAMILY, "spherical_family_backward"))


def z_loss(
    logits: Tensor, target: Tensor, *, a: float, b: float, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Z-loss: ``softplus(a (b - z)) / a`` of the standardised target logit ``z = (o_c - mean(o)) / std(o)``.

    mean and std (with denominator V) run over the row. The loss does not change when a row is shifted or scaled. A
    constant row has loss ``softplus(a b) / a`` and gradient 0. Not the auxiliary ``lse**2`` term of large language
    models: that is ``lse_square_scale`` of :func:`tilewise.cross_entropy`.

    Args:
        logits: (N, V), V >= 1, float32, bfloat16, float16 or (on the CPU) float64; any strides.
        target: (N,) integer class indices in [0, V) or ``ignore_index``.
        a: positive sharpness, tuned per task; the authors' code used 1.
        b: offset of the target's z-score, tuned per task; the authors' code used 0.
        ignore_index: rows with this target give loss 0 and gradient 0 and do not count in the mean.
        reduction: "mean" over the kept rows (0 when there are none), "sum" or "none".

    Returns:
        The loss in float32 (float64 for float64 logits): shape (), or (N,) with reduction "none".

    Raises:
        TypeError: a tensor argument is no tensor or of an unsupported dtype.
        ValueError: a shape, a device or an option does not fit.
        RuntimeError: on the CPU, a class index is out of range (on a GPU that row's loss is NaN); the loss is
            differentiated twice.

    Reference: de Brebisson, Vincent, *The Z-loss: a shift and scale invariant classification loss belonging to the
    Spherical Family*, arXiv 1604.08859.

    Example:
        >>> import torch, tilewise
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(tilewise.z_loss(logits, torch.tensor([2]), a=1.0, b=0.0).item(), 4)
        0.2576
    """
    arguments = _checked("z_loss", logits, target, reduction)
    a = rows.check_positive("z_loss", "a", a)
    b = rows.check_number("z_loss", "b", b)
    return _z(*arguments, a=a, b=b, ignore_index=ignore_index, reduction=reduction)[0]


def taylor_softmax_loss(logits: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    r"""Negative log of the Taylor softmax, ``-log(n(o_c) / sum_k n(o_k))`` with ``n(o) = 1 + o + o**2 / 2``.

    Arguments, result and errors as in :func:`tilewise.z_loss`, without a and b.

    Reference: de Brebisson, Vincent, *An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family*,
    ICLR 2016, arXiv 1511.05042.

    Example:
        >>> import torch, tilewise
        >>> round(tilewise.taylor_softmax_loss(torch.zeros(1, 4), torch.tensor([2])).item(), 4)
        1.3863
    """
    arguments = _checked("taylor_softmax_loss", logits, target, reduction)
    return _taylor(*arguments, ignore_index=ignore_index, reduction=reduction)[0]


def spherical_softmax_loss(
    logits: Tensor, target: Tensor, *, eps: float = 1e-6, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Negative log of the spherical softmax, ``-log((o_c**2 + eps) / sum_k (o_k**2 + eps))``.

    Arguments, result and errors as in :func:`tilewise.z_loss`, without a and b.

    Args:
        eps: positive; bounds the loss of a target logit of 0.

    Reference: Vincent, de Brebisson, Bouthillier, *Efficient Exact Gradient Update for training Deep Networks with
    Very Large Sparse Targets*, NeurIPS 2015, arXiv 1412.7091.

    Example:
        >>> import torch, tilewise
        >>> round(tilewise.spherical_softmax_loss(torch.ones(1, 4), torch.tensor([2])).item(), 4)
        1.3863
    """
    arguments = _checked("spherical_softmax_loss", logits, target, reduction)
    eps = rows.check_positive("spherical_softmax_loss", "eps", eps)
    return _spherical(*arguments, eps=eps, ignore_index=ignore_index, reduction=reduction)[0]


def _checked(op: str, logits: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    rows.check_logits(op, logits)
    rows.check_reduction(op, reduction)
    return logits, rows.check_class_index(op, target, logits)


def _forward_fake(logits, target, *, reduction, **options):
    n = logits.shape[0]
    loss = logits.new_empty((n,) if reduction == "none" else (), dtype=statistics_dtype(logits))
    return loss, loss.new_empty(4 * n + 1)


@register.fake("spherical_family_backward")
def _backward_fake(grad_loss, logits, target, state, **options):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, options, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.options = {name: options[name] for name in ("ignore_index", "reduction")}


def _backward(ctx, grad_loss):
    return _gradient(grad_loss, *ctx.saved_tensors, **ctx.options), None


for _op in FAMILY:
    register.fake(_op)(_forward_fake)
    register.autograd(_op, _backward, _setup_context, derivatives.of_losses(_op, _backward, by_row=(0,)), outputs=(0,))
derivatives.refuse_second("spherical_family_backward", "z_loss")
