"""Transport with at most k entries a column; csrc/sparse_ot/sparse_ot.h has the formulas.

Three kernels evaluate the dual: the cut of every column, the sums of the rows (each from the whole matrix, so that
nothing is added in the order of arrival), and the lists of entries. The search is PyTorch's operations on the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilewise.formulas.sparse_transport import solve

from .rows import check_float32
from .simplex_topk import block_of, find_cut, keeps, load_scores

ROWS = 128  # of a program that sums rows


@triton.jit
def sparse_cut_kernel(
    costs_ptr, alpha_ptr, level_ptr, beta_ptr, numbers_ptr, last_ptr, N, M, k, gamma, DUAL: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Of a column: beta, (level, equal, top, below) and the last index of those that are equal."""
    at = tl.program_id(0).to(tl.int64)
    given = tl.load(level_ptr + at)
    x_ptr = alpha_ptr + at // N * M
    level, equal, last, top, below = find_cut(
        x_ptr, costs_ptr + at * M, M, k, gamma * given, -given, DUAL, BLOCK
    )  # fmt: skip
    tl.store(beta_ptr + at, tl.where(top == top, given, top) if DUAL else -(top + below))
    tl.store(numbers_ptr + at * 4, level)
    tl.store(numbers_ptr + at * 4 + 1, equal)
    tl.store(numbers_ptr + at * 4 + 2, top)
    tl.store(numbers_ptr + at * 4 + 3, below)
    tl.store(last_ptr + at, last)


@triton.jit
def mass_of(s, i, numbers_ptr, last_ptr, at, gamma):
    """The entries of scores of column `at`, and whether they are among its k largest."""
    level, equal = tl.load(numbers_ptr + at * 4), tl.load(numbers_ptr + at * 4 + 1)
    top, below = tl.load(numbers_ptr + at * 4 + 2), tl.load(numbers_ptr + at * 4 + 3)
    kept = keeps(s, i, level, equal, tl.load(last_ptr + at))
    return tl.where(kept, tl.maximum(s - top - below, 0.0), 0.0) / gamma, kept


@triton.jit
def sparse_rows_kernel(
    costs_ptr, alpha_ptr, numbers_ptr, last_ptr, sums_ptr, N, M, gamma, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows i of a problem over all its columns."""
    problem = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alpha = tl.load(alpha_ptr + problem * M + i, mask=i < M, other=0.0)
    sums = tl.zeros([BLOCK], tl.float32)
    for column in range(0, N):
        at = problem * N + column
        s = alpha - tl.load(costs_ptr + at * M + i, mask=i < M, other=float("inf")) + 0.0
        mass, _ = mass_of(s, i, numbers_ptr, last_ptr, at, gamma)
        sums += mass
    tl.store(sums_ptr + problem * M + i, sums, mask=i < M)


class Lists(NamedTuple):
    """Of every column: its k entries (a Triton tuple has .values of its own), their rows, and its margin."""

    entries: torch.Tensor
    indices: torch.Tensor
    margin: torch.Tensor


@triton.jit
def sparse_lists_kernel(
    costs_ptr, alpha_ptr, beta_ptr, numbers_ptr, last_ptr, lists, N, M, k, gamma, BLOCK: tl.constexpr
):
    """The entries of a column in the order of their rows, and its margin."""
    at = tl.program_id(0).to(tl.int64)
    x_ptr, minus_ptr = alpha_ptr + at // N * M, costs_ptr + at * M
    count, kept_count = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    following = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, M, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        s = load_scores(x_ptr, minus_ptr, i, M)
        mass, kept = mass_of(s, i, numbers_ptr, last_ptr, at, gamma)
        lowest = tl.minimum(lowest, tl.where(kept, s, float("inf")))
        following = tl.maximum(following, tl.where(kept, float("-inf"), s))
        kept_count += tl.sum(kept.to(tl.int32), 0)
        used = (mass > 0).to(tl.int32)
        to = at * k + count + tl.cumsum(used, 0) - 1
        tl.store(lists.entries + to, mass, mask=used != 0)
        tl.store(lists.indices + to, i.to(tl.int64), mask=used != 0)
        count += tl.sum(used, 0)
    for begin in range(0, k, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        left = (i >= count) & (i < k)
        tl.store(lists.entries + at * k + i, tl.zeros([BLOCK], tl.float32), mask=left)
        tl.store(lists.indices + at * k + i, tl.zeros([BLOCK], tl.int64), mask=left)
    after = tl.max(following, 0)
    cut = (kept_count == k) & (after > -tl.load(beta_ptr + at))
    tl.store(lists.margin + at, tl.where(cut, tl.min(lowest, 0) - after, float("inf")))


def sparse_ot_columns(costs, alpha, level, *, k, gamma, dual=False):
    check_float32("sparse_ot", costs)
    B, N, M = costs.shape
    values, row_sums = costs.new_empty(B, N, k), torch.empty_like(alpha)
    beta, margin = torch.empty_like(level), torch.empty_like(level)
    indices, last = torch.empty_like(values, dtype=torch.int64), torch.empty_like(level, dtype=torch.int32)
    numbers = costs.new_empty(B, N, 4)
    if B:
        with torch.cuda.device_of(costs):
            block = block_of(M)
            sparse_cut_kernel[(B * N,)](costs, alpha, level, beta, numbers, last, N, M, k, gamma, dual, **block)
            sparse_rows_kernel[(triton.cdiv(M, ROWS), B)](
                costs, alpha, numbers, last, row_sums, N, M, gamma, BLOCK=ROWS, num_warps=4
            )
            sparse_lists_kernel[(B * N,)](
                costs, alpha, beta, numbers, last, Lists(values, indices, margin), N, M, k, gamma, **block
            )
    return values, indices, beta, row_sums, margin


def sparse_ot(costs, a, b, alpha=None, beta=None, *, k, gamma, **options):
    def evaluate(alpha, level):
        return sparse_ot_columns(costs, alpha, level, k=k, gamma=gamma, dual=options["method"] == "dual")

    return solve(evaluate, a, b, alpha, beta, gamma=gamma, **options)


OPS = {"sparse_ot": sparse_ot, "sparse_ot_columns": sparse_ot_columns}
