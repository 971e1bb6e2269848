"""Entropic optimal transport in the log domain; csrc/sinkhorn/sinkhorn.h has the formulas.

Tiles are (BLOCK_N, BLOCK_M) pairs of one problem, scores are factor z + hat_i + hat_j, and a side's hat is
(potential - s) / epsilon + log marginal. Points with few features give z as squares or distances from differences,
which cancel nothing; squares of many features come from products:

    matrix  z = C    squares  z = |x - y|^2    distances  z = |x - y|       factor = -1/epsilon, s = 0
    products  z = <x, y>                                                    factor = 2/epsilon, s = |x|^2

Potentials in memory are in units of the cost, so that they stay what they are while epsilon falls. Problems stop on the
device: n_iter counts the iterations of each, and one that it leaves behind has stopped.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tilewise.reference.sinkhorn import value_of

from .rows import finite_max, softmax_merge

SMALL = 64  # rows and columns of a problem that one program solves in its registers
FEWEST_PRODUCTS = 16  # features from which products are worth their cancellation
CHECK_EVERY = 16  # iterations after which the host asks whether all problems have stopped
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


@triton.jit(do_not_specialize=["t", "max_iter"])
def sinkhorn_half_step_kernel(
    x_ptr,
    y_ptr,
    x_squares_ptr,
    y_squares_ptr,
    f_ptr,
    g_ptr,
    new_f_ptr,
    log_b_ptr,
    a_ptr,
    mass_ptr,
    start_ptr,
    epsilon_ptr,
    partial_ptr,
    ticket_ptr,
    error_ptr,
    n_iter_ptr,
    t,
    max_iter,
    decay,
    tol,
    rho,
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
    """The update of f from g, of a problem that has done t iterations. With a it also takes the error of f: the last
    program of the problem adds up those of all, and unless that stops the problem it counts the iteration."""
    programs = tl.cdiv(N, BLOCK_N)
    problem = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs
    if tl.load(n_iter_ptr + problem) < t:
        return
    epsilon = tl.load(epsilon_ptr + problem)
    now = tl.maximum(tl.load(start_ptr + problem) * decay, epsilon)
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
    if a_ptr is not None:
        f = tl.load(f_ptr + rows, mask=in_rows, other=0.0)
        if SYMMETRIC:
            new_f = (f + new_f) * 0.5
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
            stops = (t > 0) & (now == epsilon) & (error <= tol)
            tl.store(n_iter_ptr + problem, tl.where(stops, t, tl.minimum(t + 1, max_iter)).to(tl.int64))
    tl.store(new_f_ptr + rows, new_f, mask=in_rows)


@triton.jit(do_not_specialize=["max_iter"])
def sinkhorn_small_kernel(
    x_ptr,
    y_ptr,
    f_ptr,
    g_ptr,
    a_ptr,
    b_ptr,
    log_a_ptr,
    log_b_ptr,
    start_ptr,
    epsilon_ptr,
    error_ptr,
    n_iter_ptr,
    max_iter,
    scaling,
    tol,
    rho_a,
    rho_b,
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
):
    """All iterations of a problem whose pairs are one tile. What comes after the last is for its error alone."""
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    rows, columns = problem * N + i, problem * M + j
    f = tl.load(f_ptr + rows, mask=i < N, other=0.0)
    g = tl.load(g_ptr + columns, mask=j < M, other=0.0)
    a = tl.load(a_ptr + rows, mask=i < N, other=0.0)
    log_a = tl.load(log_a_ptr + rows, mask=i < N, other=float("-inf"))
    log_b = tl.load(log_b_ptr + columns, mask=j < M, other=float("-inf"))
    costs = pairs_of_tile(x_ptr, y_ptr, problem, i, j, N, M, x_batch, y_batch, row_stride, column_stride, D, KIND, 1)
    mass = tl.sum(a)
    start, epsilon = tl.load(start_ptr + problem), tl.load(epsilon_ptr + problem)
    decay, error, t = mass * 0.0 + 1.0, mass * 0.0, max_iter * 0
    going = t < max_iter
    while going:
        now = tl.maximum(start * decay, epsilon)
        inverse = 1.0 / now
        scores = costs * -inverse
        lse = log_sum_exp(scores + (g * inverse + log_b)[None, :], 1)
        error = tl.where(mass > 0, tl.sum(row_errors(a, f, lse, inverse, rho_a)) / mass, 0.0)
        going = (t < max_iter) & ((t == 0) | (now > epsilon) | (error > tol))
        new_f = now * updated(lse, damping(now, rho_a))
        if SYMMETRIC:
            new_f = (f + new_f) * 0.5
            new_g = new_f
        else:
            lse = log_sum_exp(scores + (new_f * inverse + log_a)[:, None], 0)
            new_g = now * updated(lse, damping(now, rho_b))
        f = tl.where(going, new_f, f)
        g = tl.where(going, new_g, g)
        t += going.to(tl.int32)
        decay = tl.where(t < max_iter, decay * scaling, decay)
    tl.store(f_ptr + rows, f, mask=i < N)
    tl.store(g_ptr + columns, g, mask=j < M)
    tl.store(error_ptr + problem, error)
    tl.store(n_iter_ptr + problem, t.to(tl.int64))


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


@triton.jit
def pulled(scores, marginal, log_marginal, upstream, AXIS: tl.constexpr):
    """Along AXIS softmax(scores + log marginal) / marginal times the upstream gradient of the log of its sum."""
    top = finite_max(tl.max(scores + tl.expand_dims(log_marginal, 1 - AXIS), AXIS))
    # Without its marginal, which may be 0, a term may be too large; a finite one times 0 is 0.
    terms = tl.exp(tl.minimum(scores - tl.expand_dims(top, AXIS), 80.0))
    total = tl.sum(tl.expand_dims(marginal, 1 - AXIS) * terms, AXIS)
    return terms * tl.expand_dims(tl.where(total > 0, upstream / tl.maximum(total, 1e-30), 0.0), AXIS)


@triton.jit(do_not_specialize=["max_iter"])
def sinkhorn_unrolled_backward_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    grad_f_ptr,
    grad_g_ptr,
    history_ptr,
    grad_cost_ptr,
    grad_a_ptr,
    grad_b_ptr,
    grad_epsilon_ptr,
    max_iter,
    rho_a,
    rho_b,
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
    """The iterations of a problem again, their potentials kept in history (max_iter, N + M), and the way back. Inside,
    potentials and their gradients are in units of epsilon, and W are the gradients of the scores that a step leaves:

        g_j = -d log sum_i a_i exp(S_ij + f_i):   W_ij = -d g_bar_j a_i exp(S_ij + f_i) / sum   f_bar_i += sum_j W_ij
    """
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    rows, columns = problem * N + i, problem * M + j
    a = tl.load(a_ptr + rows, mask=i < N, other=0.0)
    b = tl.load(b_ptr + columns, mask=j < M, other=0.0)
    log_a = tl.load(log_a_ptr + rows, mask=i < N, other=float("-inf"))
    log_b = tl.load(log_b_ptr + columns, mask=j < M, other=float("-inf"))
    epsilon = tl.load(epsilon_ptr + problem)
    damp_a, damp_b = damping(epsilon, rho_a), damping(epsilon, rho_b)
    costs = pairs_of_tile(
        x_ptr, None, problem, i, j, N, M, x_batch, y_batch, row_stride, column_stride, D, "matrix", 1
    )  # fmt: skip
    scores = costs / -epsilon
    f = tl.zeros([BLOCK_N], tl.float32)
    g = tl.zeros([BLOCK_M], tl.float32)
    history = history_ptr + problem * max_iter * (N + M)
    for t in range(max_iter):
        f = updated(log_sum_exp(scores + (g + log_b)[None, :], 1), damp_a)
        g = updated(log_sum_exp(scores + (f + log_a)[:, None], 0), damp_b)
        tl.store(history + t * (N + M) + i, f, mask=i < N)
        tl.store(history + t * (N + M) + N + j, g, mask=j < M)
    tl.debug_barrier()  # other threads will read what these wrote

    f_bar = tl.load(grad_f_ptr + rows, mask=i < N, other=0.0)
    g_bar = tl.load(grad_g_ptr + columns, mask=j < M, other=0.0)
    epsilon_bar = tl.sum(f_bar * f) + tl.sum(g_bar * g)
    f_bar *= epsilon
    g_bar *= epsilon
    scores_bar = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    a_bar = tl.zeros([BLOCK_N], tl.float32)
    b_bar = tl.zeros([BLOCK_M], tl.float32)
    for step in range(max_iter):
        t = max_iter - 1 - step
        f = tl.load(history + t * (N + M) + i, mask=i < N, other=0.0)
        if rho_b is not None:  # d log d = -1 / (rho + epsilon)
            epsilon_bar -= tl.sum(g_bar * g) / (rho_b + epsilon)
        without = pulled(scores + f[:, None], a, log_a, -damp_b * g_bar, 0)
        scores_bar += a[:, None] * without
        a_bar += tl.sum(without, 1)
        f_bar += a * tl.sum(without, 1)
        if rho_a is not None:
            epsilon_bar -= tl.sum(f_bar * f) / (rho_a + epsilon)
        g = tl.load(history + (t - 1) * (N + M) + N + j, mask=(j < M) & (t > 0), other=0.0)
        without = pulled(scores + g[None, :], b, log_b, -damp_a * f_bar, 1)
        scores_bar += b[None, :] * without
        b_bar += tl.sum(without, 0)
        g_bar = b * tl.sum(without, 0)
        f_bar = tl.zeros([BLOCK_N], tl.float32)
    epsilon_bar -= tl.sum(tl.where(scores == float("-inf"), 0.0, scores_bar * scores)) / epsilon
    at = rows[:, None] * M + j[None, :]
    tl.store(grad_cost_ptr + at, scores_bar / -epsilon, mask=(i < N)[:, None] & (j < M)[None, :])
    tl.store(grad_a_ptr + rows, a_bar, mask=i < N)
    tl.store(grad_b_ptr + columns, b_bar, mask=j < M)
    tl.store(grad_epsilon_ptr + problem, epsilon_bar)


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

    def small_constants(self):
        """One tile of the whole problem, with 16 pairs a thread."""
        blocks = [max(16, triton.next_power_of_2(size)) for size in self.sizes[:2]]
        return {"BLOCK_N": blocks[0], "BLOCK_M": blocks[1], "num_warps": max(1, blocks[0] * blocks[1] // 512)}

    def constants(self, most_rows=64):
        """As many rows a program as leave every multiprocessor two programs."""
        fits = (n for n in (64, 32) if n <= most_rows and self.batch * triton.cdiv(self.sizes[0], n) >= FULL_GRID)
        features = 32 if self.sizes[6] > 16 else 16
        return {
            "KIND": self.kind, "BLOCK_N": next(fits, 16), "BLOCK_M": 64, "BLOCK_D": features, "num_stages": 1
        }  # fmt: skip

    def row_programs(self, constants):
        return self.batch * triton.cdiv(self.sizes[0], constants["BLOCK_N"])


def check(op, tensor):
    if tensor.dtype != torch.float32:
        raise TypeError(f"tilewise.{op}: the Triton backend takes float32, got {tensor.dtype}")


def pairs_of_matrix(op, cost):
    check(op, cost)
    return Pairs(
        "matrix", len(cost), (cost, None, None, None), (*cost.shape[1:], cost.stride(0), 0, *cost.stride()[1:], 0)
    )


def pairs_of_points(op, x, y, cost):
    check(op, x)
    if cost not in ("sqeuclidean", "euclidean"):
        raise ValueError(f"tilewise.{op}: expected cost to be 'sqeuclidean' or 'euclidean', got {cost!r}")
    batch, n, D = x.shape
    m = y.shape[1]
    kind = "distances" if cost == "euclidean" else "squares"
    squares = None, None
    if kind == "squares" and D >= FEWEST_PRODUCTS and max(n, m) > SMALL:
        kind, squares = "products", [(p * p).sum(2) for p in (x, y)]
    return Pairs(kind, batch, (x, y, *squares), (n, m, n * D, m * D, D, D, D))


def all_stopped(n_iter, t):
    """Asks the device, where that is possible."""
    if n_iter.is_meta or (n_iter.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return bool((n_iter < t).all())


def solve_small(pairs, f, g, a, b, start, epsilon, error, n_iter, *, max_iter, tol, rho_a, rho_b, scaling, symmetric):
    sinkhorn_small_kernel[(pairs.batch,)](
        *pairs.tensors[:2], f, g, a, b, a.log(), b.log(), start, epsilon, error, n_iter, max_iter, scaling, tol,
        rho_a, rho_b, *pairs.sizes, SYMMETRIC=symmetric, KIND=pairs.kind, **pairs.small_constants(),
    )  # fmt: skip


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
    state = (start, epsilon, partials, tickets, error, n_iter)

    def update_rows(t, decay):
        f, new_f = buffers[t % 2], buffers[1 - t % 2]
        sinkhorn_half_step_kernel[(programs,)](
            *pairs.tensors, f, f if symmetric else g, new_f, log_b, a, mass, *state, t, max_iter, decay, tol, rho_a,
            *pairs.sizes, SYMMETRIC=symmetric, **shape,
        )  # fmt: skip

    def update_columns(t, decay):
        sinkhorn_half_step_kernel[(column_programs,)](
            *swapped.tensors, None, buffers[t % 2], g, log_a, None, None, *state, t, max_iter, decay, tol, rho_b,
            *swapped.sizes, SYMMETRIC=False, **column_shape,
        )  # fmt: skip

    decay = 1.0
    for t in range(max_iter):
        if t > 0 and t % CHECK_EVERY == 0 and all_stopped(n_iter, t):
            break
        decay = scaling**t
        update_rows(t, decay)
        if not symmetric:
            update_columns(t + 1, decay)
    else:
        update_rows(max_iter, decay)  # for the error alone
    torch.where((n_iter % 2 == 0)[:, None], *buffers, out=f)
    if symmetric:
        g.copy_(f)


def solve(
    pairs, swapped, a, b, epsilon, f, g, start, *, max_iter, tol, rho_a=None, rho_b=None, scaling=0.5, symmetric=False
):
    """(f, g, value, error, n_iter)"""
    f = torch.zeros_like(a) if f is None else f.clone()
    g = torch.zeros_like(b) if g is None else g.clone()
    error, n_iter = torch.empty_like(epsilon), torch.zeros_like(epsilon, dtype=torch.int64)
    options = {"max_iter": max_iter, "tol": tol, "rho_a": rho_a, "rho_b": rho_b, "scaling": scaling}
    arguments = (f, g, a, b, epsilon if start is None else start, epsilon, error, n_iter)
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


def sinkhorn_unrolled_backward(grad_f, grad_g, cost, a, b, epsilon, *, max_iter, rho_a=None, rho_b=None):
    """Gradients of cost, a, b and epsilon."""
    pairs = pairs_of_matrix("sinkhorn_unrolled_backward", cost)
    if not pairs.small:
        raise ValueError(
            f"tilewise.sinkhorn_unrolled_backward: expected cost to have at most {SMALL} rows and columns, "
            f"got shape {tuple(cost.shape)}"
        )
    gradients = [t.new_empty(t.shape) for t in (cost, a, b, epsilon)]
    history = a.new_empty(pairs.batch, max_iter, sum(cost.shape[1:]))
    if pairs.batch > 0:
        with torch.cuda.device_of(cost):
            sinkhorn_unrolled_backward_kernel[(pairs.batch,)](
                cost, a, b, a.log(), b.log(), epsilon, grad_f, grad_g, history, *gradients, max_iter, rho_a, rho_b,
                *pairs.sizes, **pairs.small_constants(),
            )  # fmt: skip
    return tuple(gradients)


OPS = {
    "sinkhorn": sinkhorn,
    "sinkhorn_points": sinkhorn_points,
    "sinkhorn_plan": sinkhorn_plan,
    "sinkhorn_apply": sinkhorn_apply,
    "sinkhorn_points_apply": sinkhorn_points_apply,
    "sinkhorn_unrolled": sinkhorn_unrolled,
    "sinkhorn_unrolled_backward": sinkhorn_unrolled_backward,
}
