"""Cross entropy over rows of logits, with its statistics, and its gradient.

With x the effective logits, m their row maximum, lse = m + log sum_k exp(x_k - m), coefficients c_k and W = sum_k c_k:

    loss = r [log_sum W - sum_k c_k (x_k - m) + lambda lse^2],   log_sum = lse - m,   r = row weight
    c_k  = (1 - eps) w_y 1[k = y] + (eps / V) w_k                for a class index y
    c_k  = w_k ((1 - eps) t_k + eps / V)                         for probabilities t
    H    = log_sum - sum_k p_k (x_k - m),                        the entropy; p_k = exp(d_k), d_k = (x_k - m) - log_sum

    dx_k = p_k (A - g_H d_k) - g c_k,   A = g (W + 2 lambda lse) + g_lse - g_H H,   g = upstream * r / total

The losses never form lse W - sum c x, which cancels for large logits. c_k = 0 adds 0 even where x_k = -inf.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .rows import (
    Options,
    RowOutputs,
    Sizes,
    Statistics,
    Target,
    Tile,
    check_logits,
    class_target,
    class_weight,
    effective_logit,
    effective_slope,
    finite_max,
    groups_of,
    hold_back_max,
    matrix_of,
    options_of,
    reduce_rows,
    soft_coefficients,
    softmax_gradient,
    softmax_rows,
    split_state,
    store_rows,
    target_of,
    tile_of,
    tile_pointers,
    upstream_gradient,
)

MOST_PARTS = 32  # of a row


class Upstream(NamedTuple):
    """The gradients that arrive, each None or of one value or one a row."""

    loss: torch.Tensor | None
    lse: torch.Tensor | None
    entropy: torch.Tensor | None
    loss_stride: int
    lse_stride: int
    entropy_stride: int


class Lanes(NamedTuple):
    """Statistics relative to a maximum: sum of exp(x - max) but for one maximum, sum of exp(x - max) (x - max), the
    place of the maximum, sum of c, sum of c (x - max)."""

    max: tl.tensor
    sum: tl.tensor
    exp_dot: tl.tensor
    place: tl.tensor
    soft_sum: tl.tensor
    soft_dot: tl.tensor


class Saved(NamedTuple):
    """What the forward left; the entropy is read where it has a gradient, the total where the loss is a mean."""

    entropy: torch.Tensor | None
    state: torch.Tensor
    total: torch.Tensor | None


def upstream_of(*gradients) -> Upstream:
    return Upstream(*gradients, *(0 if g is None or g.dim() == 0 else g.stride(0) for g in gradients))


class Parts(NamedTuple):
    """Few long rows are read by several programs each; the statistics (6, N, count) of their parts meet in memory."""

    count: int = 1
    memory: torch.Tensor | None = None


@triton.jit(do_not_specialize=["sizes", "parts"])
def cross_entropy_forward_kernel(logits, target, out, sizes, V, opts, parts, tile: tl.constexpr):
    """Row losses, row state (m, log_sum, W) and, where there is room for them, lse, entropy and argmax. One pass."""
    STATS: tl.constexpr = out.lse is not None
    SOFT: tl.constexpr = target.column is not None or opts.label_smoothing is not None
    ROWS: tl.constexpr = tile.ROWS
    BLOCK: tl.constexpr = tile.BLOCK

    unit, first, step = tl.program_id(0).to(tl.int64), 0, BLOCK
    if parts.memory is not None:  # parts take turns
        unit, first, step = unit // parts.count, (unit % parts.count).to(tl.int32) * BLOCK, parts.count * BLOCK
    rows = unit * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < sizes.N
    logits_rows = logits.ptr + rows * logits.row
    target_rows = target.ptr + rows * target.row

    # Of each lane: its maximum m, the sum of exp(x - m) without that maximum, and what else is wanted.
    lane_max = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    lane_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    exp_dot = tl.zeros([ROWS, BLOCK], tl.float32)  # sum of exp(x - m) (x - m)
    place = tl.zeros([ROWS, BLOCK], tl.int32)  # of the maximum
    soft_sum = tl.zeros([ROWS, BLOCK], tl.float32)  # sum of c
    soft_dot = tl.zeros([ROWS, BLOCK], tl.float32)  # sum of c (x - m)

    for start in tl.range(first, V, step, num_stages=tile.STAGES):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = in_rows[:, None] & (cols < V)[None, :]  # [ROWS, BLOCK]
        raw = tl.load(tile_pointers(logits_rows, cols, logits.column), mask=inside, other=0.0)
        x = tl.where(inside, effective_logit(raw, opts.logit_scale, opts.softcap), float("-inf"))
        last_max, last_sum = lane_max, lane_sum
        lane_max, lane_sum, rises, e, d = hold_back_max(last_max, last_sum, x)
        if STATS:
            d = tl.maximum(d, -104.0)  # exp(-104) is 0 in float32: e d = 0 at d = -inf
            exp_dot = tl.where(rises, e * (exp_dot + d * last_sum), exp_dot) + e * d
            place = tl.where(rises, cols[None, :], place)
        if SOFT:
            c = soft_coefficients(target, target_rows, cols, inside, V, V, opts.label_smoothing)
            shift = finite_max(lane_max)
            soft_dot += soft_sum * (finite_max(last_max) - shift) + tl.where(c != 0, c * (x - shift), 0.0)
            soft_sum += c

    lanes = Lanes(lane_max, lane_sum, exp_dot, place, soft_sum, soft_dot)
    if parts.memory is None:
        finish_rows(lanes, logits, target, out, rows, in_rows, sizes, V, opts)
    else:
        row_max, sum_exp, d, weight_sum, weighted_dot = merge_lanes(lanes)
        row_dot, argmax = merge_details(lanes, row_max, d, V)
        stride = sizes.N * parts.count
        at = parts.memory + rows * parts.count + tl.program_id(0) % parts.count
        tl.store(at, row_max, mask=in_rows)
        tl.store(at + stride, sum_exp, mask=in_rows)
        tl.store(at + 2 * stride, row_dot, mask=in_rows)
        tl.store(at + 3 * stride, argmax.to(tl.float32, bitcast=True), mask=in_rows)
        tl.store(at + 4 * stride, weight_sum, mask=in_rows)
        tl.store(at + 5 * stride, weighted_dot, mask=in_rows)


@triton.jit(do_not_specialize=["sizes", "parts"])
def merge_parts_kernel(logits, target, out, sizes, V, opts, parts, MOST: tl.constexpr):
    """The same from the statistics of a row's parts, a program a row."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # [1]
    in_rows = rows < sizes.N
    number = tl.arange(0, MOST)[None, :]
    at = parts.memory + rows[:, None] * parts.count + number  # [1, MOST]
    stride, there = sizes.N * parts.count, number < parts.count
    lanes = Lanes(
        tl.load(at, mask=there, other=float("-inf")),
        tl.load(at + stride, mask=there, other=0.0),
        tl.load(at + 2 * stride, mask=there, other=0.0),
        tl.load(at + 3 * stride, mask=there, other=0.0).to(tl.int32, bitcast=True),
        tl.load(at + 4 * stride, mask=there, other=0.0),
        tl.load(at + 5 * stride, mask=there, other=0.0),
    )
    finish_rows(lanes, logits, target, out, rows, in_rows, sizes, V, opts)


@triton.jit
def merge_lanes(lanes):
    """Of each row, from its lanes or its parts: m, the sum of exp(x - m) but for one m, each lane's m less the row's,
    the sums of c and of c (x - m)."""
    row_max, sum_exp, d = softmax_rows(lanes.max, lanes.sum)
    moved = finite_max(lanes.max) - finite_max(row_max)[:, None]
    weighted_dot = tl.sum(lanes.soft_dot + lanes.soft_sum * moved, axis=1)
    return row_max, sum_exp, d, tl.sum(lanes.soft_sum, axis=1), weighted_dot


@triton.jit
def merge_details(lanes, row_max, d, V):
    """Of each row the sum of exp(x - m) (x - m) and the first place of m."""
    d = tl.maximum(d, -104.0)
    row_dot = tl.sum(tl.exp(d) * (lanes.exp_dot + d * (lanes.sum + 1.0)), axis=1)
    return row_dot, tl.min(tl.where(lanes.max == row_max[:, None], lanes.place, V), axis=1)


@triton.jit
def finish_rows(lanes, logits, target, out, rows, in_rows, sizes, V, opts):
    """What is stored of each row."""
    row_max, sum_exp, d, weight_sum, weighted_dot = merge_lanes(lanes)
    x_y = tl.zeros(row_max.shape, tl.float32)
    if target.column is None:
        y, _, known = class_target(target, rows, in_rows, opts.ignore_index, V)
        raw_y = tl.load(logits.ptr + rows * logits.row + y * logits.column, mask=known, other=0.0)
        x_y += effective_logit(raw_y, opts.logit_scale, opts.softcap)
    statistics = Statistics(row_max, sum_exp, weight_sum, weighted_dot, x_y)
    lse, log_sum = store_rows(statistics, target, out, rows, in_rows, sizes, V, opts)
    if out.lse is not None:
        tl.store(out.lse + rows, lse, mask=in_rows)
        row_dot, argmax = merge_details(lanes, row_max, d, V)
        tl.store(out.entropy + rows, log_sum - row_dot / (1.0 + sum_exp), mask=in_rows)
        tl.store(out.argmax + rows, argmax.to(tl.int64), mask=in_rows)


@triton.jit(do_not_specialize=["sizes"])
def cross_entropy_backward_kernel(
    upstream, logits, target, saved, out, sizes, V, classes, opts, groups, tile: tl.constexpr
):
    """dL/draw_k = dx_k dx_k/draw_k for some tiles of the program's rows; `out` may be the logits.

    Rows without any gradient (ignored, weight 0) are written as zeros and their logits are not read. The V columns are
    classes from sizes.first_class on of all `classes`; weights and probabilities are those of these columns.
    """
    SOFT: tl.constexpr = target.column is not None or opts.label_smoothing is not None
    WARPED: tl.constexpr = opts.logit_scale is not None or opts.softcap is not None
    ROWS: tl.constexpr = tile.ROWS
    BLOCK: tl.constexpr = tile.BLOCK

    program = tl.program_id(0)
    rows = (program // groups.programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < sizes.N
    logits_rows = logits.ptr + rows * logits.row
    target_rows = target.ptr + rows * target.row
    out_rows = out.ptr + rows * out.row

    if target.column is None:
        y, kept, known = class_target(target, rows, in_rows, opts.ignore_index, classes)
        y -= sizes.first_class
        hard = class_weight(target.weight, y, kept, known & (y >= 0) & (y < V))
        if opts.label_smoothing is not None:
            hard = hard * (1.0 - opts.label_smoothing)
    g = tl.zeros([ROWS], tl.float32)
    if upstream.loss is not None:
        g = upstream_gradient(upstream.loss, upstream.loss_stride, rows, in_rows, saved.total)
        if target.row_weight is not None:
            g = g * tl.load(target.row_weight + rows, mask=in_rows, other=0.0)
        if target.column is None:
            g = tl.where(kept, tl.where(known, g, float("nan")), 0.0)

    row_max = tl.load(saved.state + rows, mask=in_rows, other=0.0)
    stride = tl.cast(sizes.state_stride, tl.int64)
    log_sum = tl.load(saved.state + stride + rows, mask=in_rows, other=0.0)
    weight_sum = tl.load(saved.state + 2 * stride + rows, mask=in_rows, other=0.0)
    alpha = tl.where(g != 0, g * (weight_sum + 2.0 * opts.lse_square_scale * (row_max + log_sum)), 0.0)  # A
    if upstream.lse is not None:
        alpha += tl.load(upstream.lse + rows * upstream.lse_stride, mask=in_rows, other=0.0)
    if upstream.entropy is None:
        beta = None
        active = (g != 0) | (alpha != 0)
    else:
        beta = -tl.load(upstream.entropy + rows * upstream.entropy_stride, mask=in_rows, other=0.0)
        entropy = tl.load(saved.entropy + rows, mask=in_rows, other=0.0)
        alpha += tl.where(beta != 0, beta * entropy, 0.0)
        active = (g != 0) | (alpha != 0) | (beta != 0)

    first = (program % groups.programs) * groups.tiles * BLOCK
    last = tl.minimum(first + groups.tiles * BLOCK, V)
    if not SOFT:
        # Only where it is among the program's own columns: others may have written over it.
        own = known & (y >= first) & (y < last)
        raw_y = tl.load(logits_rows + y * logits.column, mask=own, other=0.0)  # [ROWS]
        d_y = (effective_logit(raw_y, opts.logit_scale, opts.softcap) - row_max) - log_sum
        dx_y = softmax_gradient(d_y, alpha, beta, g * hard)[:, None]
    alpha = alpha[:, None]
    if beta is not None:
        beta = beta[:, None]
    for start in tl.range(first, last, BLOCK, num_stages=tile.STAGES):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = in_rows[:, None] & (cols < V)[None, :]  # [ROWS, BLOCK]
        read = active[:, None] & inside
        raw = tl.load(
            tile_pointers(logits_rows, cols, logits.column), mask=read, other=0.0, eviction_policy="evict_first"
        )
        d = (effective_logit(raw, opts.logit_scale, opts.softcap) - row_max[:, None]) - log_sum[:, None]
        if SOFT:
            c = g[:, None] * soft_coefficients(target, target_rows, cols, read, V, classes, opts.label_smoothing)
            if target.column is None:
                c += tl.where(cols[None, :] == y[:, None], (g * hard)[:, None], 0.0)
            dx = softmax_gradient(d, alpha, beta, c)
        else:
            dx = tl.where(cols[None, :] == y[:, None], dx_y, softmax_gradient(d, alpha, beta, None))
        if WARPED:
            dx = dx * effective_slope(raw, opts.logit_scale, opts.softcap)
        dx = tl.where(active[:, None], dx, 0.0)
        tl.store(tile_pointers(out_rows, cols, out.column), dx, mask=inside)


def launch_forward(out: RowOutputs, logits: torch.Tensor, target: Target, options: Options) -> None:
    """Writes the row losses, the row state (3, N) and, where there is room for them, the statistics."""
    N, V = logits.shape
    if N == 0:
        return
    soft = target.column is not None or options.label_smoothing is not None or out.lse is not None
    tile, warps = tile_of(logits, elements_per_thread=8 if soft else 16, max_warps=16)
    parts = parts_of(logits, tile)
    arguments = (matrix_of(logits), target, out, Sizes(N, out.state.stride(0)), V, options, parts)
    with torch.cuda.device_of(logits):
        cross_entropy_forward_kernel[(triton.cdiv(N, tile.ROWS) * parts.count,)](*arguments, tile, num_warps=warps)
        if parts.memory is not None:
            merge_parts_kernel[(N,)](*arguments, MOST=MOST_PARTS, num_warps=1)


def parts_of(logits: torch.Tensor, tile: Tile) -> Parts:
    """So many that the programs fill a large GPU, each with several tiles."""
    N, V = logits.shape
    count = min(MOST_PARTS, 528 // N, V // (2 * tile.BLOCK)) if tile.ROWS == 1 else 1
    if count < 2:
        return Parts()
    return Parts(count, torch.empty((6, N, count), dtype=torch.float32, device=logits.device))


def cross_entropy(logits, *arguments, inplace_backward=False, **options):
    """(loss, state); `inplace_backward` concerns the backward operator only."""
    return forward(logits, (), *arguments, **options)


def cross_entropy_with_stats(logits, *arguments, inplace_backward=False, **options):
    """(loss, state, lse, entropy, argmax)."""
    check_logits("cross_entropy", logits)
    lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    stats = lse, torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int64)
    return *forward(logits, stats, *arguments, **options), *stats


def forward(
    logits, stats, target, weight=None, row_weight=None, *, ignore_index=-100, label_smoothing=0.0,
    lse_square_scale=0.0, softcap=None, logit_scale=1.0, reduction="mean"
):  # fmt: skip
    check_logits("cross_entropy", logits)
    N, V = logits.shape
    row_loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    state = row_loss.new_empty(3 * N + 1)
    row_state, total = split_state(state, 3)
    target = target_of(target, weight, row_weight)
    options = options_of(ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale)
    launch_forward(RowOutputs(row_loss, row_state, *stats), logits, target, options)
    return reduce_rows(row_loss, total, target, V=V, ignore_index=ignore_index, reduction=reduction), state


def launch_backward(
    grad: torch.Tensor,
    upstream: Upstream,
    logits: torch.Tensor,
    target: Target,
    saved: Saved,
    options: Options,
    first_class: int = 0,
    classes: int | None = None,
) -> None:
    """Writes the gradient with respect to the raw logits into `grad`, which may be `logits` itself.

    `logits`, weights and probabilities may be those of a block of classes, from `first_class` on, of all `classes`.
    """
    check_logits("cross_entropy_backward", logits)
    N, V = logits.shape
    if N == 0:
        return
    soft = target.column is not None or options.label_smoothing is not None
    tile, warps = tile_of(logits, elements_per_thread=8 if soft else 16, max_warps=8)
    groups, sizes = groups_of(N, V, tile), Sizes(N, saved.state.stride(0), first_class)
    with torch.cuda.device_of(logits):
        cross_entropy_backward_kernel[(triton.cdiv(N, tile.ROWS) * groups.programs,)](
            upstream, matrix_of(logits), target, saved, matrix_of(grad), sizes, V, classes or V, options, groups, tile,
            num_warps=warps,
        )  # fmt: skip


def write_gradient(grad, gradients, logits, target, weight, row_weight, entropy, state, *, reduction, **options):
    row_state, total = split_state(state, 3)
    saved = Saved(entropy, row_state, total if reduction == "mean" else None)
    launch_backward(
        grad, upstream_of(*gradients), logits, target_of(target, weight, row_weight), saved, options_of(**options)
    )


def cross_entropy_backward(grad_loss, grad_lse, grad_entropy, logits, *saved, **options):
    """The gradient as a fresh contiguous tensor."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    write_gradient(grad, (grad_loss, grad_lse, grad_entropy), logits, *saved, **options)
    return grad


def cross_entropy_backward_(grad_loss, grad_lse, grad_entropy, logits, *saved, **options):
    """The gradient in the place of the logits."""
    write_gradient(logits, (grad_loss, grad_lse, grad_entropy), logits, *saved, **options)


OPS = {
    "cross_entropy": cross_entropy,
    "cross_entropy_with_stats": cross_entropy_with_stats,
    "cross_entropy_backward": cross_entropy_backward,
    "cross_entropy_backward_": cross_entropy_backward_,
}
