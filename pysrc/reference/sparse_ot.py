"""Optimal transport with at most k entries a column, in plain PyTorch; csrc/sparse_ot/sparse_ot.h has the formulas.

Costs are given by columns, (B, n, m): n problems of m numbers each. Scores are s = alpha - c.
"""

import torch
from torch import Tensor

from tilewise.formulas.sparse_transport import project, solve


def simplex_topk(x: Tensor, *, k: int, scale: float = 1.0) -> Tensor:
    total = torch.full(x.shape[:-1], scale, dtype=x.dtype, device=x.device)
    values, indices, level, top = project(x, total, k)
    p = torch.zeros_like(x).scatter(-1, indices, (values - level).clamp(min=0))
    return torch.where(usable(x, top), p, torch.nan)


def usable(s: Tensor, top: Tensor) -> Tensor:
    """Whether the largest can be projected from: without, all there is to say is NaN."""
    return top.isfinite() & ~s.isnan().any(-1, keepdim=True)


def simplex_topk_backward(grad: Tensor, p: Tensor) -> Tensor:
    support = p > 0
    mean = torch.where(support, grad, 0).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
    return torch.where(support, grad - mean, 0)


def sparse_ot_columns(costs, alpha, level, *, k, gamma, dual=False):
    """The entries of every column, beta, sums of rows, and s_[k] - s_[k+1] where the following would have had mass."""
    s = alpha[:, None] - costs
    kept, indices, below, top = project(s, gamma * level, k)
    if dual:
        below = -level[..., None] - top
    solvable = usable(s, top)
    tau = torch.where(solvable[..., 0], -level if dual else (top + below)[..., 0], torch.nan)
    mass = torch.where(solvable, (kept - below).clamp(min=0) / gamma, 0)
    row_sums = torch.zeros_like(alpha).scatter_add(1, indices.flatten(1), mass.flatten(1))
    margin = torch.full_like(level, torch.inf)
    if k < s.shape[-1]:
        last, following = s.topk(k + 1, -1).values[..., -2:].unbind(-1)
        margin = torch.where(following > tau, last - following, margin)
    used = mass > 0
    order = torch.where(used, indices, s.shape[-1]).argsort(-1)
    return mass.gather(-1, order), torch.where(used, indices, 0).gather(-1, order), -tau, row_sums, margin


def sparse_ot(costs, a, b, alpha=None, beta=None, *, k, gamma, **options):
    def evaluate(alpha, level):
        return sparse_ot_columns(costs, alpha, level, k=k, gamma=gamma, dual=options["method"] == "dual")

    return solve(evaluate, a, b, alpha, beta, gamma=gamma, **options)


OPS = {
    "simplex_topk": simplex_topk,
    "simplex_topk_backward": simplex_topk_backward,
    "sparse_ot": sparse_ot,
    "sparse_ot_columns": sparse_ot_columns,
}
