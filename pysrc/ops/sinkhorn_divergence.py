"""sinkhorn_divergence and monge_gap: what is made of the transport between sets of points."""

from dataclasses import replace

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import autocast
from tilewise.ops.sinkhorn_points import Pair, _centred, prepared, solve
from tilewise.ops.transport import Problem, TransportLoss, finished


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    cost: str = "sqeuclidean",
    max_iter: int = 1000,
    tol: float = 1e-6,
    reg_marginal: float | tuple[float, float] | None = None,
    epsilon_scaling: float | None = None,
    allow_tf32: bool = False,
    return_result: bool = False,
) -> Tensor | TransportLoss:
    r"""The debiased transport cost between two sets of points, with O((n + m) d) memory.

    .. math::
        S = V(x, y) - V(x, x) / 2 - V(y, y) / 2 + \epsilon / 2\, (\textstyle\sum a - \sum b)^2

    with V of :func:`tilewise.sinkhorn_points`. It is 0 for equal sets and, for these costs, never below, within the
    error of the three problems. They are solved by averaged and relaxed updates, with the symmetric potentials of x and
    of y with themselves, so that sets which are near to each other have an accurate value and gradient.

    From "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences" (Feydy et al., 2019), and
    "Sinkhorn Divergences for Unbalanced Optimal Transport" (Sejourne et al., 2019).

    Args:
        x: (..., n, d), float64 (on a CPU), float32, bfloat16 or float16 (these two are computed in float32).
        y: (..., m, d) of the same dtype (under autocast, of any) and batch.
        a, b, epsilon, cost, max_iter, tol, epsilon_scaling, allow_tf32: as for :func:`tilewise.sinkhorn_points`.
        reg_marginal: one penalty for both marginals, or a pair of equal ones: with others x and y would have different
            divergences from themselves.
        return_result: return a :class:`~tilewise.TransportLoss`, which has the error and the iterations beside the
            value. Without, a value on a CPU that has not converged is a warning (outside of torch.compile; on a GPU it
            is not looked at, for that would mean to wait).

    Returns:
        (...), differentiable in x, y, a, b and epsilon. It is ``2 * geomloss.SamplesLoss("sinkhorn", p=2,
        blur=(epsilon / 2) ** 0.5)`` for squared distances.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`tilewise.sinkhorn_points`.

    Example:
        >>> import torch, tilewise
        >>> x, y = torch.randn(100, 2, requires_grad=True), torch.randn(80, 2) + 1
        >>> tilewise.sinkhorn_divergence(x, y, epsilon=0.5).backward()
        >>> x.grad.shape
        torch.Size([100, 2])
    """
    op = "sinkhorn_divergence"
    if isinstance(reg_marginal, tuple) and len(set(reg_marginal)) != 1:
        raise ValueError(f"tilewise.{op}: expected reg_marginal to be one number for both, got {reg_marginal!r}")
    pair, problem, options = prepared(
        op, x, y, a, b, epsilon=epsilon, cost=cost, max_iter=max_iter, tol=tol, reg_marginal=reg_marginal,
        epsilon_scaling=epsilon_scaling, allow_tf32=allow_tf32
    )  # fmt: skip
    return finished(op, divergence(pair, problem, options), return_result)


def divergence(pair: Pair, problem: Problem, options: dict, debias: bool = True) -> TransportLoss:
    """Of prepared points; without debias V(x, y) alone."""
    a, b, epsilon = problem.a, problem.b, problem.epsilon
    _, _, value, error, n_iter = solved(pair.x, pair.y, a, b, epsilon, **options)
    if debias:
        of_x, of_y = (
            solved(points, points, w, w, epsilon, **options, symmetric=True)[2:]
            for points, w in ((pair.x, a), (pair.y, b))
        )
        value = value - (of_x[0] + of_y[0]) / 2 + epsilon / 2 * (a.sum(1) - b.sum(1)).square()
        error, n_iter = (torch.maximum(ours, torch.maximum(of_x[i], of_y[i])) for i, ours in ((1, error), (2, n_iter)))
    parts = (value, n_iter, error, error <= problem.tol)
    return TransportLoss(*(t.reshape(problem.batch) for t in parts))


def solved(x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *, start=None, **options):
    """(f, g, value, error, n_iter); epsilon begins to fall from epsilon itself where nothing else is said, for the
    updates that go with it."""
    start = epsilon.detach() if start is None else start
    return solve(x, y, a, b, epsilon, start=start, **options)


def monge_gap(
    x: Tensor,
    tx: Tensor,
    *,
    epsilon: float | Tensor,
    cost: str = "sqeuclidean",
    max_iter: int = 1000,
    tol: float = 1e-6,
    epsilon_scaling: float | None = None,
    allow_tf32: bool = False,
    return_result: bool = False,
) -> Tensor | TransportLoss:
    r"""How far a map T is from an optimal one on the points x: what it pays above the cheapest way to T(x).

    .. math::
        \frac1n \sum_i c(x_i, T(x_i)) - W_\epsilon(x, T(x)), \qquad
        W_\epsilon = \min_P \langle P, C \rangle - \epsilon H(P), \quad H(P) = -\sum P \log P

    between uniform weights: at least 0, because keeping to T is a plan, and near 0 for the gradient of a convex
    function under squared distances. A regulariser for networks that are to learn transport maps.

    From "The Monge Gap: A Regularizer to Learn All Transport Maps" (Uscidda and Cuturi, 2023).

    Args:
        x: (..., n, d), float64 (on a CPU), float32, bfloat16 or float16 (these two are computed in float32).
        tx: (..., n, d) of the same dtype (under autocast, of any): where the map takes each x.
        epsilon, cost, max_iter, tol, epsilon_scaling, allow_tf32: as for :func:`tilewise.sinkhorn_points`.
        return_result: as for :func:`tilewise.sinkhorn_divergence`.

    Returns:
        (...), differentiable in x, tx and epsilon through both terms.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`tilewise.sinkhorn_points`.

    Example:
        >>> import torch, tilewise
        >>> x = torch.randn(100, 2)
        >>> translation = tilewise.monge_gap(x, x + 3, epsilon=0.1)
        >>> bool(translation < tilewise.monge_gap(x, -x, epsilon=0.1))
        True
    """
    op = "monge_gap"
    x, tx = autocast.widen(x, tx)
    if isinstance(tx, Tensor) and isinstance(x, Tensor) and tx.shape != x.shape:
        raise ValueError(f"tilewise.{op}: expected tx to have shape {tuple(x.shape)} like x, got {tuple(tx.shape)}")
    pair, problem, options = prepared(
        op, x, tx, None, None, epsilon=epsilon, cost=cost, max_iter=max_iter, tol=tol, reg_marginal=None,
        epsilon_scaling=epsilon_scaling, allow_tf32=allow_tf32
    )  # fmt: skip
    loss = divergence(pair, problem, options, debias=False)
    value = loss.value
    entropy = 2 * value.new_full((), x.shape[-2]).log()
    wide = statistics_dtype(x)
    difference = x.to(wide) - tx.to(wide)
    if cost == "cosine":
        difference = _centred(x.to(wide), None, cost) - _centred(tx.to(wide), None, cost)
    paid = difference.square().sum(-1)
    if cost == "euclidean":
        paid = torch.where(paid > 0, torch.where(paid > 0, paid, 1).sqrt(), 0)
    gap = paid.mean(-1) - (value - (problem.epsilon * entropy).reshape(problem.batch))
    return finished(op, replace(loss, value=gap), return_result)
