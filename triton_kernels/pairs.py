"""Tiles of pairs of one transport problem, of a matrix or of points; csrc/sinkhorn/sinkhorn.h has the formulas.

Scores of a tile (BLOCK_N, BLOCK_M) are factor z + hat_i + hat_j, and a side's hat is (potential - s) / epsilon + log
marginal. Points with few features give z as squares or distances from differences, which cancel nothing; squares of
many features come from products:

    matrix  z = C    squares  z = |x - y|^2    distances  z = |x - y|       factor = -1/epsilon, s = 0
    products  z = <x, y>                                                    factor = 2/epsilon, s = |x|^2
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .rows import check_float32, finite_max

SMALL = 64  # rows and columns of a problem that one program solves in its registers
FEWEST_PRODUCTS = 16  # features from which products are worth their cancellation
FULL_GRID = 264  # programs: two for every multiprocessor of a large GPU


@triton.jit
def load_columns(x_ptr, at, d, inside, D):
    """Features d of points that begin at `at`; both broadcast."""
    return tl.load(x_ptr + at + d, mask=inside & (d < D), other=0.0)


@triton.jit
def products(x_ptr, y_ptr, x_at, y_at, in_rows, in_columns, D, BLOCK_D: tl.constexpr):
    """<x_i, y_j> of points that begin at x_at and y_at."""
    z = tl.zeros([x_at.shape[0], y_at.shape[0]], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x = load_columns(x_ptr, x_at[:, None], d[None, :], in_rows[:, None], D)
        y = load_columns(y_ptr, y_at[None, :], d[:, None], in_columns[None, :], D)
        z = tl.dot(x, y, z, input_precision="ieee")
    return z


@triton.jit
def pairs_of_tile(
    x_ptr, y_ptr, problem, i, j, N, M, x_batch, y_batch, row_stride, column_stride, D, KIND: tl.constexpr,
    BLOCK_D: tl.constexpr
):  # fmt: skip
    """z of rows i and columns j; beyond the last of a matrix it is infinite, a pair that is forbidden."""
    in_rows, in_columns = i < N, j < M
    x_at = problem * x_batch + i.to(tl.int64) * row_stride
    y_at = problem * y_batch + j.to(tl.int64) * column_stride
    if KIND == "matrix":
        inside = in_rows[:, None] & in_columns[None, :]
        z = tl.load(x_ptr + x_at[:, None] + y_at[None, :], mask=inside, other=float("inf"))
    elif KIND == "products":
        z = products(x_ptr, y_ptr, x_at, y_at, in_rows, in_columns, D, BLOCK_D)
    else:
        z = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        for d in range(0, D):
            x = load_columns(x_ptr, x_at, d, in_rows, D)
            y = load_columns(y_ptr, y_at, d, in_columns, D)
            difference = x[:, None] - y[None, :]
            z += difference * difference
        if KIND == "distances":
            z = tl.sqrt(z)
    return z


@triton.jit
def load_hat(potential_ptr, squares_ptr, log_ptr, at, inside, inverse):
    """(potential - s) / epsilon + log marginal of one side, -inf beyond its last."""
    hat = tl.load(potential_ptr + at, mask=inside, other=0.0)
    if squares_ptr is not None:
        hat -= tl.load(squares_ptr + at, mask=inside, other=0.0)
    hat *= inverse
    if log_ptr is not None:
        hat += tl.load(log_ptr + at, mask=inside, other=0.0)
    return tl.where(inside, hat, float("-inf"))


@triton.jit
def factor_of(inverse, KIND: tl.constexpr):
    return 2.0 * inverse if KIND == "products" else -inverse


@triton.jit
def damping(epsilon, rho):
    return 1.0 if rho is None else rho / (rho + epsilon)


@triton.jit
def updated(lse, damp):
    """-d lse, 0 where every pair of a row is forbidden."""
    return tl.where(lse == float("-inf"), 0.0, -damp * lse)


@triton.jit
def row_errors(a, f, lse, inverse, rho):
    """|a_i exp(f_i / epsilon + lse_i) - t_i|; where a_i is 0 the exponential may be too large."""
    ratio = 1.0 if rho is None else tl.exp(-f / rho)
    return tl.where(a > 0, a * tl.abs(tl.exp(f * inverse + lse) - ratio), 0.0)


@triton.jit
def log_sum_exp(scores, AXIS: tl.constexpr):
    top = tl.max(scores, AXIS)
    total = tl.sum(tl.exp(scores - tl.expand_dims(finite_max(top), AXIS)), AXIS)
    return top + tl.log(total)  # without a pair both are -inf


@dataclass(frozen=True)
class Pairs:
    """A matrix of costs, or two sets of points, in the order in which the kernels take them."""

    kind: str
    batch: int
    tensors: tuple[torch.Tensor | None, ...]  # x, y and their squares
    sizes: tuple[int, ...]  # N, M, x_batch, y_batch, row_stride, column_stride, D

    @property
    def small(self):
        return max(self.sizes[:2]) <= SMALL

    def small_constants(self, pairs=16):
        """One tile of the whole problem, with as many pairs a thread."""
        blocks = [max(16, triton.next_power_of_2(size)) for size in self.sizes[:2]]
        return {"BLOCK_N": blocks[0], "BLOCK_M": blocks[1], "num_warps": max(1, blocks[0] * blocks[1] // (32 * pairs))}

    def constants(self, most_rows=64):
        """As many rows a program as leave every multiprocessor two programs."""
        fits = (n for n in (64, 32) if n <= most_rows and self.batch * triton.cdiv(self.sizes[0], n) >= FULL_GRID)
        features = 32 if self.sizes[6] > 16 else 16
        return {
            "KIND": self.kind, "BLOCK_N": next(fits, 16), "BLOCK_M": 64, "BLOCK_D": features, "num_stages": 1
        }  # fmt: skip

    def row_programs(self, constants):
        return self.batch * triton.cdiv(self.sizes[0], constants["BLOCK_N"])


def pairs_of_matrix(op, cost):
    check_float32(op, cost)
    return Pairs(
        "matrix", len(cost), (cost, None, None, None), (*cost.shape[1:], cost.stride(0), 0, *cost.stride()[1:], 0)
    )


def pairs_of_points(op, x, y, cost):
    check_float32(op, x)
    if cost not in ("sqeuclidean", "euclidean"):
        raise ValueError(f"tilewise.{op}: expected cost to be 'sqeuclidean' or 'euclidean', got {cost!r}")
    batch, n, D = x.shape
    m = y.shape[1]
    kind = "distances" if cost == "euclidean" else "squares"
    squares = None, None
    if kind == "squares" and D >= FEWEST_PRODUCTS and max(n, m) > SMALL:
        kind, squares = "products", [(p * p).sum(2) for p in (x, y)]
    return Pairs(kind, batch, (x, y, *squares), (n, m, n * D, m * D, D, D, D))
