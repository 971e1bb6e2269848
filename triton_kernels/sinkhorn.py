"""Entropic optimal transport in the log domain; csrc/sinkhorn/sinkhorn.h has the formulas, pairs.py the tiles.

Potentials in memory are in units of the cost, so that they stay what they are while epsilon falls. Problems stop on the
device: n_iter counts the iterations of each, and one that it leaves behind has stopped.
"""

import torch
import triton
import triton.language as tl

from tilewise.formulas.lbfgs import Asked
from tilewise.formulas.transport import value_of

from .pairs import (
    damping,
    factor_of,
    load_columns,
    load_hat,
    pairs_of_matrix,
    pairs_of_points,
    pairs_of_tile,
    products,
    row_errors,
    updated,
)
from .rows import softmax_merge
from .small_sinkhorn import solve_small
from .transport_stages import first_stages, moved, stage_after

CHECK_EVERY = 16  # iterations after which the host asks whether all problems have stopped


@triton.jit(do_not_specialize=["t", "max_iter", "averaged_offset"])
def sinkhorn_half_step_kernel(
    x_ptr,
    y_ptr,
    x_squares_ptr,
    y_squares_ptr,
    f_ptr,
    g_ptr,
    averaged_offset,
    new_f_ptr,
    log_b_ptr,
    a_ptr,
    mass_ptr,
    stage_ptr,
    next_ptr,
    epsilon_ptr,
    partial_ptr,
    ticket_ptr,
    error_ptr,
    n_iter_ptr,
    t,
    max_iter,
    scaling,
    tol,
    rho,
    B,
    N,
    M,
    x_batch,
    y_batch,
    row_stride,
    column_stride,
    D,
    SYMMETRIC: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The update of f from g, of a problem that has done t iterations; averaged, from the g before. With a it also
    takes the error of f: the last program of the problem adds up those of all, and unless that stops the problem it
    counts the iteration and says what the next one does."""
    programs = tl.cdiv(N, BLOCK_N)
    problem = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs
    if tl.load(n_iter_ptr + problem) < t:
        return
    epsilon = tl.load(epsilon_ptr + problem)
    now, step = epsilon, 1.0
    if stage_ptr is not None:
        now = tl.load(stage_ptr + problem)
        step = tl.load(stage_ptr + B + problem)
        if a_ptr is not None:
            now = tl.where(t == max_iter, epsilon, now)
        g_ptr += tl.where(step < 1, averaged_offset, 0)
    inverse = 1.0 / now
    i = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, rows = i < N, problem * N + i
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for begin in range(0, M, BLOCK_M):
        j = begin + tl.arange(0, BLOCK_M)
        z = pairs_of_tile(
            x_ptr, y_ptr, problem, i, j, N, M, x_batch, y_batch, row_stride, column_stride, D, KIND, BLOCK_D
        )  # fmt: skip
        hat = load_hat(g_ptr, y_squares_ptr, log_b_ptr, problem * M + j, j < M, inverse)
        scores = factor_of(inverse, KIND) * z + hat[None, :]
        top, sums, _, _, _, _ = softmax_merge(top, sums, scores, tl.max(scores, 1))
    lse = top + tl.log(tl.sum(sums, 1))  # without a pair both are -inf
    if x_squares_ptr is not None:
        lse -= tl.load(x_squares_ptr + rows, mask=in_rows, other=0.0) * inverse
    new_f = now * updated(lse, damping(now, rho))
    if stage_ptr is not None or a_ptr is not None:
        f = tl.load(f_ptr + rows, mask=in_rows, other=0.0)
        if SYMMETRIC:
            new_f = (f + new_f) * 0.5
        elif stage_ptr is not None:
            new_f = moved(f, new_f, step)
    if a_ptr is not None:
        a = tl.load(a_ptr + rows, mask=in_rows, other=0.0)
        partials = partial_ptr + problem * programs
        tl.store(partials + block, tl.sum(row_errors(a, f, lse, inverse, rho)))
        if tl.atomic_add(ticket_ptr + problem, 1) % programs == programs - 1:
            error = 0.0
            for begin in range(0, programs, 1024):
                at = begin + tl.arange(0, 1024)
                error += tl.sum(tl.load(partials + at, mask=at < programs, other=0.0))
            mass = tl.load(mass_ptr + problem)
            error = tl.where(mass > 0, error / mass, 0.0)
            tl.store(error_ptr + problem, error)
            stops = (t > 0) & (error <= tol)
            if stage_ptr is not None:
                before, relaxed = tl.load(stage_ptr + 2 * B + problem), tl.load(stage_ptr + 3 * B + problem)
                now, step, before, relaxed, stops = stage_after(
                    now, step, before, relaxed, error, t, epsilon, max_iter, tol, scaling, SYMMETRIC
                )
                tl.store(next_ptr + problem, now)
                tl.store(next_ptr + B + problem, step)
                tl.store(next_ptr + 2 * B + problem, before)
                tl.store(next_ptr + 3 * B + problem, relaxed)
            tl.store(n_iter_ptr + problem, tl.where(stops, t, tl.minimum(t + 1, max_iter)).to(tl.int64))
    tl.store(new_f_ptr + rows, new_f, mask=in_rows)


@triton.jit
def sinkhorn_plan_kernel(
    x_ptr,
    f_ptr,
    g_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    out_ptr,
    N,
    M,
    x_batch,
    y_batch,
    row_stride,
    column_stride,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of P."""
    blocks = tl.cdiv(N, BLOCK_N)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inverse = 1.0 / tl.load(epsilon_ptr + problem)
    costs = pairs_of_tile(
        x_ptr, None, problem, i, j, N, M, x_batch, y_batch, row_stride, column_stride, D, "matrix", 1
    )  # fmt: skip
    hat_i = load_hat(f_ptr, None, log_a_ptr, problem * N + i, i < N, inverse)
    hat_j = load_hat(g_ptr, None, log_b_ptr, problem * M + j, j < M, inverse)
    at = (problem * N + i)[:, None] * M + j[None, :]
    plan = tl.exp(hat_i[:, None] + hat_j[None, :] - inverse * costs)
    tl.store(out_ptr + at, plan, mask=(i < N)[:, None] & (j < M)[None, :])


@triton.jit
def sinkhorn_apply_kernel(
    x_ptr,
    y_ptr,
    x_squares_ptr,
    y_squares_ptr,
    f_ptr,
    g_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    v_ptr,
    h_ptr,
    k_ptr,
    out_ptr,
    V,
    K,
    N,
    M,
    x_batch,
    y_batch,
    row_stride,
    column_stride,
    D,
    OVER_DISTANCE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """sum_j P_ij <h_i, k_j> / z_ij v_j of some rows and values, without what is not given."""
    blocks = tl.cdiv(N, BLOCK_N)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = problem * N + i
    inverse = 1.0 / tl.load(epsilon_ptr + problem)
    hat_i = load_hat(f_ptr, x_squares_ptr, log_a_ptr, rows, i < N, inverse)
    out = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for begin in range(0, M, BLOCK_M):
        j = begin + tl.arange(0, BLOCK_M)
        columns = problem * M + j
        z = pairs_of_tile(
            x_ptr, y_ptr, problem, i, j, N, M, x_batch, y_batch, row_stride, column_stride, D, KIND, BLOCK_D
        )  # fmt: skip
        hat_j = load_hat(g_ptr, y_squares_ptr, log_b_ptr, columns, j < M, inverse)
        weights = tl.exp(factor_of(inverse, KIND) * z + (hat_i[:, None] + hat_j[None, :]))
        if h_ptr is not None:
            weights *= products(h_ptr, k_ptr, rows * K, columns * K, i < N, j < M, K, BLOCK_K)
        if OVER_DISTANCE:
            weights = tl.where(z > 0, weights / z, 0.0)
        values = load_columns(v_ptr, columns[:, None] * V, v[None, :], (j < M)[:, None], V)
        if BLOCK_V == 1:
            out += tl.sum(weights * tl.trans(values), 1)[:, None]
        else:
            out = tl.dot(weights, values, out, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * V + v[None, :], out, mask=(i < N)[:, None] & (v < V)[None, :])


def solve_large(
    pairs, swapped, f, g, a, b, start, epsilon, error, n_iter, *, max_iter, tol, rho_a, rho_b, scaling, symmetric
):
    """Half-steps until all problems have stopped. New potentials of the rows go to a second buffer, for their error
    decides whether they count: after t iterations those that do are in buffer t % 2."""
    buffers = torch.stack([f, f])
    shape, column_shape = pairs.constants(), swapped.constants()
    programs, column_programs = pairs.row_programs(shape), swapped.row_programs(column_shape)
    partials = f.new_empty(programs)
    tickets = torch.zeros_like(n_iter, dtype=torch.int32)
    log_a, log_b, mass = a.log(), b.log(), a.sum(1)
    stages = (None, None) if start is None else first_stages(start, epsilon, max_iter)
    state = (epsilon, partials, tickets, error, n_iter)
    options = (max_iter, scaling, tol)

    def update_rows(t):
        f, new_f = buffers[t % 2], buffers[1 - t % 2]
        sinkhorn_half_step_kernel[(programs,)](
            *pairs.tensors, f, f if symmetric else g, 0, new_f, log_b, a, mass, stages[t % 2], stages[1 - t % 2],
            *state, t, *options, rho_a, len(f), *pairs.sizes, SYMMETRIC=symmetric, **shape,
        )  # fmt: skip

    def update_columns(t):
        new_f = buffers[1 - t % 2]
        before = f.numel() * (1 if t % 2 else -1)  # where the f of before lies
        sinkhorn_half_step_kernel[(column_programs,)](
            *swapped.tensors, g, new_f, before, g, log_a, None, None, stages[t % 2], None, *state, t + 1, *options,
            rho_b, len(f), *swapped.sizes, SYMMETRIC=False, **column_shape,
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


def solve(
    pairs, swapped, a, b, epsilon, f, g, start, *, max_iter, tol, rho_a=None, rho_b=None, scaling=0.5, symmetric=False
):
    """(f, g, value, error, n_iter)"""
    f = torch.zeros_like(a) if f is None else f.clone()
    g = torch.zeros_like(b) if g is None else g.clone()
    error, n_iter = torch.empty_like(epsilon), torch.zeros_like(epsilon, dtype=torch.int64)
    options = {"max_iter": max_iter, "tol": tol, "rho_a": rho_a, "rho_b": rho_b, "scaling": scaling}
    arguments = (f, g, a, b, start, epsilon, error, n_iter)
    if pairs.batch > 0:
        with torch.cuda.device_of(a):
            if pairs.small:
                solve_small(pairs, *arguments, **options, symmetric=symmetric)
            else:
                solve_large(pairs, swapped, *arguments, **options, symmetric=symmetric)
    return f, g, value_of(f, g, a, b, epsilon, rho_a, rho_b), error, n_iter


def apply(pairs, a, b, epsilon, f, g, v, h=None, k=None, over_distance=False):
    values, weights = v.shape[2], 0 if h is None else h.shape[2]
    out = v.new_empty(pairs.batch, pairs.sizes[0], values)
    constants = pairs.constants(most_rows=32)
    block_v = 1 if values == 1 else min(32, max(16, triton.next_power_of_2(values)))
    if out.numel():
        with torch.cuda.device_of(v):
            sinkhorn_apply_kernel[(pairs.row_programs(constants), triton.cdiv(values, block_v))](
                *pairs.tensors, f, g, log_of(a), log_of(b), epsilon, v, h, k, out, values, weights, *pairs.sizes,
                OVER_DISTANCE=over_distance, BLOCK_K=32 if weights > 16 else 16, BLOCK_V=block_v, num_warps=8,
                **constants,
            )  # fmt: skip
    return out


def log_of(marginal):
    return None if marginal is None else marginal.log()


def sinkhorn(cost, a, b, epsilon, f=None, g=None, start=None, **options):
    """(f, g, value, error, n_iter)"""
    pairs, swapped = (pairs_of_matrix("sinkhorn", matrix) for matrix in (cost, cost.mT))
    return solve(pairs, swapped, a, b, epsilon, f, g, start, **options)


def sinkhorn_points(x, y, a, b, epsilon, f=None, g=None, start=None, *, cost, **options):
    """(f, g, value, error, n_iter)"""
    pairs, swapped = (pairs_of_points("sinkhorn_points", *points, cost) for points in ((x, y), (y, x)))
    return solve(pairs, swapped, a, b, epsilon, f, g, start, **options)


def sinkhorn_plan(cost, a, b, epsilon, f, g, **penalties):
    pairs = pairs_of_matrix("sinkhorn_plan", cost)
    out = cost.new_empty(cost.shape)
    if out.numel():
        with torch.cuda.device_of(cost):
            sinkhorn_plan_kernel[(pairs.batch * triton.cdiv(cost.shape[1], 32), triton.cdiv(cost.shape[2], 64))](
                cost, f, g, log_of(a), log_of(b), epsilon, out, *pairs.sizes, BLOCK_N=32, BLOCK_M=64
            )
    return out


def sinkhorn_apply(cost, a, b, epsilon, f, g, v):
    return apply(pairs_of_matrix("sinkhorn_apply", cost), a, b, epsilon, f, g, v)


def sinkhorn_points_apply(
    x, y, a, b, epsilon, f, g, v, h=None, k=None, *, cost, over_distance=False, **penalties
):  # fmt: skip
    pairs = pairs_of_points("sinkhorn_points_apply", x, y, cost)
    return apply(pairs, a, b, epsilon, f, g, v, h, k, over_distance)


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
