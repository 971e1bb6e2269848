"""The row engine: what every operator that streams over the rows of a logit matrix (N, V) shares.

A program owns ROWS rows and walks along them in tiles of BLOCK columns: tiles are (ROWS, BLOCK), row values (ROWS,).
Everything is float32 from the load to the store. An option that is not wanted is None, so its code is never compiled.

Kernels take NamedTuples: of tensors with their strides (in elements), of sizes, and of constants.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Rows up to this long share a program with others; longer rows have one each.
SHORT_ROW = 1024
REDUCE_BLOCK = 4096
# Programs that fill a large GPU several times over: with more tiles than this a program takes several.
FULL_GRID = 8192


class Matrix(NamedTuple):
    ptr: torch.Tensor
    row: int
    column: int


class Target(NamedTuple):
    """Class indices, which have no columns, or probabilities; the weights of classes and of rows."""

    ptr: torch.Tensor
    row: int
    column: int | None
    weight: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float | None
    lse_square_scale: float
    softcap: float | None
    logit_scale: float | None


class Statistics(NamedTuple):
    """What one pass over a row finds: see store_rows."""

    row_max: tl.tensor
    sum_exp: tl.tensor
    weight_sum: tl.tensor
    weighted_dot: tl.tensor
    x_y: tl.tensor


class RowOutputs(NamedTuple):
    loss: torch.Tensor
    state: torch.Tensor
    lse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    argmax: torch.Tensor | None = None


class Sizes(NamedTuple):
    """What no kernel is compiled for: rows, the stride of the row state, the class of the first column."""

    N: int
    state_stride: int
    first_class: int = 0


class Tile(NamedTuple):
    ROWS: int
    BLOCK: int
    STAGES: int


class Groups(NamedTuple):
    """How many tiles of a row one backward program takes, and how many such programs share a row."""

    tiles: int
    programs: int


def matrix_of(tensor: torch.Tensor) -> Matrix:
    return Matrix(tensor, *tensor.stride())


def target_of(target: torch.Tensor, weight=None, row_weight=None) -> Target:
    column = target.stride(1) if target.is_floating_point() else None
    return Target(target, target.stride(0), column, weight, row_weight)


def options_of(ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale=1.0) -> Options:
    scale = None if logit_scale == 1.0 else logit_scale
    return Options(ignore_index, label_smoothing or None, lse_square_scale, softcap, scale)


def check_logits(op: str, logits: torch.Tensor, name: str = "logits") -> None:
    """Refuses the dtypes whose statistics float32 cannot hold."""
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"tilewise.{op}: the Triton backend takes float32, bfloat16 or float16 {name}, got {logits.dtype}"
        )


def check_float32(op: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"tilewise.{op}: the Triton backend takes float32, got {tensor.dtype}")


def tile_of(logits: torch.Tensor, elements_per_thread: int, max_warps: int) -> tuple[Tile, int]:
    """The tile and the warps for the rows of `logits`, in few buckets so that a new V rarely compiles a new kernel.

    `elements_per_thread` is 16 (two 16-byte loads of bfloat16) for kernels that keep few vectors in registers, else 8.
    """
    V = logits.shape[1]
    if V <= SHORT_ROW:
        block = max(16, triton.next_power_of_2(V))
        rows = min(16, 2048 // block)
    else:
        block = min(triton.next_power_of_2(V), 32 * max_warps * elements_per_thread)
        rows = 1
    # Asynchronous copies keep two tiles in flight while one is worked on. They pay where a row has several tiles and
    # 16-byte accesses; element by element they cost more registers than they hide latency.
    vectors = logits.stride(1) == 1 and logits.stride(0) % 16 == 0 and V % 16 == 0
    return Tile(rows, block, 3 if vectors and V > block else 1), max(1, rows * block // (32 * elements_per_thread))


def groups_of(N: int, V: int, tile: Tile) -> Groups:
    """Several tiles a program spread the cost of reading the row's state, once there are programs enough."""
    tiles = triton.cdiv(V, tile.BLOCK)
    tiles_per_program = min(tiles, 4) if N * tiles >= FULL_GRID else 1
    return Groups(tiles_per_program, triton.cdiv(tiles, tiles_per_program))


@triton.jit
def tanh(u):
    """tanh u: a series below 1/4, where (1 - e) / (1 + e) with e = exp(-2 |u|) would cancel."""
    e = tl.exp(-2.0 * tl.abs(u))
    large = (1.0 - e) / (1.0 + e)
    s = u * u
    small = u * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(u) < 0.25, small, tl.where(u < 0, -large, large))


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0, to rounding even for small u: Kahan's correction of the rounded 1 + u."""
    v = 1.0 + u
    return tl.where(v == 1.0, u, tl.log(v) * (u / (v - 1.0)))


@triton.jit
def expm1(d):
    """exp(d) - 1 for d in [-1/2, 1/2], by its series."""
    return d * (1 + d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7))))))


@triton.jit
def effective_logit(raw, logit_scale, softcap):
    """x = c tanh(s raw / c), without a softcap x = s raw."""
    x = raw.to(tl.float32)
    if logit_scale is not None:
        x = x * logit_scale
    if softcap is not None:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def effective_slope(raw, logit_scale, softcap):
    """dx / draw = s (1 - tanh^2), the bracket as 4 e / (1 + e)^2 with e = exp(-2 |s raw / c|): it never cancels."""
    slope = tl.full(raw.shape, 1.0, tl.float32)
    x = raw.to(tl.float32)
    if logit_scale is not None:
        x = x * logit_scale
        slope = slope * logit_scale
    if softcap is not None:
        e = tl.exp(-2.0 * tl.abs(x / softcap))
        slope = slope * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return slope


@triton.jit
def tile_pointers(row_ptrs, cols, stride_col):
    """Addresses of a tile; 64-bit columns, because a transposed matrix strides by N from column to column."""
    return row_ptrs[:, None] + cols.to(tl.int64)[None, :] * stride_col  # [ROWS, BLOCK]


@triton.jit
def class_target(target, rows, in_rows, ignore_index, V):
    """The class index of each row, whether the row is kept (not ignored), and whether its class exists."""
    y = tl.load(target.ptr + rows * target.row, mask=in_rows, other=0)  # [ROWS]
    kept = in_rows & (y != ignore_index)
    known = kept & (y >= 0) & (y < V)
    return y, kept, known


@triton.jit
def class_weight(weight, y, kept, known):
    """w_y of each row: 1 without weights, 0 for an ignored row.

    1 for a class that does not exist, too: were it 0, a batch of such rows alone would look empty and its mean be 0.
    """
    w = tl.where(kept, 1.0, 0.0)
    if weight is not None:
        w = tl.load(weight + y, mask=known, other=0.0) + tl.where(kept & ~known, 1.0, 0.0)
    return w  # [ROWS]


@triton.jit
def to_tf32(x):
    """To the nearest number of tf32: a product would cut off."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def finite_max(row_max):
    """0 for -inf: x - finite_max(m) is -inf, not NaN, in a row that has shown nothing but -inf so far."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def softmax_merge(row_max, sum_exp, x, tile_max):
    """Online softmax: takes in one tile.

    m' = max(m, tile max), s' = s exp(m - m') + exp(x - m'). The sum stays one per lane, so that a tile costs a single
    reduction across threads (its maximum). Returns m', s'; per lane exp(x - m'), x - m'; per row exp(m - m'), m - m'.
    """
    new_max = tl.maximum(row_max, tile_max)  # [ROWS]
    shift = finite_max(new_max)
    decay = tl.exp(row_max - shift)
    moved = finite_max(row_max) - shift
    d = x - shift[:, None]  # [ROWS, BLOCK]
    e = tl.exp(d)
    return new_max, sum_exp * decay[:, None] + e, e, d, decay, moved


@triton.jit
def hold_back_max(lane_max, lane_sum, x):
    """Online softmax in each lane, whose maximum m stays out of its sum s of exp(x - m): 1 would swallow small terms.

    One exponential does: with e = exp(min(m, x) - max(m, x)), s' = s + e, or s' = (s + 1) e where x is the new maximum.
    Returns m', s'; whether m rose, e, its exponent.
    """
    rises = x > lane_max  # [ROWS, BLOCK]
    new_max = tl.where(rises, x, lane_max)
    d = tl.where(rises, lane_max, x) - finite_max(new_max)
    e = tl.exp(d)
    return new_max, lane_sum * tl.where(rises, e, 1.0) + e, rises, e, d


@triton.jit
def softmax_rows(lane_max, lane_sum):
    """The lanes of a row together: its maximum, the sum of exp(x - m) over all x but one m; each lane's m - max."""
    row_max = tl.max(lane_max, axis=1)  # [ROWS]
    d = lane_max - finite_max(row_max)[:, None]  # [ROWS, BLOCK]
    e = tl.exp(d)
    lanes = tl.arange(0, lane_max.shape[1])[None, :]
    joining = tl.where(lanes == tl.argmax(lane_max, axis=1)[:, None], 0.0, e)
    return row_max, tl.sum(lane_sum * e + joining, axis=1), d


@triton.jit
def softmax_gradient(d, alpha, beta, c):
    """p (alpha + beta d) - c with p = exp(d): a row gradient. beta and c may be None.

    Of a confident row alpha and c cancel but for 1 - p, which is not left to the rounding of p.
    """
    p = tl.exp(d)
    if c is not None:
        alpha -= c
    if beta is not None:
        # exp(-104) is 0 in float32: the clamp makes p d = 0 at d = -inf.
        alpha += beta * tl.maximum(d, -104.0)
    gradient = p * alpha
    if c is not None:
        gradient += c * tl.where(d > -0.5, expm1(d), p - 1.0)
    return gradient


@triton.jit
def soft_coefficients(target, target_rows, cols, inside, V, classes, label_smoothing):
    """One tile of c_k without the class index's own share: w_k ((1 - eps) t_k + eps / classes), 0 outside."""
    c = tl.zeros(inside.shape, tl.float32)  # [ROWS, BLOCK]
    if target.column is not None:
        c += tl.load(tile_pointers(target_rows, cols, target.column), mask=inside, other=0.0).to(tl.float32)
    if label_smoothing is not None:
        if target.column is not None:
            c = c * (1.0 - label_smoothing)
        c = tl.where(inside, c + label_smoothing / classes, 0.0)
    if target.weight is not None:
        c = c * tl.load(target.weight + cols, mask=cols < V, other=0.0)[None, :]
    return c


@triton.jit
def store_rows(statistics, target, out, rows, in_rows, sizes, V, opts):
    """From the statistics of each row to its loss and row state; `sum_exp` lacks the maximum's own 1, `weight_sum` and
    `weighted_dot` the class index's share, x_y is its logit. Returns lse and log_sum."""
    row_max, sum_exp, weight_sum, weighted_dot, x_y = statistics
    # -inf for a row of -inf, NaN for one that holds inf or NaN
    log_sum = tl.where(row_max == float("-inf"), tl.log(sum_exp), log1p(sum_exp + (row_max - finite_max(row_max))))
    lse = row_max + log_sum
    if target.column is None:
        y, kept, known = class_target(target, rows, in_rows, opts.ignore_index, V)
        hard = class_weight(target.weight, y, kept, known)
        if opts.label_smoothing is not None:
            hard = hard * (1.0 - opts.label_smoothing)
        weight_sum += hard
        weighted_dot += tl.where(hard != 0, hard * (x_y - row_max), 0.0)
    loss = log_sum * weight_sum - weighted_dot + opts.lse_square_scale * lse * lse
    if target.row_weight is not None:
        loss = loss * tl.load(target.row_weight + rows, mask=in_rows, other=0.0)
    if target.column is None:
        loss = tl.where(kept, tl.where(known, loss, float("nan")), 0.0)
    stride = tl.cast(sizes.state_stride, tl.int64)
    tl.store(out.loss + rows, loss, mask=in_rows)
    tl.store(out.state + rows, row_max, mask=in_rows)
    tl.store(out.state + stride + rows, log_sum, mask=in_rows)
    tl.store(out.state + 2 * stride + rows, weight_sum, mask=in_rows)
    return lse, log_sum


@triton.jit
def welford_merge(mean, m2, x, inside, tile):
    """Welford's update of each lane with its element of the tile number `tile`; lanes past the row's end stay."""
    delta = tl.where(inside, x - mean, 0.0)  # [ROWS, BLOCK]
    mean += delta * (1.0 / (tile + 1.0))
    m2 += delta * (x - mean)
    return mean, m2


@triton.jit
def welford_rows(mean, m2, count, V):
    """Chan's merge of a row's lanes into its mean and sum of squared deviations.

    Means are taken relative to one of them, so that a constant row has exactly zero deviation.
    """
    origin = tl.max(tl.where(count > 0, mean, float("-inf")), axis=1)  # [ROWS]
    offset = tl.where(count > 0, mean - origin[:, None], 0.0)  # [ROWS, BLOCK]
    mean_offset = tl.sum(count * offset, axis=1) / V
    spread = offset - mean_offset[:, None]
    return origin + mean_offset, tl.sum(m2 + count * spread * spread, axis=1)


@triton.jit
def upstream_gradient(grad_ptr, stride, rows, in_rows, total_ptr):
    """The gradient that reaches each row's loss: of a mean divided by its total, 0 where that is 0."""
    g = tl.load(grad_ptr + rows * stride, mask=in_rows, other=0.0).to(tl.float32)  # [ROWS]
    if total_ptr is not None:
        total = tl.load(total_ptr)
        g = tl.where(total == 0, 0.0, g / total)
    return g


@triton.jit(do_not_specialize=["N", "V", "ignore_index"])
def reduce_rows_kernel(
    row_loss_ptr, target, loss_ptr, total_ptr, N, V, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """total = sum of w_y over kept rows (N of probabilities); loss = sum of row losses, over total for a mean.

    One program, a fixed order: the result is the same on every run.
    """
    total = tl.zeros([BLOCK], tl.float32)
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        in_rows = rows < N
        if target.ptr is None:
            total += tl.where(in_rows, 1.0, 0.0)
        else:
            y, kept, known = class_target(target, rows, in_rows, ignore_index, V)
            total += class_weight(target.weight, y, kept, known)
        if loss_ptr is not None:
            loss += tl.load(row_loss_ptr + rows, mask=in_rows, other=0.0)
    total_sum = tl.sum(total, axis=0)
    tl.store(total_ptr, total_sum)
    if loss_ptr is not None:
        loss_sum = tl.sum(loss, axis=0)
        if MEAN:
            loss_sum = tl.where(total_sum == 0, 0.0, loss_sum / total_sum)
        tl.store(loss_ptr, loss_sum)


def split_state(state: torch.Tensor, per_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what a backward reads of its forward: the numbers of the rows (per_row, N) and the total ()."""
    return state[:-1].view(per_row, -1), state[-1]


def reduce_rows(row_loss, total, target: Target, *, V: int, ignore_index: int, reduction: str) -> torch.Tensor:
    """The loss of row losses; writes the total, too."""
    N = row_loss.shape[0]
    loss = row_loss if reduction == "none" else row_loss.new_empty(())
    if N == 0:
        total.zero_()
        return loss.zero_()
    classes = target._replace(row_weight=None) if target.column is None else Target(None, 0, None)
    with torch.cuda.device_of(row_loss):
        reduce_rows_kernel[(1,)](
            row_loss, classes, None if reduction == "none" else loss, total, N, V, ignore_index,
            MEAN=reduction == "mean", BLOCK=REDUCE_BLOCK, num_warps=16,
        )  # fmt: skip
    return loss
