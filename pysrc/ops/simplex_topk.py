"""simplex_topk: fakes, autograd, and the public function."""

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import register, rows, transport

OP = "simplex_topk"
_forward, _project = map(register.operator, (OP, f"{OP}_backward"))


def simplex_topk(x: Tensor, k: int, *, scale: float = 1.0) -> Tensor:
    r"""The nearest point of the simplex with at most k entries that are not 0, along the last dimension.

    .. math::
        p = \operatorname{argmin} \|x - p\|^2 \quad\text{over}\quad p \ge 0,\ \textstyle\sum_i p_i = \mathrm{scale},\
        \|p\|_0 \le k

    With k the size of the dimension it is sparsemax. Of equal entries the first count. The gradient is that of
    sparsemax on the support, g - mean(g), and 0 elsewhere; it jumps where the k-th and the following entry are equal.

    From "Sparsity-Constrained Optimal Transport" (Liu, Puigcerver, Blondel, 2023).

    Args:
        x: (..., n), float64 (on a CPU), float32, bfloat16 or float16 (these two are computed in float32), n >= 1.
        k: in [1, n].
        scale: > 0, the sum of p.

    Returns:
        p, like x. A row with a NaN, or with no finite largest entry, is NaN.

    Raises:
        ValueError: x has no last dimension, k or scale is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> tilewise.simplex_topk(torch.tensor([0.1, 1.0, 0.9, 0.8]), k=2)
        tensor([0.0000, 0.5500, 0.4500, 0.0000])
    """
    transport.check_tensor(OP, "x", x, "n", 1)
    size = x.shape[-1]
    rows.check_integer(OP, "k", k, high=size, of="the size of x")
    wide = x.to(statistics_dtype(x)).contiguous()
    scale = rows.check_positive(OP, "scale", scale, wide.dtype)
    return _forward(wide, k=k, scale=scale).to(x.dtype)


@register.fake("simplex_topk")
def _forward_fake(x, **options):
    return torch.empty_like(x)


@register.fake("simplex_topk_backward")
def _backward_fake(grad, p):
    return torch.empty_like(grad)


def _keep_result(ctx, inputs, options, output):
    ctx.save_for_backward(output)


def _keep_support(ctx, inputs, options, output):
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad):
    """A symmetric projection, constant in x as long as the support is: its own derivative, in either mode."""
    (p,) = ctx.saved_tensors
    return _project(grad.contiguous(), p)


register.autograd(OP, _backward, _keep_result, jvp=_backward)
register.autograd(
    f"{OP}_backward",
    lambda ctx, grad: (_backward(ctx, grad), None),
    _keep_support,
    jvp=lambda ctx, tangent, _: _backward(ctx, tangent),
)
