"""Tiles of pairs of one transport problem, of a matrix or of points; csrc/sinkhorn/sinkhorn.h has the formulas.

Scores of a tile (BLOCK_N, BLOCK_M) are factor z + offset_i + offset_j, and a side's offset is
(potential - s) / epsilon + log marginal. z is a matrix, or a cost of points from their differences, which cancel
nothing; squares of many features come from products:

    matrix  z = C    cost  z = finish(sum over features of what accumulates)    factor = -1/epsilon, s = 0
    products  z = <x, y>                                                        factor = 2/epsilon, s = |x|^2
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .rows import check_float32, finite_max, to_tf32

SMALL = 64  # rows and columns of a problem that one program solves in its registers
MIN_PRODUCTS = 16  # features from which products are worth their cancellation
FULL_GRID = 264  # programs: two for every multiprocessor of a large GPU


class PairTensors(NamedTuple):
    """A matrix x, or points x and y with their squares where products want them."""

    x: torch.Tensor
    y: torch.Tensor | None
    x_squares: torch.Tensor | None
    y_squares: torch.Tensor | None
    N: int
    M: int
    x_batch: int
    y_batch: int
    row_stride: int
    column_stride: int
    D: int


class Tile(NamedTuple):
    KIND: Any  # "matrix", "products" or the device function of a cost
    BLOCK_N: int
    BLOCK_M: int
    BLOCK_D: int = 1
    ALLOW_TF32: bool = False  # in products, which else are as exact as of floats


class Penalties(NamedTuple):
    a: float | None
    b: float | None


@triton.jit
def load_columns(x_ptr, at, d, inside, D):
    """Features d of points that begin at `at`; both broadcast."""
    return tl.load(x_ptr + at + d, mask=inside & (d < D), other=0.0)


@triton.jit
def products(x_ptr, y_ptr, x_at, y_at, in_rows, in_columns, D, BLOCK_D: tl.constexpr, ALLOW_TF32: tl.constexpr):
    """<x_i, y_j> of points that begin at x_at and y_at."""
    z = tl.zeros([x_at.shape[0], y_at.shape[0]], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x = load_columns(x_ptr, x_at[:, None], d[None, :], in_rows[:, None], D)
        y = load_columns(y_ptr, y_at[None, :], d[:, None], in_columns[None, :], D)
        if ALLOW_TF32:
            z = tl.dot(to_tf32(x), to_tf32(y), z, input_precision="tf32")
        else:
            z = tl.dot(x, y, z, input_precision="tf32x3")
    return z


@triton.jit
def sqeuclidean(z, x, y, FINISH: tl.constexpr):
    """A cost: adds a feature of x and y to z, and at last finishes z."""
    if not FINISH:
        z += (x - y) * (x - y)
    return z


@triton.jit
def euclidean(z, x, y, FINISH: tl.constexpr):
    return tl.sqrt(z) if FINISH else sqeuclidean(z, x, y, False)


COSTS = {"sqeuclidean": sqeuclidean, "euclidean": euclidean}


@triton.jit
def pairs_of_tile(pairs, problem, i, j, tile: tl.constexpr):
    """z of rows i and columns j; beyond the last of a matrix it is infinite, a pair that is forbidden."""
    KIND: tl.constexpr = tile.KIND
    in_rows, in_columns = i < pairs.N, j < pairs.M
    x_at = problem * pairs.x_batch + i.to(tl.int64) * pairs.row_stride
    y_at = problem * pairs.y_batch + j.to(tl.int64) * pairs.column_stride
    if KIND == "matrix":
        inside = in_rows[:, None] & in_columns[None, :]
        z = tl.load(pairs.x + x_at[:, None] + y_at[None, :], mask=inside, other=float("inf"))
    elif KIND == "products":
        z = products(pairs.x, pairs.y, x_at, y_at, in_rows, in_columns, pairs.D, tile.BLOCK_D, tile.ALLOW_TF32)
    else:
        z = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        for d in range(0, pairs.D):
            x = load_columns(pairs.x, x_at, d, in_rows, pairs.D)
            y = load_columns(pairs.y, y_at, d, in_columns, pairs.D)
            z = KIND(z, x[:, None], y[None, :], False)
        z = KIND(z, None, None, True)
    return z


@triton.jit
def load_offset(potential_ptr, squares_ptr, log_ptr, at, inside, inverse):
    """(potential - s) / epsilon + log marginal of one side, -inf beyond its last."""
    offset = tl.load(potential_ptr + at, mask=inside, other=0.0)
    if squares_ptr is not None:
        offset -= tl.load(squares_ptr + at, mask=inside, other=0.0)
    offset *= inverse
    if log_ptr is not None:
        offset += tl.load(log_ptr + at, mask=inside, other=0.0)
    return tl.where(inside, offset, float("-inf"))


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
    row_max = tl.max(scores, AXIS)
    total = tl.sum(tl.exp(scores - tl.expand_dims(finite_max(row_max), AXIS)), AXIS)
    return row_max + tl.log(total)  # without a pair both are -inf


class Pairs(NamedTuple):
    """The pairs of a batch of problems, and how z comes from their tensors."""

    kind: Any
    batch: int
    tensors: PairTensors
    allow_tf32: bool = False

    @property
    def shape(self):
        return self.tensors.N, self.tensors.M

    @property
    def is_small(self):
        return max(self.shape) <= SMALL

    def small_constants(self, pairs=16):
        """One tile of the whole problem, with as many pairs a thread."""
        rows, columns = (max(16, triton.next_power_of_2(size)) for size in self.shape)
        return {"tile": Tile(self.kind, rows, columns), "num_warps": max(1, rows * columns // (32 * pairs))}

    def tile(self, max_rows=64):
        """As many rows a program as leave every multiprocessor two programs."""
        fits = (n for n in (64, 32) if n <= max_rows and self.batch * triton.cdiv(self.tensors.N, n) >= FULL_GRID)
        return Tile(self.kind, next(fits, 16), 64, 32 if self.tensors.D > 16 else 16, self.allow_tf32)

    def row_programs(self, tile):
        return self.batch * triton.cdiv(self.tensors.N, tile.BLOCK_N)


def pairs_of_matrix(op, cost):
    check_float32(op, cost)
    strides = (cost.stride(0), 0, *cost.stride()[1:])
    return Pairs("matrix", len(cost), PairTensors(cost, None, None, None, *cost.shape[1:], *strides, 0))


def pairs_of_points(op, x, y, cost, allow_tf32=False):
    check_float32(op, x)
    if cost not in COSTS:
        raise ValueError(f"tilewise.{op}: expected cost to be {' or '.join(map(repr, COSTS))}, got {cost!r}")
    batch, n, D = x.shape
    m = y.shape[1]
    kind, squares = COSTS[cost], (None, None)
    if cost == "sqeuclidean" and D >= MIN_PRODUCTS and max(n, m) > SMALL:
        kind, squares = "products", ((p * p).sum(2) for p in (x, y))
    return Pairs(kind, batch, PairTensors(x, y, *squares, n, m, n * D, m * D, D, D, D), allow_tf32)
