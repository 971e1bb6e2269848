"""Optimal transport with at most k entries a column: the projection of a column, and the search of the dual's maximum,
whatever evaluates it. csrc/sparse_ot/sparse_ot.h has the formulas."""

import torch
from torch import Tensor

from tilewise.formulas.lbfgs import minimise
from tilewise.formulas.transport import relative_error


def largest(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row and where they are; of equal ones the first."""
    values, indices = s.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def project(s: Tensor, total: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest of every row less the largest, where they are, the threshold at which they sum to `total`, likewise
    less the largest, and the largest."""
    values, indices = largest(s, k)
    top = values[..., :1]
    values = values - top
    shares = torch.arange(1, k + 1, device=s.device, dtype=s.dtype) / k
    levels = ((values / k).cumsum(-1) - total[..., None] / k) / shares  # in the range of the type whatever the scores
    support = (values > levels).sum(-1, keepdim=True).clamp(min=1)
    return values, indices, levels.gather(-1, support - 1), top


def adam(gradient, x, *, steps, lr):
    """x after Adam's steps (Kingma and Ba, 2015) down a gradient."""
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(1, steps + 1):
        g = gradient(x)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        x = x - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return x


def solve(evaluate, a, b, alpha=None, beta=None, *, gamma, method, max_iter, tol, lr=0.0):
    """The plan after L-BFGS, or after max_iter steps of Adam (method "adam").

    evaluate(alpha, level): what sparse_ot_columns gives for the problems, whatever computes it.
    """
    rows, dual = a.shape[1], method == "dual"
    x = torch.zeros_like(a) if alpha is None else alpha
    if dual:
        x = torch.cat([x, torch.zeros_like(b) if beta is None else beta], 1)

    def judged(x):
        alpha, level = (x[:, :rows].contiguous(), x[:, rows:].contiguous()) if dual else (x, b)
        values, indices, beta, row_sums, margin = evaluate(alpha, level)
        mass = values.sum(2)
        squares = (values.double() ** 2).sum((1, 2))
        value = 0.5 * gamma * squares - (alpha * a).double().sum(1) - (beta * b).double().sum(1)
        errors = relative_error(row_sums, a, a), relative_error(mass, b, b)
        gradient = torch.cat([row_sums - a, mass - b], 1) if dual else row_sums - a
        return value, gradient, errors, (values, indices, alpha, beta, margin)

    # The dual is constant along this direction, if the sums of a and b are equal; rounding may make it a slope.
    null = torch.cat([torch.ones_like(a), -torch.ones_like(b)], 1)[:, : x.shape[1]]

    def function(x):
        value, gradient, (row_error, column_error), _ = judged(x)
        gradient = gradient - null * (gradient * null).mean(1, keepdim=True)
        return value, gradient, torch.maximum(row_error, column_error) if dual else row_error

    if method == "adam":
        x = adam(lambda x: judged(x)[1], x, steps=max_iter, lr=lr)
        n_iter = torch.full((len(x),), max_iter, dtype=torch.int64, device=x.device)
    else:
        x, n_iter = minimise(function, x, max_iter=max_iter, tol=tol)
    value, _, errors, (values, indices, alpha, beta, margin) = judged(x)
    return values, indices, alpha.clone(), beta.clone(), (-value).to(a.dtype), *errors, margin, n_iter
