"""sparse_ot_points: fakes, autograd, and the public function over two sets of points."""

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.formulas.sparse_transport import solve
from tilewise.ops import autocast, register, transport
from tilewise.ops.sparse_ot import (
    DIFFERENTIABLE,
    SparseOTResult,
    check_problem,
    gradients,
    keep_solution,
    solved_shapes,
)

OP = "sparse_ot_points"
_solve, _solve_costs, _columns = map(register.operator, (OP, "sparse_ot", "sparse_ot_columns"))
COSTS = ("sqeuclidean", "euclidean")
CHUNK_BYTES = 64 << 20


def sparse_ot_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    k: int,
    gamma: float = 1.0,
    cost: str = "sqeuclidean",
    method: str = "semi_dual",
    max_iter: int = 500,
    tol: float = 1e-6,
    init: tuple[Tensor, Tensor] | None = None,
) -> SparseOTResult:
    """:func:`tilewise.sparse_ot` between two sets of weighted points, in O((m + n) d + n k) memory.

    The costs of as many columns as 64 MiB hold are formed at a time; where that is all of them, once.

    From "Sparsity-Constrained Optimal Transport" (Liu, Puigcerver, Blondel, 2023).

    Args:
        x: (..., m, d), float64 (on a CPU), float32, bfloat16 or float16 (these two are computed in float32).
        y: (..., n, d).
        a: (..., m) or a shape that broadcasts to it, >= 0; None is 1/m each.
        b: (..., n), with the same sum as a; None is 1/n each.
        k: in [1, m], and k n at least the number of rows with mass.
        gamma: > 0, in units of the cost.
        cost: "sqeuclidean", |x - y|^2, or "euclidean", |x - y|.
        method, max_iter, tol, init: as in :func:`tilewise.sparse_ot`.

    Returns:
        A :class:`~tilewise.SparseOTResult`, differentiable in x, y, a and b.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> x, y = torch.randn(100, 2), torch.randn(80, 2)
        >>> tilewise.sparse_ot_points(x, y, k=5).values.shape
        torch.Size([80, 5])
    """
    x, y = autocast.widen(x, y)
    transport.check_tensor(OP, "x", x, "m, d", 2)
    transport.check_tensor(OP, "y", y, "n, d", 2)
    batch, (m, d), n = x.shape[:-2], x.shape[-2:], y.shape[-2]
    if y.shape != (*batch, n, d) or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"tilewise.{OP}: expected y to be {x.dtype} on {x.device} of shape {(*batch, 'n', d)} like x, "
            f"got {y.dtype} on {y.device} of shape {tuple(y.shape)}"
        )
    if cost not in COSTS:
        raise ValueError(f"tilewise.{OP}: expected cost to be 'sqeuclidean' or 'euclidean', got {cost!r}")
    problem = check_problem(OP, x, batch, m, n, a, b, k=k, gamma=gamma, method=method, max_iter=max_iter, tol=tol,
                            init=init)  # fmt: skip
    x, y = (t.to(statistics_dtype(t)).reshape(-1, t.shape[-2], d).contiguous() for t in (x, y))
    return problem.result(_solve(x, y, *problem.tensors, cost=cost, chunk_bytes=CHUNK_BYTES, **problem.options))


def _costs(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """By columns, (B, n, m)."""
    if cost == "euclidean":
        return torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist")
    squares = (y * y).sum(2)[:, :, None] + (x * x).sum(2)[:, None]
    return torch.baddbmm(squares, y, x.mT, alpha=-2).clamp_(min=0)


def _check_values(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> None:
    """Of tensors on a CPU, where looking at them waits for nothing; blocks of columns are not looked at again."""
    for name, points in (("x", x), ("y", y)):
        if not bool(points.isfinite().all()):
            raise RuntimeError(f"tilewise.{OP}: expected {name} to hold finite numbers, got NaN or another")
    for name, weights in (("a", a), ("b", b)):
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise RuntimeError(f"tilewise.{OP}: expected {name} to hold finite numbers >= 0")
    sums = [weights.double().sum(1) for weights in (a, b)]
    if not torch.allclose(*sums, rtol=1e-4, atol=0.0):
        raise RuntimeError(f"tilewise.{OP}: expected a and b to have equal sums, got {sums[0]} and {sums[1]}")


def _points(x, y, a, b, alpha, beta, *, cost, k, gamma, chunk_bytes, **options):
    """The costs of all columns at once where they are few, else block by block, anew at every evaluation."""
    if not x.is_cuda:
        _check_values(x, y, a, b)
    centre = x.mean(1, keepdim=True)  # products of points far from 0 would cancel
    x, y = x - centre, y - centre
    count = max(1, (chunk_bytes or CHUNK_BYTES) // (x.element_size() * x.shape[0] * x.shape[1]))
    if count >= y.shape[1]:
        return _solve_costs(_costs(x, y, cost), a, b, alpha, beta, k=k, gamma=gamma, **options)
    dual = options["method"] == "dual"

    def evaluate(alpha, level):
        parts, sums = [], torch.zeros_like(alpha)
        for part, of_part in zip(y.split(count, 1), level.split(count, 1), strict=True):
            *lists, row_sums, margin = _columns(
                _costs(x, part, cost), alpha, of_part.contiguous(), k=k, gamma=gamma, dual=dual
            )
            sums += row_sums
            parts.append((*lists, margin))
        values, indices, beta, margin = (torch.cat(blocks, 1) for blocks in zip(*parts, strict=True))
        return values, indices, beta, sums, margin

    return solve(evaluate, a, b, alpha, beta, gamma=gamma, **options)


@register.fake("sparse_ot_points")
def _forward_fake(x, y, *tensors, k, **options):
    return solved_shapes(x, x.shape[1], y.shape[1], k)


def _setup_context(ctx, inputs, options, output):
    keep_solution(ctx, inputs[:2], options, output)


def _backward(ctx, grad_values, grad_value):
    x, y, values, indices, alpha, beta = ctx.saved_tensors
    entries, grad_a, grad_b = gradients(
        grad_value, grad_values, values, indices, alpha, beta, gamma=ctx.options["gamma"]
    )
    grad_x, grad_y = entries.new_zeros(x.shape), entries.new_zeros(y.shape)
    for slot in range(values.shape[2]):  # an entry of every column at a time: O(n d) memory
        where = indices[:, :, slot, None].expand(-1, -1, x.shape[2])
        difference = x.gather(1, where) - y
        weight = entries[:, :, slot, None]
        if ctx.options["cost"] == "euclidean":
            length = difference.norm(dim=2, keepdim=True)
            weight = torch.where(length > 0, weight / length, 0)
        else:
            weight = 2 * weight
        grad_x.scatter_add_(1, where, weight * difference)
        grad_y -= weight * difference
    return grad_x, grad_y, grad_a, grad_b, None, None


register.autograd(OP, _backward, _setup_context, outputs=DIFFERENTIABLE)
register.composite("sparse_ot_points", _points, "x b N d, y b M d, a b N, b b M, alpha b N, beta b M")
