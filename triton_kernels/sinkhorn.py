"""Entropic optimal transport in the log domain; csrc/sinkhorn/sinkhorn.h has the formulas, pairs.py the tiles.

Potentials in memory are in units of the cost, so that they stay what they are while epsilon falls. Problems stop on the
device: n_iter counts the iterations of each, and one that it leaves behind has stopped.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilewise.formulas.lbfgs import Asked
from tilewise.formulas.transport import value_of

from .pairs import (
    Penalties,
    Tile,
    damping,
    factor_of,
    load_columns,
    load_offset,
    pairs_of_matrix,
    pairs_of_points,
    pairs_of_tile,
    products,
    row_errors,
    updated,
)
from .rows import softmax_merge
from .small_sinkhorn import Problem, ProblemTensors, solve_small
from .transport_stages import first_stages, moved, stage_after

CHECK_EVERY = 16  # iterations after which the host asks whether all problems have stopped


class Update(NamedTuple):
    """Potentials f of the rows, updated from g of the columns; with a, the marginal of the rows and its sum, the error
    of f is taken, too."""

    f: torch.Tensor
    g: torch.Tensor
    new_f: torch.Tensor
    log_b: torch.Tensor
    a: torch.Tensor | None
    mass: torch.Tensor | None


class Progress(NamedTuple):
    """Of every problem: epsilon, the stages of this iteration and the next (transport_stages.py) where epsilon falls,
    and what its error is counted with."""

    epsilon: torch.Tensor
    stage: torch.Tensor | None
    next: torch.Tensor | None
    partial: torch.Tensor
    ticket: torch.Tensor
    error: torch.Tensor
    n_iter: torch.Tensor


class PlanTensors(NamedTuple):
    """Potentials and logarithms of marginals, None for ones."""

    f: torch.Tensor
    g: torch.Tensor
    log_a: torch.Tensor | None
    log_b: torch.Tensor | None
    epsilon: torch.Tensor


class Vectors(NamedTuple):
    """Of every point: (batch, points, size)."""

    ptr: torch.Tensor | None
    size: int


@triton.jit(do_not_specialize=["t", "max_iter", "averaged_offset"])
def sinkhorn_half_step_kernel(
    pairs, update, progress, averaged_offset, t, max_iter, scaling, tol, rho, B, SYMMETRIC: tl.constexpr,
    tile: tl.constexpr
):  # fmt: skip
    """The update of f from g, of a problem that has done t iterations; averaged, from the g before. With a it also
    takes the error of f: the last program of the problem adds up those of all, and unless that stops the problem it
    counts the iteration and says what the next one does."""
    KIND: tl.constexpr = tile.KIND
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    programs = tl.cdiv(pairs.N, BLOCK_N)
    problem = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs
    if tl.load(progress.n_iter + problem) < t:
        return
    epsilon = tl.load(progress.epsilon + problem)
    now, step = epsilon, 1.0
    g_ptr = update.g
    if progress.stage is not None:
        now = tl.load(progress.stage + problem)
        step = tl.load(progress.stage + B + problem)
        if update.a is not None:
            now = tl.where(t == max_iter, epsilon, now)
        g_ptr += tl.where(step < 1, averaged_offset, 0)
    inverse = 1.0 / now
    i = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, rows = i < pairs.N, problem * pairs.N + i
    row_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for begin in range(0, pairs.M, BLOCK_M):
        j = begin + tl.arange(0, BLOCK_M)
        z = pairs_of_tile(pairs, problem, i, j, tile)
        offset = load_offset(g_ptr, pairs.y_squares, update.log_b, problem * pairs.M + j, j < pairs.M, inverse)
        scores = factor_of(inverse, KIND) * z + offset[None, :]
        row_max, sums, _, _, _, _ = softmax_merge(row_max, sums, scores, tl.max(scores, 1))
    lse = row_max + tl.log(tl.sum(sums, 1))  # without a pair both are -inf
    if pairs.x_squares is not None:
        lse -= tl.load(pairs.x_squares + rows, mask=in_rows, other=0.0) * inverse
    new_f = now * updated(lse, damping(now, rho))
    if progress.stage is not None or update.a is not None:
        f = tl.load(update.f + rows, mask=in_rows, other=0.0)
        if SYMMETRIC:
            new_f = (f + new_f) * 0.5
        elif progress.stage is not None:
            new_f = moved(f, new_f, step)
    if update.a is not None:
        a = tl.load(update.a + rows, mask=in_rows, other=0.0)
        partials = progress.partial + problem * programs
        tl.store(partials + block, tl.sum(row_errors(a, f, lse, inverse, rho)))
        if tl.atomic_add(progress.ticket + problem, 1) % programs == programs - 1:
            error = 0.0
            for begin in range(0, programs, 1024):
                at = begin + tl.arange(0, 1024)
                error += tl.sum(tl.load(partials + at, mask=at < programs, other=0.0))
            mass = tl.load(update.mass + problem)
            error = tl.where(mass > 0, error / mass, 0.0)
            tl.store(progress.error + problem, error)
            stops = (t > 0) & (error <= tol)
            if progress.stage is not None:
                before, relaxed = tl.load(progress.stage + 2 * B + problem), tl.load(progress.stage + 3 * B + problem)
                now, step, before, relaxed, stops = stage_after(
                    now, step, before, relaxed, error, t, epsilon, max_iter, tol, scaling, SYMMETRIC
                )
                tl.store(progress.next + problem, now)
                tl.store(progress.next + B + problem, step)
                tl.store(progress.next + 2 * B + problem, before)
                tl.store(progress.next + 3 * B + problem, relaxed)
            tl.store(progress.n_iter + problem, tl.where(stops, t, tl.minimum(t + 1, max_iter)).to(tl.int64))
    tl.store(update.new_f + rows, new_f, mask=in_rows)


@triton.jit
def sinkhorn_plan_kernel(pairs, plan, out_ptr, tile: tl.constexpr):
    """A tile of P."""
    N, M = pairs.N, pairs.M
    blocks = tl.cdiv(N, tile.BLOCK_N)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * tile.BLOCK_N + tl.arange(0, tile.BLOCK_N)
    j = tl.program_id(1) * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    inverse = 1.0 / tl.load(plan.epsilon + problem)
    costs = pairs_of_tile(pairs, problem, i, j, tile)
    offset_i = load_offset(plan.f, None, plan.log_a, problem * N + i, i < N, inverse)
    offset_j = load_offset(plan.g, None, plan.log_b, problem * M + j, j < M, inverse)
    at = (problem * N + i)[:, None] * M + j[None, :]
    p = tl.exp(offset_i[:, None] + offset_j[None, :] - inverse * costs)
    tl.store(out_ptr + at, p, mask=(i < N)[:, None] & (j < M)[None, :])


@triton.jit
def sinkhorn_apply_kernel(
    pairs, plan, values, h, k, out_ptr, OVER_DISTANCE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    tile: tl.constexpr
):  # fmt: skip
    """sum_j P_ij <h_i, k_j> / z_ij v_j of some rows and values, without what is not given."""
    KIND: tl.constexpr = tile.KIND
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    # Both are as exact as floats; three products of tf32 take registers that the products <h_i, k_j> leave none of.
    PRECISION: tl.constexpr = "tf32x3" if h.ptr is None else "ieee"
    N, M, V = pairs.N, pairs.M, values.size
    blocks = tl.cdiv(N, BLOCK_N)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = problem * N + i
    inverse = 1.0 / tl.load(plan.epsilon + problem)
    offset_i = load_offset(plan.f, pairs.x_squares, plan.log_a, rows, i < N, inverse)
    out = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for begin in range(0, M, tile.BLOCK_M):
        j = begin + tl.arange(0, tile.BLOCK_M)
        columns = problem * M + j
        z = pairs_of_tile(pairs, problem, i, j, tile)
        offset_j = load_offset(plan.g, pairs.y_squares, plan.log_b, columns, j < M, inverse)
        weights = tl.exp(factor_of(inverse, KIND) * z + (offset_i[:, None] + offset_j[None, :]))
        if h.ptr is not None:
            weights *= products(h.ptr, k.ptr, rows * h.size, columns * h.size, i < N, j < M, h.size, BLOCK_K, False)
        if OVER_DISTANCE:
            weights = tl.where(z > 0, weights / z, 0.0)
        tile_values = load_columns(values.ptr, columns[:, None] * V, v[None, :], (j < M)[:, None], V)
        if BLOCK_V == 1:
            out += tl.sum(weights * tl.trans(tile_values), 1)[:, None]
        else:
            out = tl.dot(weights, tile_values, out, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * V + v[None, :], out, mask=(i < N)[:, None] & (v < V)[None, :])


def solve_large(pairs, swapped, problem):
    """Half-steps until all problems have stopped. New potentials of the rows go to a second buffer, for their error
    decides whether they count: after t iterations those that do are in buffer t % 2."""
    (f, g, a, b, start, epsilon, value, error, n_iter), max_iter, scaling, tol, rho, symmetric = problem
    buffers = torch.stack([f, f])
    tile, column_tile = pairs.tile(), swapped.tile()
    programs, column_programs = pairs.row_programs(tile), swapped.row_programs(column_tile)
    partials = f.new_empty(programs)
    tickets = torch.zeros_like(n_iter, dtype=torch.int32)
    log_a, log_b, mass = a.log(), b.log(), a.sum(1)
    stages = (None, None) if start is None else first_stages(start, epsilon, max_iter)

    def progress(t):
        return Progress(epsilon, stages[t % 2], stages[1 - t % 2], partials, tickets, error, n_iter)

    def update_rows(t):
        f, new_f = buffers[t % 2], buffers[1 - t % 2]
        sinkhorn_half_step_kernel[(programs,)](
            pairs.tensors, Update(f, f if symmetric else g, new_f, log_b, a, mass), progress(t), 0, t, max_iter,
            scaling, tol, rho.a, len(f), symmetric, tile, num_stages=1,
        )  # fmt: skip

    def update_columns(t):
        new_f = buffers[1 - t % 2]
        before = f.numel() * (1 if t % 2 else -1)  # where the f of before lies
        sinkhorn_half_step_kernel[(column_programs,)](
            swapped.tensors, Update(g, new_f, g, log_a, None, None), progress(t), before, t + 1, max_iter, scaling, tol,
            rho.b, len(f), False, column_tile, num_stages=1,
        )  # fmt: skip

    asked = Asked(n_iter)
    for t in range(max_iter):
        if t > 0 and t % CHECK_EVERY == 0 and not asked.any(n_iter >= t):
            break
        update_rows(t)
        if not symmetric:
            update_columns(t)
    else:
        update_rows(max_iter)  # for the error alone
    is_even = (n_iter % 2 == 0)[:, None]
    torch.where(is_even, *buffers, out=f)
    if symmetric:  # the other buffer has the mean of f and its update
        torch.where(is_even, *buffers.flip(0), out=g).mul_(2).sub_(f)
    value.copy_(value_of(f, g, a, b, epsilon, *rho))


def solve(pairs, swapped, given, begin, *, max_iter, tol, rho_a=None, rho_b=None, scaling=0.5, symmetric=False):
    """(f, g, value, error, n_iter) from (a, b, epsilon), beginning with (f, g, start)."""
    (a, b, epsilon), (f, g, start) = given, begin
    f = torch.zeros_like(a) if f is None else f.clone()
    g = torch.zeros_like(b) if g is None else g.clone()
    value, error = torch.empty_like(epsilon), torch.empty_like(epsilon)
    n_iter = torch.zeros_like(epsilon, dtype=torch.int64)
    tensors = ProblemTensors(f, g, a, b, start, epsilon, value, error, n_iter)
    problem = Problem(tensors, max_iter, scaling, tol, Penalties(rho_a, rho_b), symmetric)
    if pairs.batch > 0:
        with torch.cuda.device_of(a):
            if pairs.is_small:
                solve_small(pairs, problem)
            else:
                solve_large(pairs, swapped, problem)
    return f, g, value, error, n_iter


def apply(pairs, plan, v, h=None, k=None, over_distance=False):
    values, weights = v.shape[2], 0 if h is None else h.shape[2]
    out = v.new_empty(pairs.batch, pairs.tensors.N, values)
    tile, warps = pairs.tile(max_rows=32), 8
    if pairs.is_small:
        rows, columns = (max(16, triton.next_power_of_2(size)) for size in pairs.shape)
        tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, rows), BLOCK_M=columns)
        warps = min(8, tile.BLOCK_N * columns // 128)
    block_v = 1 if values == 1 else min(32, max(16, triton.next_power_of_2(values)))
    if out.numel():
        with torch.cuda.device_of(v):
            sinkhorn_apply_kernel[(pairs.row_programs(tile), triton.cdiv(values, block_v))](
                pairs.tensors, plan, Vectors(v, values), Vectors(h, weights), Vectors(k, weights), out, over_distance,
                BLOCK_K=32 if weights > 16 else 16, BLOCK_V=block_v, tile=tile, num_warps=warps, num_stages=1,
            )  # fmt: skip
    return out


def plan_of(a, b, epsilon, f, g):
    log_a, log_b = (None if marginal is None else marginal.log() for marginal in (a, b))
    return PlanTensors(f, g, log_a, log_b, epsilon)


def sinkhorn(cost, a, b, epsilon, f=None, g=None, start=None, **options):
    """(f, g, value, error, n_iter)"""
    pairs, swapped = (pairs_of_matrix("sinkhorn", matrix) for matrix in (cost, cost.mT))
    return solve(pairs, swapped, (a, b, epsilon), (f, g, start), **options)


def sinkhorn_points(x, y, a, b, epsilon, f=None, g=None, start=None, *, cost, allow_tf32=False, **options):
    """(f, g, value, error, n_iter)"""
    pairs, swapped = (pairs_of_points("sinkhorn_points", *points, cost, allow_tf32) for points in ((x, y), (y, x)))
    return solve(pairs, swapped, (a, b, epsilon), (f, g, start), **options)


def sinkhorn_plan(cost, a, b, epsilon, f, g, **penalties):
    pairs = pairs_of_matrix("sinkhorn_plan", cost)
    out = cost.new_empty(cost.shape)
    if out.numel():
        rows, columns = (min(most, triton.next_power_of_2(n)) for n, most in zip(pairs.shape, (32, 64), strict=True))
        tile = Tile(pairs.kind, rows, columns)
        with torch.cuda.device_of(cost):
            sinkhorn_plan_kernel[(pairs.row_programs(tile), triton.cdiv(cost.shape[2], tile.BLOCK_M))](
                pairs.tensors, plan_of(a, b, epsilon, f, g), out, tile, num_warps=max(1, rows * columns // 512)
            )
    return out


def sinkhorn_apply(cost, a, b, epsilon, f, g, v):
    return apply(pairs_of_matrix("sinkhorn_apply", cost), plan_of(a, b, epsilon, f, g), v)


def sinkhorn_points_apply(
    x, y, a, b, epsilon, f, g, v, h=None, k=None, *, cost, over_distance=False, **penalties
):  # fmt: skip
    pairs = pairs_of_points("sinkhorn_points_apply", x, y, cost)
    return apply(pairs, plan_of(a, b, epsilon, f, g), v, h, k, over_distance)


def sinkhorn_unrolled(cost, a, b, epsilon, **options):
    """(f, g)"""
    return sinkhorn(cost, a, b, epsilon, tol=-1.0, **options)[:2]


OPS = {
    "sinkhorn": sinkhorn,
    "sinkhorn_points": sinkhorn_points,
    "sinkhorn_plan": sinkhorn_plan,
    "sinkhorn_apply": sinkhorn_apply,
    "sinkhorn_points_apply": sinkhorn_points_apply,
    "sinkhorn_unrolled": sinkhorn_unrolled,
}
