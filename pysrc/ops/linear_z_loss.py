"""linear_z_loss and its siblings: the spherical family of a linear layer, without its logits."""

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import derivatives, logits_free, register, rows  # noqa: F401  (logits_free registers the implementation)

FAMILY = ("linear_z_loss", "linear_taylor_softmax_loss", "linear_spherical_softmax_loss")
_z, _taylor, _spherical, _gradients = map(register.operator, (*FAMILY, "linear_spherical_backward"))


def linear_z_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    a: float,
    b: float,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`tilewise.z_loss` of the logits ``hidden @ weight.T + bias``, which are never formed.

    The mean and variance of a row of logits follow from the mean row of weight and its (d, d) Gram matrix. So loss and
    all gradients cost O((V + N) d**2) instead of O(N V d), and hold neither an (N, V) nor a second (V, d) matrix other
    than the gradient of weight. The variance of a row is a quadratic form: its relative error grows where it is much
    smaller than ``|hidden|**2`` times the largest eigenvalue of the Gram matrix.

    Args:
        hidden: (N, d), d >= 1, float64, float32, bfloat16 or float16; any strides. Used as given under autocast.
        weight: (V, d), V >= 1, of the same types, float64 exactly when hidden is; any strides.
        target: (N,) integer class indices in [0, V) or ``ignore_index``.
        bias: (V,), typed like weight, or None.
        a: positive sharpness, tuned per task; the authors' code used 1.
        b: offset of the target's z-score, tuned per task; the authors' code used 0.
        ignore_index: rows with this target give loss 0 and gradient 0 and do not count in the mean.
        reduction: "mean" over the kept rows (0 when there are none), "sum" or "none".

    Returns:
        The loss in float32 (float64 for float64 hidden): shape (), or (N,) with reduction "none". Gradients are
        accumulated in that type and rounded once; only those of tensors that require them are computed.

    Raises:
        TypeError: a tensor argument is no tensor or of an unsupported dtype.
        ValueError: a shape, a device or an option does not fit.
        RuntimeError: on the CPU, a class index is out of range (on a GPU that row's loss is NaN); the loss is
            differentiated twice.

    Reference: de Brebisson, Vincent, *The Z-loss: a shift and scale invariant classification loss belonging to the
    Spherical Family*, arXiv 1604.08859.

    Example:
        >>> import torch, tilewise
        >>> weight, hidden = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0]])
        >>> round(tilewise.linear_z_loss(hidden, weight, torch.tensor([2]), a=1.0, b=0.0).item(), 4)
        0.2576
    """
    arguments = _checked("linear_z_loss", hidden, weight, target, bias, reduction)
    a = rows.check_positive("linear_z_loss", "a", a)
    b = rows.check_number("linear_z_loss", "b", b)
    return _z(*arguments, a=a, b=b, ignore_index=ignore_index, reduction=reduction)[0]


def linear_taylor_softmax_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`tilewise.taylor_softmax_loss` of the logits ``hidden @ weight.T + bias``, which are never formed.

    Arguments, result, errors and costs as in :func:`tilewise.linear_z_loss`, without a and b.

    Reference: de Brebisson, Vincent, *An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family*,
    ICLR 2016, arXiv 1511.05042.

    Example:
        >>> import torch, tilewise
        >>> loss = tilewise.linear_taylor_softmax_loss(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([2]))
        >>> round(loss.item(), 4)
        1.3863
    """
    arguments = _checked("linear_taylor_softmax_loss", hidden, weight, target, bias, reduction)
    return _taylor(*arguments, ignore_index=ignore_index, reduction=reduction)[0]


def linear_spherical_softmax_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`tilewise.spherical_softmax_loss` of the logits ``hidden @ weight.T + bias``, which are never formed.

    Arguments, result, errors and costs as in :func:`tilewise.linear_z_loss`, without a and b.

    Args:
        eps: positive; bounds the loss of a target logit of 0.

    Reference: Vincent, de Brebisson, Bouthillier, *Efficient Exact Gradient Update for training Deep Networks with
    Very Large Sparse Targets*, NeurIPS 2015, arXiv 1412.7091.

    Example:
        >>> import torch, tilewise
        >>> loss = tilewise.linear_spherical_softmax_loss(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([2]))
        >>> round(loss.item(), 4)
        1.3863
    """
    arguments = _checked("linear_spherical_softmax_loss", hidden, weight, target, bias, reduction)
    eps = rows.check_positive("linear_spherical_softmax_loss", "eps", eps)
    return _spherical(*arguments, eps=eps, ignore_index=ignore_index, reduction=reduction)[0]


def _checked(op, hidden, weight, target, bias, reduction) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    for name, tensor in {"hidden": hidden, "weight": weight}.items():
        rows.check_matrix(op, name, tensor)
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"tilewise.{op}: expected weight to have at least one class and one column, got shape {tuple(weight.shape)}"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"tilewise.{op}: expected hidden to have {weight.shape[1]} columns like weight, "
            f"got shape {tuple(hidden.shape)}"
        )
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"tilewise.{op}: expected bias to be a tensor or None, got {type(bias).__name__}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"tilewise.{op}: expected bias to have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in parameters.items():
        rows.check_device(op, name, tensor, hidden, "hidden")
        if tensor.dtype not in rows.FLOATING or statistics_dtype(tensor) != statistics_dtype(hidden):
            expected = "float64" if hidden.dtype == torch.float64 else "float32, bfloat16, float16"
            raise TypeError(
                f"tilewise.{op}: expected {name} to be {expected} with {hidden.dtype} hidden, got {tensor.dtype}"
            )
    rows.check_reduction(op, reduction)
    return hidden, weight, rows.check_class_index(op, target, hidden, "hidden"), bias


def _forward_fake(hidden, weight, target, bias, *, reduction, **options):
    dtype, (n, d) = statistics_dtype(hidden), hidden.shape
    shapes = (n,) if reduction == "none" else (), (3, n), (d + 1, d), (d,), ()
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


@register.fake("linear_spherical_backward")
def _backward_fake(
    grad_loss, hidden, weight, target, bias, row_state, gram, mean, total, *,
    ignore_index, reduction, grad_hidden, grad_weight, grad_bias,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if grad_hidden else 0),
        weight.new_empty(weight.shape if grad_weight else 0),
        row_state.new_empty(0) if bias is None or not grad_bias else bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, options, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.options = {name: options[name] for name in ("ignore_index", "reduction")}


def _backward(ctx, grad_loss):
    hidden, weight, _, bias, *_ = ctx.needs_input_grad
    gradients = _gradients(
        grad_loss, *ctx.saved_tensors, **ctx.options, grad_hidden=hidden, grad_weight=weight, grad_bias=bias
    )
    d_hidden, d_weight, d_bias = (
        g if wanted else None for g, wanted in zip(gradients, (hidden, weight, bias), strict=True)
    )
    return d_hidden, d_weight, None, d_bias


@register.flops(*FAMILY)
def _forward_flops(hidden, weight, *_, out_shape, **options) -> int:
    """The Gram matrix of the weight, and its product with the hidden rows."""
    (n, d), classes = hidden, weight[0]
    return 2 * (n + classes) * d * d


@register.flops("linear_spherical_backward")
def _backward_flops(grad_loss, hidden, weight, *_, out_shape, grad_hidden, grad_weight, **options) -> int:
    (n, d), classes = hidden, weight[0]
    return 2 * d * d * (n * grad_hidden + (n + classes) * grad_weight)


for _op in FAMILY:
    register.fake(_op)(_forward_fake)
    register.autograd(_op, _backward, _setup_context, derivatives.of_losses(_op, _backward, by_row=(0,)), outputs=(0,))
derivatives.refuse_second("linear_spherical_backward", "linear_z_loss")
