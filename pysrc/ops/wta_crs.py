"""Sampled matrix products: fakes, autograd, and the public functions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction, once_differentiable
from torch.nn import functional

from tilewise.ops import autocast, register, rows, transport
from tilewise.ops.row_sampling import gather_rows, row_norms, sample_rows

METHODS = ("systematic", "wta", "crs")


class RowSample(NamedTuple):
    """What :func:`tilewise.wta_crs_sample` returns: the rows of x from which weight gradients are estimated.

    Attributes:
        rows: (k, d_in), unscaled, of the dtype in which the layers compute.
        indices: (k,) int32, or None: all rows are there, and nothing is sampled.
        scales: (k,) float32, or None.
    """

    rows: Tensor
    indices: Tensor | None
    scales: Tensor | None


def wta_crs_sample(
    x: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    norms: Tensor | None = None,
    seed: int | Tensor | None = None,
    method: str = "systematic",
    mix: float = 0.05,
) -> RowSample:
    r"""Chooses k rows of the input of a linear layer, of all its batch dimensions jointly.

    Row i counts by its share of the sizes of its summand, :math:`p_i \propto |x_i| |y_i|` with y the gradient of the
    output, mixed with a little uniform share. The largest are kept for certain, as long as
    :math:`p_i \ge (1 - P_C) / (k - |C|)`; the other places are drawn from the rest, and scaled so that the estimate is
    unbiased, whatever the norms were. Layers with one input (q, k and v, or gate and up) should share one sample:
    three samples are three times the memory.

    From "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model" (Liu et al., 2023).

    Args:
        x: (..., d_in), float64 (on a CPU), float32, bfloat16 or float16; n rows.
        k: in [1, 2^31), how many; with k >= n nothing is sampled and the gradient is exact.
        ratio: in (0, 1], instead of k: of ceil(ratio n) rows.
        norms: (n,) or x.shape[:-1], >= 0, any floating dtype: an estimate of :math:`|y_i|`, such as that of the last
            visit; None: all equal.
        seed: an integer in [0, 2^63), or an int64 tensor of one element on the device of x. The same seed means the
            same rows on every backend, which is why a gradient may be recomputed. None: drawn from torch's generator.
        method: "systematic": at equal distances along the running sums of p, without replacement; "wta": with
            replacement, as in the paper; "crs": with replacement from all rows, none for certain.
        mix: in [0, 1], the uniform share; it bounds the scales by n / (k mix).

    Returns:
        A :class:`~tilewise.RowSample`, to be given to :func:`tilewise.wta_crs_linear`. On a GPU a negative or NaN norm
        makes the scales NaN.

    Raises:
        ValueError: a shape, a device or an option is not as above, or not one of k and ratio is given.
        TypeError: a dtype is not as above.
        RuntimeError: on a CPU: a norm is negative, infinite or NaN.

    Example:
        >>> import torch, tilewise
        >>> x, wq, wk = torch.randn(2, 50, 8), torch.randn(8, 8), torch.randn(8, 8)
        >>> sample = tilewise.wta_crs_sample(x, ratio=0.1)
        >>> sample.rows.shape
        torch.Size([10, 8])
        >>> q, k = (tilewise.wta_crs_linear(x, w, sample=sample) for w in (wq.requires_grad_(), wk.requires_grad_()))
    """
    (x,) = autocast.lower(x)
    return _choose("wta_crs_sample", x, k, ratio, norms, seed, method, mix)


def wta_crs_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int | None = None,
    ratio: float | None = None,
    norms: Tensor | None = None,
    seed: int | Tensor | None = None,
    method: str = "systematic",
    mix: float = 0.05,
    sample: RowSample | None = None,
    record: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""torch.nn.functional.linear that keeps k of the n rows of x for the backward.

    The result, and the gradients of x and of the bias, are those of torch, bit by bit. The gradient of the weight,
    :math:`\sum_i y_i x_i^T` with y the gradient of the result, is estimated without bias from a sample of the rows
    (:func:`tilewise.wta_crs_sample`): the backward needs k (d_in e + 8) bytes instead of n d_in e, e bytes an element,
    and one of the three matrix products of a step shrinks to k/n, so that a step takes at least (2 + k/n) / 3 of the
    time. Where the weight needs no gradient nothing is sampled. It can be differentiated once.

    From "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model" (Liu et al., 2023).

    Args:
        x: (..., d_in), float64 (on a CPU), float32, bfloat16 or float16. Of float16 the gradient's rows are scaled by
            about n/k: a gradient scaler settles lower.
        weight: (d_out, d_in).
        bias: (d_out,).
        k, ratio, norms, seed, method, mix: as for :func:`tilewise.wta_crs_sample`.
        sample: of this x, instead of all these.
        record: (table, ids), a floating table (samples, tokens) and int64 ids (b,) in [0, samples), where x has b times
            t rows, t at most tokens: the backward writes the norms :math:`|y_i|` of the j-th t rows to table[ids[j],
            :t]. Of equal ids one counts.

    Returns:
        (..., d_out).

    Raises:
        ValueError: a shape, a device or an option is not as above.
        TypeError: a dtype is not as above.
        RuntimeError: on a CPU: a norm is negative, infinite or NaN; or the gradient is differentiated again.

    Example:
        >>> import torch, tilewise
        >>> x, weight = torch.randn(2, 50, 8), torch.randn(4, 8, requires_grad=True)
        >>> tilewise.wta_crs_linear(x, weight, ratio=0.1).square().sum().backward()
        >>> weight.grad.shape
        torch.Size([4, 8])
    """
    op = "wta_crs_linear"
    (x,) = autocast.lower(x)  # the product casts the weight, and keeps what it cast
    transport.check_tensor(op, "x", x, "d_in", 1)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"tilewise.{op}: expected weight to have shape (d_out, {x.shape[-1]}), got {got}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            rows.check_device(op, name, tensor, x, "x")
            if tensor.dtype != x.dtype and not autocast.enabled(x.device.type):
                raise TypeError(f"tilewise.{op}: expected {name} to be {x.dtype} like x, got {tensor.dtype}")
    if sample is not None and (k is not None or ratio is not None):
        raise ValueError(f"tilewise.{op}: expected k, ratio or sample, got more than one")
    n = math.prod(x.shape[:-1])
    if record is not None:
        check_record(op, record, x, n)
    if sample is None:  # what is wrong is wrong where nothing is sampled, too
        k = check_choice(op, x, n, k, ratio, norms, method, mix)
        check_seed(op, seed, x)
    else:
        _check_sample(op, sample, x)
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return functional.linear(x, weight, bias)
    if sample is None:
        sample = _chosen(op, x, n, k, norms, seed, method, mix)
    if sample.indices is None and record is None:
        return functional.linear(x, weight, bias)
    y = _linear_of_constant(x, weight.detach(), bias)
    traced = torch.compiler.is_compiling() or register.transforms_active()
    return (_SampledWeightGradient if traced else _Direct).apply(y, weight, *sample, *(record or (None, None)))


def _choose(
    op: str,
    x: Tensor,
    k: int | None,
    ratio: float | None,
    norms: Tensor | None,
    seed: int | Tensor | None,
    method: str,
    mix: float,
) -> RowSample:
    transport.check_tensor(op, "x", x, "d_in", 1)
    n = math.prod(x.shape[:-1])
    k = check_choice(op, x, n, k, ratio, norms, method, mix)
    check_seed(op, seed, x)
    return _chosen(op, x, n, k, norms, seed, method, mix)


def _chosen(
    op: str, x: Tensor, n: int, k: int, norms: Tensor | None, seed: int | Tensor | None, method: str, mix: float
) -> RowSample:
    """The sample of checked arguments."""
    x = x.detach().reshape(-1, x.shape[-1])
    if k >= n:
        return RowSample(x, None, None)
    if norms is not None:
        norms = norms.detach().to(torch.float32).reshape(1, n).contiguous()
    x = x[None]
    options = {"k": k, "method": method, "mix": float(mix)}
    indices, scales = sample_rows(row_norms(x), norms, seed_tensor(seed, x), **options)
    return RowSample(gather_rows(x, indices)[0], indices[0], scales[0])


def _check_sample(op: str, sample: RowSample, x: Tensor) -> None:
    if sample.rows.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"tilewise.{op}: expected the sample to have rows of {x.shape[-1]}, got {sample.rows.shape[-1]}"
        )
    for part in sample:
        if part is not None:
            rows.check_device(op, "the sample", part, x, "x")


def _linear_of_constant(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product that torch takes for a weight with a gradient: of strided x of three dimensions it takes another for
    a constant, with other rounding."""
    if x.dim() < 3 or x.is_contiguous():
        return functional.linear(x, weight, bias)
    y = functional.linear(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class _SampledWeightGradient(torch.autograd.Function):
    """y as it is; on its way back its gradient leaves an estimate of that of the weight, and its norms in a table."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, weight, sampled, indices, scales, table, ids):
        # Not a view to autograd, which would refuse the relu_ that often follows. Nothing else holds y.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, *sample, table, ids = inputs
        ctx.save_for_backward(*sample, ids)
        ctx.dtype, ctx.table = weight.dtype, table

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        sampled, indices, scales, ids = ctx.saved_tensors
        by_rows = grad.reshape(-1, grad.shape[-1])[None]
        if ctx.table is not None:
            norms = row_norms(by_rows).reshape(len(ids), -1)
            ctx.table[without_wrapping(ids, len(ctx.table)), : norms.shape[1]] = norms.to(ctx.table.dtype)
        chosen = by_rows if indices is None else gather_rows(by_rows, indices[None], scales[None])
        of_weight = chosen[0].t() @ sampled.to(grad.dtype)
        return grad, of_weight.to(ctx.dtype), None, None, None, None, None


class _Direct(_SingleLevelFunction):
    """The same where nothing transforms or traces, without the signatures that autograd.Function reads each time."""

    forward = staticmethod(_SampledWeightGradient.forward)
    setup_context = staticmethod(_SampledWeightGradient.setup_context)
    backward = staticmethod(_SampledWeightGradient.backward)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError("tilewise.wta_crs_linear: no forward mode where the weight records its gradient")


def wta_crs_matmul(
    a: Tensor, b: Tensor, *, k: int, seed: int | Tensor | None = None, method: str = "systematic", mix: float = 0.05
) -> Tensor:
    r"""An unbiased estimate of a @ b from k of its n column-row pairs, chosen for every product of a batch.

    Pair i counts by :math:`p_i \propto |a_{:i}| |b_i|`; else as :func:`tilewise.wta_crs_sample`. With p so, the
    variance of "crs" is :math:`(\Lambda^2 - |ab|^2) / k`, :math:`\Lambda = \sum |a_{:i}| |b_i|`, and that of "wta"
    :math:`(\Lambda^2 (1 - P_C)^2 - |\mathrm{rest}|^2) / (k - |C|)`. The gradients are those of the estimate, unbiased
    estimates of a product's: only the k pairs are kept for them, and only their entries get any.

    From "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model" (Liu et al., 2023).

    Args:
        a: (..., m, n), float64 (on a CPU), float32, bfloat16 or float16.
        b: (..., n, p) of the same dtype (under autocast, of any) and batch.
        k: in [1, 2^31), pairs of each product; with k >= n the result is exact.
        seed, method, mix: as for :func:`tilewise.wta_crs_sample`.

    Returns:
        (..., m, p).

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> a, b = torch.randn(4, 16, 100), torch.randn(4, 100, 8)
        >>> tilewise.wta_crs_matmul(a, b, k=20).shape
        torch.Size([4, 16, 8])
    """
    op = "wta_crs_matmul"
    a, b = autocast.lower(a, b)
    transport.check_tensor(op, "a", a, "m, n", 2)
    transport.check_tensor(op, "b", b, "n, p", 2)
    n = a.shape[-1]
    if b.shape[:-1] != (*a.shape[:-2], n) or b.dtype != a.dtype:
        expected = ", ".join(map(str, (*a.shape[:-2], n)))
        raise ValueError(
            f"tilewise.{op}: expected b to be {a.dtype} of shape ({expected}, p), got {b.dtype} {tuple(b.shape)}"
        )
    rows.check_device(op, "b", b, a, "a")
    k = check_count(op, n, k, None)
    check_options(op, method, mix)
    check_seed(op, seed, a)
    if k >= n:
        return a @ b
    columns, pairs = a.mT.flatten(0, -3) if a.dim() > 2 else a.mT[None], b.reshape(-1, *b.shape[-2:])
    a_norms, b_norms = (row_norms(t.detach()) for t in (columns, pairs))
    options = {"k": k, "method": method, "mix": float(mix)}
    indices, scales = sample_rows(a_norms, b_norms, seed_tensor(seed, a), **options)
    left = gather_rows(columns, indices, scales)
    product = left.mT @ gather_rows(pairs, indices)
    return product.reshape(*a.shape[:-1], b.shape[-1])


def check_count(op: str, n: int, k: int | None, ratio: float | None) -> int:
    if (k is None) == (ratio is None):
        raise ValueError(f"tilewise.{op}: expected either k or ratio, got k={k!r} and ratio={ratio!r}")
    if k is not None:
        return rows.check_integer(op, "k", k, high=2**31 - 1, of="rows")
    return max(1, math.ceil(check_ratio(op, ratio) * n))


def check_ratio(op: str, ratio: float) -> float:
    if isinstance(ratio, Tensor) or not 0 < ratio <= 1:
        raise ValueError(f"tilewise.{op}: expected ratio to be a number in (0, 1], got {ratio!r}")
    return float(ratio)


def check_options(op: str, method: str, mix: float) -> None:
    if method not in METHODS:
        raise ValueError(f"tilewise.{op}: expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if isinstance(mix, Tensor) or not 0 <= mix <= 1:
        raise ValueError(f"tilewise.{op}: expected mix to be a number in [0, 1], got {mix!r}")


def check_choice(
    op: str, x: Tensor, n: int, k: int | None, ratio: float | None, norms: Tensor | None, method: str, mix: float
) -> int:
    """How many of n rows."""
    check_options(op, method, mix)
    if norms is not None:
        check_norms(op, norms, x, n)
    return check_count(op, n, k, ratio)


def check_norms(op: str, norms: Tensor, x: Tensor, n: int) -> None:
    if not isinstance(norms, Tensor) or not norms.is_floating_point():
        got = norms.dtype if isinstance(norms, Tensor) else type(norms).__name__
        raise TypeError(f"tilewise.{op}: expected norms to be a floating tensor or None, got {got}")
    if norms.numel() != n:
        raise ValueError(f"tilewise.{op}: expected norms to have {n} elements, one for a row, got {tuple(norms.shape)}")
    rows.check_device(op, "norms", norms, x, "x")


def check_record(op: str, record: tuple[Tensor, Tensor], x: Tensor, n: int) -> None:
    table, ids = record
    if table.dim() != 2 or not table.is_floating_point() or ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(
            f"tilewise.{op}: expected record to be a floating table (samples, tokens) and int64 ids (b,), "
            f"got {table.dtype} {tuple(table.shape)} and {ids.dtype} {tuple(ids.shape)}"
        )
    if len(ids) == 0 or n % len(ids) or n // len(ids) > table.shape[1]:
        raise ValueError(
            f"tilewise.{op}: expected {n} rows to be those of {len(ids)} samples with at most {table.shape[1]} tokens"
        )
    for name, tensor in (("the table of record", table), ("the ids of record", ids)):
        rows.check_device(op, name, tensor, x, "x")


def without_wrapping(ids: Tensor, size: int) -> Tensor:
    """Indices of which a negative one is out of range, too, and not one from the end."""
    return torch.where(ids < 0, size, ids)


def check_seed(op: str, seed: int | Tensor | None, like: Tensor) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"tilewise.{op}: expected seed to be int64 with one element, got {seed.dtype} {tuple(seed.shape)}"
            )
        rows.check_device(op, "seed", seed, like, "x")
    elif seed is not None:
        rows.check_integer(op, "seed", seed, low=0, high=2**63 - 1, of="int64")


def seed_tensor(seed: int | Tensor | None, like: Tensor) -> Tensor:
    """A checked seed on the device, without waiting for it."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=like.device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=like.device)


register.implicit("wta_crs_linear", wta_crs_linear)
register.implicit("wta_crs_matmul", wta_crs_matmul)
