"""Entropic optimal transport in plain PyTorch, in the log domain; csrc/sinkhorn/sinkhorn.h has the formulas.

Potentials are kept in units of epsilon, f / epsilon, and the cost C as scores -C / epsilon.
"""

import torch
from torch import Tensor

SETTLED = 0.005  # the error with which epsilon falls on
RELAXED = 1.8  # how far updates go, to begin with, where epsilon falls


def costs_of_points(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """The matrix of costs (B, n, m), from differences."""
    difference = x[:, :, None] - y[:, None]
    squares = (difference * difference).sum(-1)
    if cost == "sqeuclidean":
        return squares
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)  # the gradient of 0 is 0


def log_marginal(a: Tensor | None) -> Tensor | float:
    return 0.0 if a is None else a.log()[:, :, None]


def damping(epsilon: Tensor, rho: float | None) -> Tensor:
    """rho / (rho + epsilon): how far an update goes; 1 where the marginal is a constraint."""
    return torch.ones_like(epsilon) if rho is None else rho / (rho + epsilon)


def updated(scores: Tensor, potential: Tensor, marginal: Tensor, damp: Tensor) -> Tensor:
    """-damp log sum_j b_j exp(g_j - C_ij), 0 where every pair of a row is forbidden; differentiable where b_j is 0."""
    exponents = scores + potential[:, None]
    top = exponents.detach().masked_fill(marginal[:, None] == 0, -torch.inf).amax(2, keepdim=True).nan_to_num()
    total = (marginal[:, None] * torch.exp((exponents - top).clamp(max=80))).sum(2)
    dead = total == 0
    return torch.where(dead, 0, -damp[:, None] * (top[:, :, 0] + torch.where(dead, 1, total).log()))


def row_error(scores: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, rho: float | None) -> Tensor:
    """sum_i |sum_j P_ij - a_i exp(-f_i / rho)| / sum_i a_i, 0 without mass."""
    sums = a * torch.exp(f + torch.logsumexp(scores + (g + b.log())[:, None], 2))
    target = a if rho is None else a * torch.exp(-f * epsilon[:, None] / rho)
    mass = a.sum(1)
    return torch.where(mass > 0, (sums - target).abs().sum(1) / mass, 0)


def after_iteration(t, error, stage, epsilon, *, max_iter, tol, scaling, symmetric):
    """The stage (epsilon, step, step before, relaxed) that follows that of iteration t, and whether the problem stops
    before it; csrc/sinkhorn/sinkhorn.h says why."""
    now, step, before, relaxed = stage
    last, begun = now == epsilon, step >= 1
    stop = last & begun & ((before == 1) | symmetric) & (error <= tol)
    own = torch.where((before > 1) & (not symmetric), 2 * (2 - before), 1)
    settled = begun & (own * error <= torch.where(last, tol, max(tol, SETTLED)))
    late = now * scaling ** max(max_iter // 2 - t - 1, 0) > epsilon
    falls = ~last & (settled | late)
    is_exact = settled | ~(error < 0.5)
    following = torch.where(falls, 0.5, torch.where(is_exact, 1.0, relaxed))
    if t + 2 == max_iter:
        following = torch.ones_like(following)
    further = torch.where(is_exact, relaxed, 2 - 1 / (1 / (2 - relaxed) + 0.1))
    fallen = torch.where(falls, torch.maximum(now * scaling, epsilon), now)
    return (fallen, following, step, torch.where(falls, RELAXED, further)), stop


def solve(cost, a, b, epsilon, f, g, start, *, max_iter, tol, rho_a, rho_b, scaling, symmetric=False):
    """Potentials, value, error of the rows and the number of iterations of every problem, each stopped on its own."""
    now = epsilon if start is None else torch.maximum(start, epsilon)
    step = torch.full_like(epsilon, 1.0 if start is None or max_iter == 1 else 0.5)
    stage = now, step, torch.full_like(epsilon, 0.5), torch.full_like(epsilon, RELAXED)
    f = torch.zeros_like(a) if f is None else f
    g = torch.zeros_like(b) if g is None else g
    if symmetric:
        g = f
    n_iter = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    going = torch.ones(len(cost), dtype=torch.bool, device=cost.device)

    for t in range(max_iter):
        now, step = stage[0], stage[1][:, None]
        scores, unit = -cost / now[:, None, None], now[:, None]
        error = row_error(scores, f / unit, g / unit, a, b, now, rho_a)
        following, stop = stage, (error <= tol) & (t > 0)
        if start is not None:
            options = {"max_iter": max_iter, "tol": tol, "scaling": scaling, "symmetric": symmetric}
            following, stop = after_iteration(t, error, stage, epsilon, **options)
        going = going & ~stop
        if not going.any():
            break
        updated_f = unit * updated(scores, g / unit, b, damping(now, rho_a))
        if symmetric:
            next_f = next_g = (f + updated_f) / 2
        else:
            next_f = torch.where(step == 1, updated_f, f + step * (updated_f - f))
            seen = torch.where(step < 1, f, next_f)
            updated_g = unit * updated(scores.mT, seen / unit, a, damping(now, rho_b))
            next_g = torch.where(step == 1, updated_g, g + step * (updated_g - g))
        f, g = (torch.where(going[:, None], p, old) for p, old in ((next_f, f), (next_g, g)))
        n_iter += going
        stage = following
    scores, unit = -cost / epsilon[:, None, None], epsilon[:, None]
    error = row_error(scores, f / unit, g / unit, a, b, epsilon, rho_a)
    if symmetric:
        g = unit * updated(scores, f / unit, a, damping(epsilon, rho_a))
    return f, g, value_of(f, g, a, b, epsilon, rho_a, rho_b), error, n_iter


def value_of(f, g, a, b, epsilon, rho_a, rho_b) -> Tensor:
    """The dual objective, with sum P from the columns, which the last update made exact."""
    of_a = a * f if rho_a is None else -rho_a * a * torch.expm1(-f / rho_a)
    of_b = b * g if rho_b is None else -rho_b * b * torch.expm1(-g / rho_b)
    mass = b if rho_b is None else b * torch.exp(-g / rho_b)
    return of_a.sum(1) + of_b.sum(1) - epsilon * (mass.sum(1) - a.sum(1) * b.sum(1))


def plan(cost, a, b, epsilon, f, g) -> Tensor:
    """a_i b_j exp((f_i + g_j - C_ij) / epsilon); a marginal that is None counts as ones."""
    exponent = (f[:, :, None] + g[:, None] - cost) / epsilon[:, None, None]
    return torch.exp(exponent + log_marginal(a) + (0.0 if b is None else b.log()[:, None]))


def sinkhorn(cost, a, b, epsilon, f=None, g=None, start=None, *, max_iter, tol, rho_a=None, rho_b=None, scaling=0.5):
    return solve(
        cost, a, b, epsilon, f, g, start, max_iter=max_iter, tol=tol, rho_a=rho_a, rho_b=rho_b, scaling=scaling
    )


def sinkhorn_points(x, y, *problem, cost, allow_tf32=False, **options):
    return solve(costs_of_points(x, y, cost), *problem, **options)


def sinkhorn_plan(cost, a, b, epsilon, f, g, **options):
    return plan(cost, a, b, epsilon, f, g)


def sinkhorn_apply(cost, a, b, epsilon, f, g, v):
    return plan(cost, a, b, epsilon, f, g) @ v


def sinkhorn_points_apply(x, y, a, b, epsilon, f, g, v, h=None, k=None, *, cost, over_distance=False, **options):
    matrix = costs_of_points(x, y, cost)
    weights = plan(matrix, a, b, epsilon, f, g)
    if h is not None:
        weights = weights * (h @ k.mT)
    if over_distance:
        weights = torch.where(matrix > 0, weights / matrix, 0)
    return weights @ v


def sinkhorn_unrolled(cost, a, b, epsilon, *, max_iter, rho_a=None, rho_b=None):
    return sinkhorn(cost, a, b, epsilon, max_iter=max_iter, tol=-1.0, rho_a=rho_a, rho_b=rho_b)[:2]


def sinkhorn_unrolled_backward(grad_f, grad_g, cost, a, b, epsilon, **options):
    def function(cost, a, b, epsilon):
        return sinkhorn_unrolled(cost, a, b, epsilon, **options)

    return torch.func.vjp(function, cost, a, b, epsilon)[1]((grad_f, grad_g))


OPS = {
    "sinkhorn": sinkhorn,
    "sinkhorn_points": sinkhorn_points,
    "sinkhorn_plan": sinkhorn_plan,
    "sinkhorn_apply": sinkhorn_apply,
    "sinkhorn_points_apply": sinkhorn_points_apply,
    "sinkhorn_unrolled": sinkhorn_unrolled,
    "sinkhorn_unrolled_backward": sinkhorn_unrolled_backward,
}
