"""mala: fake, autograd, and the public function."""

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import autocast, derivatives, register, rows

OP = "mala"
_forward, _gradients = map(register.operator, (OP, f"{OP}_backward"))
State = tuple[Tensor, Tensor, Tensor, int]


def mala(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    rope: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    r"""Magnitude-aware linear attention: O(N) in the number of tokens, with weights that depend on the query's size.

    With :math:`\phi(x) = \mathrm{elu}(x) + 1`, n keys, means over keys and an optional rotation R after :math:`\phi`,

    .. math::
        z_i = scale\, \phi(q_i) \cdot \overline{\phi(k)}, \qquad
        o_i = \Bigl(1 + \frac1{z_i + eps}\Bigr) \frac{scale}n \sum_j (R\phi(q_i) \cdot R\phi(k_j)) v_j - z_i \bar v

    whose weights sum to 1 without rotation. Saved for the backward: the inputs, and when not causal D Dv + D + Dv
    numbers per head.

    From "Rectifying Magnitude Neglect in Linear Attention" (Fan et al., 2025). The causal form is the same over the
    keys up to each query.

    Args:
        q: (B, H, N, D), float64 (on a CPU), float32, bfloat16 or float16; any strides, the last of them 1 (a copy is
            made otherwise), so that a view of (B, N, H, D) costs nothing.
        k: (B, Hk, M, D) of the same dtype, H a multiple of Hk; M = N when causal.
        v: (B, Hk, M, Dv) of the same dtype.
        causal: query i sees the keys up to i.
        scale: of the similarities; None is D ** -0.5.
        eps: added to z in the division.
        rope: (cos, sin), each (max(N, M), D/2), the angles by which the pairs (x_2i, x_2i+1) of the features rotate;
            constants. With packed sequences positions start again in each.
        cu_seqlens: (sequences + 1,) int64 or int32: with B = 1, where each packed sequence begins, from 0 to N.
        cu_seqlens_k: the same for keys when not causal; None is cu_seqlens. On a GPU the values are not checked.
        state: of an earlier causal call, whose tokens come before these; constants.
        return_state: also return the state after the last token, to go on from: decoding is one token at a time.

    Returns:
        (B, H, N, Dv) in the dtype of q; with return_state also (S (B, Hk, D, Dv), Z (B, Hk, D), U (B, Hk, Dv), tokens),
        float32 or better. Under autocast q, k and v are cast first, as in :func:`torch.matmul`.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> q, k, v = torch.randn(3, 2, 4, 100, 32).unbind()
        >>> tilewise.mala(q, k, v, causal=True).shape
        torch.Size([2, 4, 100, 32])
    """
    q, k, v = autocast.lower(q, k, v)
    _check(q, k, v, causal)
    scale = q.shape[3] ** -0.5 if scale is None else rows.check_number(OP, "scale", scale)
    eps = rows.check_number(OP, "eps", eps, low=0.0)
    if (state is not None or return_state) and not causal:
        raise ValueError(f"tilewise.{OP}: expected causal=True with a state, got causal=False")
    if (state is not None or return_state) and cu_seqlens is not None:
        raise ValueError(f"tilewise.{OP}: expected no cu_seqlens with a state, got both")
    given = q.dtype
    wide = q.dtype if q.is_cuda else statistics_dtype(q)  # the C++ kernels compute in float32 or float64
    q, k, v = (_unit_stride(t.to(wide)) for t in (q, k, v))
    cos, sin = _angles(rope, q, k)
    bounds = _bounds(cu_seqlens, cu_seqlens_k, q, k, causal)
    before, seen = _state(state, q, v)
    out, *after = _forward(q, k, v, cos, sin, *bounds, *before, causal=causal, scale=scale, eps=eps, seen=seen)
    out = out.to(given)
    return (out, (*after, seen + q.shape[2])) if return_state else out


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tilewise.{OP}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"tilewise.{OP}: expected {name} to have shape (batch, heads, tokens, features), "
                f"got {tuple(tensor.shape)}"
            )
        rows.check_floating(OP, name, tensor)
        if tensor.dtype != q.dtype:
            raise TypeError(f"tilewise.{OP}: expected {name} to be {q.dtype} like q, got {tensor.dtype}")
        rows.check_device(OP, name, tensor, q, "q")
    if q.shape[3] == 0 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"tilewise.{OP}: expected k to have shape ({q.shape[0]}, heads, tokens, {q.shape[3]}) like q, at least one "
            f"feature, got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"tilewise.{OP}: expected v to have shape {(*k.shape[:3], 'Dv')} like k, got {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"tilewise.{OP}: expected the heads of q to be a multiple of those of k, got {q.shape[1]} and {k.shape[1]}"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"tilewise.{OP}: expected as many queries as keys when causal, got {q.shape[2]} and {k.shape[2]}"
        )


def _angles(rope, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    if not isinstance(rope, tuple) or len(rope) != 2:
        raise TypeError(f"tilewise.{OP}: expected rope to be a tuple (cos, sin), got {type(rope).__name__}")
    shape = (max(q.shape[2], k.shape[2]), q.shape[3] // 2)
    for name, tensor in zip(("cos", "sin"), rope, strict=True):
        if q.shape[3] % 2 or tensor.shape != shape:
            raise ValueError(
                f"tilewise.{OP}: expected {name} of rope to have shape {shape}, and an even number of features, "
                f"got {tuple(tensor.shape)} and {q.shape[3]} features"
            )
        rows.check_device(OP, f"{name} of rope", tensor, q, "q")
        rows.check_constant(OP, f"{name} of rope", tensor)
    return tuple(tensor.to(statistics_dtype(q)).contiguous() for tensor in rope)


def _bounds(cu_seqlens, cu_seqlens_k, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor | None, Tensor | None]:
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"tilewise.{OP}: expected cu_seqlens with cu_seqlens_k, got None")
        return None, None
    if causal and cu_seqlens_k is not None:
        raise ValueError(f"tilewise.{OP}: expected no cu_seqlens_k when causal: queries and keys are the same tokens")
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for name, tensor in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1 or tensor.shape[0] < 1:
            raise ValueError(
                f"tilewise.{OP}: expected {name} to be int64 or int32 of shape (sequences + 1,), "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        rows.check_device(OP, name, tensor, q, "q")
    if q.shape[0] != 1:
        raise ValueError(f"tilewise.{OP}: expected a batch of 1 with cu_seqlens, got {q.shape[0]}")
    if cu_seqlens.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"tilewise.{OP}: expected cu_seqlens_k to have shape {tuple(cu_seqlens.shape)} like cu_seqlens, "
            f"got {tuple(cu_seqlens_k.shape)}"
        )
    return cu_seqlens.long().contiguous(), cu_seqlens_k.long().contiguous()


def _state(state: State | None, q: Tensor, v: Tensor) -> tuple[tuple[Tensor | None, ...], int]:
    if state is None:
        return (None, None, None), 0
    *sums, seen = state
    b, hk, d, dv = q.shape[0], v.shape[1], q.shape[3], v.shape[3]
    for name, tensor, shape in zip("SZU", sums, ((b, hk, d, dv), (b, hk, d), (b, hk, dv)), strict=True):
        if tensor.shape != shape or tensor.dtype != statistics_dtype(q):
            raise ValueError(
                f"tilewise.{OP}: expected {name} of state to be {statistics_dtype(q)} of shape {shape}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        rows.check_constant(OP, f"{name} of state", tensor)
    if not 0 <= seen < 2**62:
        raise ValueError(f"tilewise.{OP}: expected the keys seen of state to be a count below 2^62, got {seen}")
    return tuple(tensor.contiguous() for tensor in sums), int(seen)


def _state_shapes(q: Tensor, v: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n = q.shape[0] if bounds is None else bounds.shape[0] - 1
    hk, d, dv = v.shape[1], q.shape[3], v.shape[3]
    return tuple(q.new_empty(s, dtype=statistics_dtype(q)) for s in ((n, hk, d, dv), (n, hk, d), (n, hk, dv)))


@register.fake("mala")
def _forward_fake(q, k, v, cos, sin, q_bounds, *tensors, **options):
    return q.new_empty((*q.shape[:3], v.shape[3])), *_state_shapes(q, v, q_bounds)


@register.fake("mala_backward")
def _backward_fake(grad_out, q, k, v, *tensors, **options):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, options, output):
    ctx.options = options
    start = inputs[7:] if options["causal"] else output[1:]
    ctx.save_for_backward(*inputs[:7], *start)


def _backward(ctx, grad_out):
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    gradients = _gradients(grad_out, *ctx.saved_tensors, **ctx.options)
    return (*gradients, *(None,) * 7)


@register.flops(OP)
def _forward_flops(q, k, v, *_, out_shape, **options) -> int:
    """The sums over keys, and their products with queries."""
    return 2 * (q.numel() + k.numel()) * v[-1]


@register.flops(f"{OP}_backward")
def _backward_flops(grad_out, q, k, v, *_, out_shape, **options) -> int:
    return 2 * _forward_flops(q, k, v, out_shape=None)


register.autograd(OP, _backward, _setup_context, outputs=(0,))
derivatives.refuse_second(f"{OP}_backward", OP)
