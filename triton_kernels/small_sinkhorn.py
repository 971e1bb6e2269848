"""Transport problems of at most 64 x 64 pairs, all iterations of each in one program, and the way back through them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .pairs import SMALL, Penalties, damping, log_sum_exp, pairs_of_matrix, pairs_of_tile, row_errors, updated
from .rows import expm1, finite_max
from .transport_stages import moved, stage_after


class ProblemTensors(NamedTuple):
    """What solvers are given, and where their results go: f and g (where they start, too), value, error and n_iter."""

    f: torch.Tensor
    g: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    start: torch.Tensor | None
    epsilon: torch.Tensor
    value: torch.Tensor
    error: torch.Tensor
    n_iter: torch.Tensor


class Problem(NamedTuple):
    tensors: ProblemTensors
    max_iter: int
    scaling: float
    tol: float
    rho: Penalties
    symmetric: bool


class Unrolled(NamedTuple):
    """What gradients of unrolled iterations need, and where they go."""

    a: torch.Tensor
    b: torch.Tensor
    epsilon: torch.Tensor
    grad_f: torch.Tensor
    grad_g: torch.Tensor
    history: torch.Tensor
    grad_cost: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    grad_epsilon: torch.Tensor


@triton.jit
def dual_sum(marginal, potential, rho):
    """A side's part of the value, without the mass of the plan: the sum of a f, or of -rho a (exp(-f / rho) - 1)."""
    if rho is None:
        terms = potential
    else:
        power = -potential / rho
        terms = -rho * tl.where(tl.abs(power) < 0.5, expm1(power), tl.exp(power) - 1.0)
    return tl.sum(marginal * terms)


@triton.jit(do_not_specialize=["max_iter"])
def sinkhorn_small_kernel(
    pairs, given, log_a_ptr, log_b_ptr, max_iter, scaling, tol, rho, SYMMETRIC: tl.constexpr, tile: tl.constexpr
):
    """All iterations of a problem whose pairs are one tile. What comes after the last is for its error alone."""
    N, M = pairs.N, pairs.M
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, tile.BLOCK_N), tl.arange(0, tile.BLOCK_M)
    rows, columns = problem * N + i, problem * M + j
    f = tl.load(given.f + rows, mask=i < N, other=0.0)
    g = tl.load(given.g + columns, mask=j < M, other=0.0)
    a = tl.load(given.a + rows, mask=i < N, other=0.0)
    log_a = tl.load(log_a_ptr + rows, mask=i < N, other=float("-inf"))
    log_b = tl.load(log_b_ptr + columns, mask=j < M, other=float("-inf"))
    costs = pairs_of_tile(pairs, problem, i, j, tile)
    mass = tl.sum(a)
    epsilon = tl.load(given.epsilon + problem)
    now, step, before, relaxed = epsilon, epsilon * 0.0 + 1.0, epsilon * 0.0 + 0.5, epsilon * 0.0 + 1.8
    if given.start is not None:
        now = tl.maximum(tl.load(given.start + problem), epsilon)
        step = tl.where(max_iter == 1, 1.0, before)
    error, t = mass * 0.0, max_iter * 0
    going = t < max_iter
    while going:
        if given.start is not None:
            now = tl.where(t == max_iter, epsilon, now)
        inverse = 1.0 / now
        scores = costs * -inverse
        lse = log_sum_exp(scores + (g * inverse + log_b)[None, :], 1)
        error = tl.where(mass > 0, tl.sum(row_errors(a, f, lse, inverse, rho.a)) / mass, 0.0)
        going = (t < max_iter) & ((t == 0) | (error > tol))
        new_f = now * updated(lse, damping(now, rho.a))
        if SYMMETRIC:
            new_g = new_f
            new_f = (f + new_f) * 0.5
        else:
            if given.start is not None:
                new_f = moved(f, new_f, step)
            seen = tl.where(step < 1, f, new_f)
            lse = log_sum_exp(scores + (seen * inverse + log_a)[:, None], 0)
            new_g = now * updated(lse, damping(now, rho.b))
            if given.start is not None:
                new_g = moved(g, new_g, step)
        if given.start is not None:
            next_now, next_step, next_before, next_relaxed, stops = stage_after(
                now, step, before, relaxed, error, t, epsilon, max_iter, tol, scaling, SYMMETRIC
            )
            going = (t < max_iter) & (stops == 0)
            now = tl.where(going, next_now, now)
            step, before, relaxed = next_step, next_before, next_relaxed
        f = tl.where(going, new_f, f)
        if SYMMETRIC:
            g = tl.where(going, f, new_g)  # in the end the update of f
        else:
            g = tl.where(going, new_g, g)
        t += going.to(tl.int32)
    tl.store(given.f + rows, f, mask=i < N)
    tl.store(given.g + columns, g, mask=j < M)
    b = tl.load(given.b + columns, mask=j < M, other=0.0)
    of_columns = tl.sum(b if rho.b is None else b * tl.exp(-g / rho.b))  # the mass of the plan, which is exact there
    value = dual_sum(a, f, rho.a) + dual_sum(b, g, rho.b) - epsilon * (of_columns - mass * tl.sum(b))
    tl.store(given.value + problem, value)
    tl.store(given.error + problem, error)
    tl.store(given.n_iter + problem, t.to(tl.int64))


@triton.jit
def pulled(scores, marginal, log_marginal, upstream, AXIS: tl.constexpr):
    """Along AXIS softmax(scores + log marginal) / marginal times the upstream gradient of the log of its sum."""
    shift = finite_max(tl.max(scores + tl.expand_dims(log_marginal, 1 - AXIS), AXIS))
    # Without its marginal, which may be 0, a term may be too large; a finite one times 0 is 0.
    terms = tl.exp(tl.minimum(scores - tl.expand_dims(shift, AXIS), 80.0))
    total = tl.sum(tl.expand_dims(marginal, 1 - AXIS) * terms, AXIS)
    return terms * tl.expand_dims(tl.where(total > 0, upstream / tl.maximum(total, 1e-30), 0.0), AXIS)


@triton.jit(do_not_specialize=["max_iter"])
def sinkhorn_unrolled_backward_kernel(pairs, given, log_a_ptr, log_b_ptr, max_iter, rho, tile: tl.constexpr):
    """The iterations of a problem again, their potentials kept in history (max_iter, N + M), and the way back. Inside,
    potentials and their gradients are in units of epsilon, and W are the gradients of the scores that a step leaves:

        g_j = -d log sum_i a_i exp(S_ij + f_i):   W_ij = -d g_bar_j a_i exp(S_ij + f_i) / sum   f_bar_i += sum_j W_ij
    """
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    N, M = pairs.N, pairs.M
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    rows, columns = problem * N + i, problem * M + j
    a = tl.load(given.a + rows, mask=i < N, other=0.0)
    b = tl.load(given.b + columns, mask=j < M, other=0.0)
    log_a = tl.load(log_a_ptr + rows, mask=i < N, other=float("-inf"))
    log_b = tl.load(log_b_ptr + columns, mask=j < M, other=float("-inf"))
    epsilon = tl.load(given.epsilon + problem)
    damp_a, damp_b = damping(epsilon, rho.a), damping(epsilon, rho.b)
    costs = pairs_of_tile(pairs, problem, i, j, tile)
    scores = costs / -epsilon
    f = tl.zeros([BLOCK_N], tl.float32)
    g = tl.zeros([BLOCK_M], tl.float32)
    history = given.history + problem * max_iter * (N + M)
    for t in range(max_iter):
        f = updated(log_sum_exp(scores + (g + log_b)[None, :], 1), damp_a)
        g = updated(log_sum_exp(scores + (f + log_a)[:, None], 0), damp_b)
        tl.store(history + t * (N + M) + i, f, mask=i < N)
        tl.store(history + t * (N + M) + N + j, g, mask=j < M)
    tl.debug_barrier()  # other threads will read what these wrote

    f_bar = tl.load(given.grad_f + rows, mask=i < N, other=0.0)
    g_bar = tl.load(given.grad_g + columns, mask=j < M, other=0.0)
    epsilon_bar = tl.sum(f_bar * f) + tl.sum(g_bar * g)
    f_bar *= epsilon
    g_bar *= epsilon
    scores_bar = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    a_bar = tl.zeros([BLOCK_N], tl.float32)
    b_bar = tl.zeros([BLOCK_M], tl.float32)
    for step in range(max_iter):
        t = max_iter - 1 - step
        f = tl.load(history + t * (N + M) + i, mask=i < N, other=0.0)
        if rho.b is not None:  # d log d = -1 / (rho + epsilon)
            epsilon_bar -= tl.sum(g_bar * g) / (rho.b + epsilon)
        without = pulled(scores + f[:, None], a, log_a, -damp_b * g_bar, 0)
        scores_bar += a[:, None] * without
        a_bar += tl.sum(without, 1)
        f_bar += a * tl.sum(without, 1)
        if rho.a is not None:
            epsilon_bar -= tl.sum(f_bar * f) / (rho.a + epsilon)
        g = tl.load(history + (t - 1) * (N + M) + N + j, mask=(j < M) & (t > 0), other=0.0)
        without = pulled(scores + g[None, :], b, log_b, -damp_a * f_bar, 1)
        scores_bar += b[None, :] * without
        b_bar += tl.sum(without, 0)
        g_bar = b * tl.sum(without, 0)
        f_bar = tl.zeros([BLOCK_N], tl.float32)
    epsilon_bar -= tl.sum(tl.where(scores == float("-inf"), 0.0, scores_bar * scores)) / epsilon
    at = rows[:, None] * M + j[None, :]
    tl.store(given.grad_cost + at, scores_bar / -epsilon, mask=(i < N)[:, None] & (j < M)[None, :])
    tl.store(given.grad_a + rows, a_bar, mask=i < N)
    tl.store(given.grad_b + columns, b_bar, mask=j < M)
    tl.store(given.grad_epsilon + problem, epsilon_bar)


def solve_small(pairs, problem):
    sinkhorn_small_kernel[(pairs.batch,)](
        pairs.tensors, problem.tensors, problem.tensors.a.log(), problem.tensors.b.log(), problem.max_iter,
        problem.scaling, problem.tol, problem.rho, SYMMETRIC=problem.symmetric, **pairs.small_constants(),
    )  # fmt: skip


def sinkhorn_unrolled_backward(grad_f, grad_g, cost, a, b, epsilon, *, max_iter, rho_a=None, rho_b=None):
    """Gradients of cost, a, b and epsilon."""
    pairs = pairs_of_matrix("sinkhorn_unrolled_backward", cost)
    if not pairs.is_small:
        raise ValueError(
            f"tilewise.sinkhorn_unrolled_backward: expected cost to have at most {SMALL} rows and columns, "
            f"got shape {tuple(cost.shape)}"
        )
    gradients = [t.new_empty(t.shape) for t in (cost, a, b, epsilon)]
    history = a.new_empty(pairs.batch, max_iter, sum(cost.shape[1:]))
    if pairs.batch > 0:
        with torch.cuda.device_of(cost):
            sinkhorn_unrolled_backward_kernel[(pairs.batch,)](
                pairs.tensors, Unrolled(a, b, epsilon, grad_f, grad_g, history, *gradients), a.log(), b.log(), max_iter,
                Penalties(rho_a, rho_b), **pairs.small_constants(pairs=8),
            )  # fmt: skip
    return tuple(gradients)


OPS = {"sinkhorn_unrolled_backward": sinkhorn_unrolled_backward}
