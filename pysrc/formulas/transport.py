"""Entropic optimal transport: its costs, plan, value and error as differentiable PyTorch."""

import torch
from torch import Tensor


def costs_of_points(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """The matrix of costs (B, n, m): of squares from products, which hold no (n, m, d)."""
    if cost == "sqeuclidean":
        return (x * x).sum(2)[:, :, None] + (y * y).sum(2)[:, None] - 2 * (x @ y.mT)
    difference = x[:, :, None] - y[:, None]
    squares = (difference * difference).sum(-1)
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)  # the gradient of 0 is 0


def plan(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """a_i b_j exp((f_i + g_j - C_ij) / epsilon)."""
    exponent = (f[:, :, None] + g[:, None] - cost) / epsilon[:, None, None]
    return torch.exp(exponent + a.log()[:, :, None] + b.log()[:, None])


def value_of(
    f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, rho_a: float | None, rho_b: float | None
) -> Tensor:
    """The dual objective, with sum P from the columns, which the last update made exact."""
    of_a = a * f if rho_a is None else -rho_a * a * torch.expm1(-f / rho_a)
    of_b = b * g if rho_b is None else -rho_b * b * torch.expm1(-g / rho_b)
    mass = b if rho_b is None else b * torch.exp(-g / rho_b)
    return of_a.sum(1) + of_b.sum(1) - epsilon * (mass.sum(1) - a.sum(1) * b.sum(1))


def row_error(cost: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, rho: float | None) -> Tensor:
    """sum_i |sum_j P_ij - a_i exp(-f_i / rho)| / sum_i a_i, 0 without mass."""
    scale = epsilon[:, None]
    sums = a * torch.exp(f / scale + torch.logsumexp((g[:, None] - cost) / scale[:, None] + b.log()[:, None], 2))
    target = a if rho is None else a * torch.exp(-f / rho)
    return relative_error(sums, target, a)


def relative_error(sums: Tensor, target: Tensor, marginal: Tensor) -> Tensor:
    """How far sums of a plan are from their target, of the marginal's mass; 0 without mass."""
    mass = marginal.sum(-1)
    return torch.where(mass > 0, (sums - target).abs().sum(-1) / mass, 0)
