"""Cross entropy of a linear layer's logits X W^T + b, which are never held.

The losses come from one fused kernel: a program owns some rows and a share of the classes, forms tiles of logits on the
tensor cores and merges them into the running (m, sum of exp(x - m) less m's own 1, W, sum of c (x - m)) of
cross_entropy; a second, tiny kernel merges the shares. Where the gradient is formed with the loss (reduced, not in
float16), a chunk of rows of logits is written after all, for it becomes the gradient G of two more products:

    grad_input = G W    grad_weight += G^T X    grad_bias += 1^T G

Other gradients are formed by blocks of classes in the backward, as the C++ kernels do.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from .cross_entropy import Saved, launch_backward, launch_forward, upstream_of
from .rows import (
    RowOutputs,
    Sizes,
    Statistics,
    Target,
    check_logits,
    effective_logit,
    finite_max,
    matrix_of,
    options_of,
    reduce_rows,
    soft_coefficients,
    split_state,
    store_rows,
    target_of,
)

MIN_BYTES, MAX_BYTES, SHARE, MIN_ROWS, MIN_CLASSES = 128 << 20, 512 << 20, 22, 64, 256
TILE_LINES = 256  # rows or columns of a product's tile
STATISTICS = 5  # m, sum of exp(x - m) less m's own 1, W, sum of c (x - m), the target's logit
FULL_GRID = 512  # programs that fill a large GPU


class Vector(NamedTuple):
    ptr: torch.Tensor | None
    stride: int


class ProductTile(NamedTuple):
    ROWS: int
    BLOCK: int
    DEPTH: int
    STAGES: int
    UPCAST: bool


@triton.jit(do_not_specialize=["N", "tiles_per_share"])
def linear_cross_entropy_forward_kernel(
    input, weight, bias, target, statistics_ptr, N, V, D, tiles_per_share, opts, tile: tl.constexpr
):
    """statistics[share, :, row] of the program's classes; logits are rounded to the type of the input, as the backward
    will see them."""
    SOFT: tl.constexpr = target.column is not None or opts.label_smoothing is not None
    ROWS: tl.constexpr = tile.ROWS
    BLOCK: tl.constexpr = tile.BLOCK
    DEPTH: tl.constexpr = tile.DEPTH
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < N
    depth = tl.arange(0, DEPTH)
    input_rows = input.ptr + rows * input.row
    target_rows = target.ptr + rows * target.row
    if target.column is None:
        y = tl.load(target_rows, mask=in_rows, other=-1)  # [ROWS]

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    soft_sum = tl.zeros([ROWS], tl.float32)
    soft_dot = tl.zeros([ROWS], tl.float32)
    x_y = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * tiles_per_share * BLOCK
    for start in range(first, tl.minimum(first + tiles_per_share * BLOCK, V), BLOCK):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = in_rows[:, None] & (cols < V)[None, :]  # [ROWS, BLOCK]
        weight_cols = weight.ptr + cols.to(tl.int64)[None, :] * weight.row
        product = tl.zeros([ROWS, BLOCK], tl.float32)
        for k in tl.range(0, D, DEPTH, num_stages=tile.STAGES):
            in_depth = k + depth < D
            a = tl.load(
                input_rows[:, None] + (k + depth)[None, :] * input.column,
                mask=in_rows[:, None] & in_depth[None, :],
                other=0.0,
            )  # [ROWS, DEPTH]
            b = tl.load(
                weight_cols + (k + depth)[:, None] * weight.column,
                mask=in_depth[:, None] & (cols < V)[None, :],
                other=0.0,
            )  # [DEPTH, BLOCK]
            if tile.UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            product = tl.dot(a, b, product, input_precision="ieee")
        if bias.ptr is not None:
            product += tl.load(bias.ptr + cols * bias.stride, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        raw = product.to(input.ptr.dtype.element_ty)
        x = tl.where(inside, effective_logit(raw, None, opts.softcap), float("-inf"))
        tile_max = tl.max(x, axis=1)
        new_max = tl.maximum(row_max, tile_max)
        shift = finite_max(new_max)  # [ROWS]
        d = x - shift[:, None]
        # One maximum stays out of the sum: the smaller of the row's and the tile's joins, and so do the tile's equals.
        joins = tl.where(x == tile_max[:, None], 0.0, tl.exp(d))
        equals = tl.sum(tl.where(x == tile_max[:, None], 1.0, 0.0), axis=1) - 1.0
        sum_exp = sum_exp * tl.exp(row_max - shift) + tl.exp(tl.minimum(row_max, tile_max) - shift)
        sum_exp += tl.sum(joins, axis=1) + equals * tl.exp(tile_max - shift)
        if SOFT:
            c = soft_coefficients(target, target_rows, cols, inside, V, V, opts.label_smoothing)
            soft_dot += soft_sum * (finite_max(row_max) - shift) + tl.sum(tl.where(c != 0, c * d, 0.0), axis=1)
            soft_sum += tl.sum(c, axis=1)
        if target.column is None:
            x_y += tl.sum(tl.where(cols[None, :] == y[:, None], x, 0.0), axis=1)
        row_max = new_max

    stride = tl.cast(N, tl.int64)
    out = statistics_ptr + tl.program_id(1) * 5 * stride + rows
    tl.store(out, row_max, mask=in_rows)
    tl.store(out + stride, sum_exp, mask=in_rows)
    tl.store(out + 2 * stride, soft_sum, mask=in_rows)
    tl.store(out + 3 * stride, soft_dot, mask=in_rows)
    tl.store(out + 4 * stride, x_y, mask=in_rows)


@triton.jit(do_not_specialize=["sizes", "shares"])
def linear_cross_entropy_merge_kernel(statistics_ptr, target, out, sizes, V, shares, opts, ROWS: tl.constexpr):
    """Merges the shares of each row, and ends as cross_entropy does."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < sizes.N
    stride = tl.cast(sizes.N, tl.int64)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    soft_sum = tl.zeros([ROWS], tl.float32)
    soft_dot = tl.zeros([ROWS], tl.float32)
    x_y = tl.zeros([ROWS], tl.float32)
    for share in range(0, shares):
        part = statistics_ptr + share * 5 * stride + rows
        part_max = tl.load(part, mask=in_rows, other=0.0)
        part_sum = tl.load(part + 2 * stride, mask=in_rows, other=0.0)
        new_max = tl.maximum(row_max, part_max)
        shift = finite_max(new_max)
        part_exp = tl.load(part + stride, mask=in_rows, other=0.0)
        sum_exp = sum_exp * tl.exp(row_max - shift) + part_exp * tl.exp(part_max - shift)
        sum_exp += tl.exp(tl.minimum(row_max, part_max) - shift)
        part_dot = tl.load(part + 3 * stride, mask=in_rows, other=0.0) + part_sum * (finite_max(part_max) - shift)
        soft_dot += soft_sum * (finite_max(row_max) - shift) + part_dot
        soft_sum += part_sum
        x_y += tl.load(part + 4 * stride, mask=in_rows, other=0.0)
        row_max = new_max
    statistics = Statistics(row_max, sum_exp, soft_sum, soft_dot, x_y)
    store_rows(statistics, target, out, rows, in_rows, sizes, V, opts)


def fused_forward(out, input, linear_weight, linear_bias, target, options):
    """Row losses and row state from tiles of logits that never leave the multiprocessor."""
    (N, D), V = input.shape, linear_weight.shape[0]
    if N == 0:
        return
    plain = target.column is None and options.label_smoothing is None and options.softcap is None
    interpreted = knobs.runtime.interpret  # whose 16-bit products are wrong
    if input.dtype == torch.float32:  # no tensor cores: full precision
        tile = ProductTile(32, 64, 16, 2, interpreted)
    elif plain:
        tile = ProductTile(128, 128, 64, 3, interpreted)
    else:
        tile = ProductTile(64, 64, 64, 3, interpreted)
    tile = tile._replace(ROWS=min(tile.ROWS, max(16, triton.next_power_of_2(N))))
    groups, tiles = triton.cdiv(N, tile.ROWS), triton.cdiv(V, tile.BLOCK)
    tiles_per_share = triton.cdiv(tiles, max(1, FULL_GRID // groups))
    shares = triton.cdiv(tiles, tiles_per_share)
    statistics = out.loss.new_empty((shares, STATISTICS, N))
    bias = Vector(linear_bias, 0 if linear_bias is None else linear_bias.stride(0))
    with torch.cuda.device_of(input):
        linear_cross_entropy_forward_kernel[(groups, shares)](
            matrix_of(input), matrix_of(linear_weight), bias, target, statistics, N, V, D, tiles_per_share, options,
            tile, num_warps=8,
        )  # fmt: skip
        linear_cross_entropy_merge_kernel[(triton.cdiv(N, 128),)](
            statistics, target, out, Sizes(N, out.state.stride(0)), V, shares, options, ROWS=128
        )


def lines_at_a_time(count: int, length: int, element_size: int, chunk_bytes: int, min_lines: int) -> int:
    """How many of `count` lines of `length` logits are formed at a time, in parts of about equal size: whole tiles,
    where nothing else is asked for."""
    line = max(1, length * element_size)
    held = chunk_bytes or min(max(count * line // SHARE, MIN_BYTES), MAX_BYTES)
    lines = min(max(held // line, min(min_lines, count)), count)
    most = MAX_BYTES // line // TILE_LINES * TILE_LINES
    if chunk_bytes or not most:
        return triton.cdiv(count, triton.cdiv(count, lines))
    parts = triton.cdiv(count, min(whole_tiles(lines), most))
    return min(whole_tiles(triton.cdiv(count, parts)), count)


def whole_tiles(lines: int) -> int:
    return triton.cdiv(lines, TILE_LINES) * TILE_LINES


def form_logits(out, input, linear_weight, linear_bias):
    """input @ linear_weight^T + linear_bias, written to `out`: one buffer serves every chunk."""
    if linear_bias is None:
        return torch.mm(input, linear_weight.t(), out=out)
    return torch.addmm(linear_bias, input, linear_weight.t(), out=out)


def add_product(out, a, b):
    """out += a @ b, whose rounding is that of its factors."""
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(a @ b)


def rows_of_target(target: Target, part: slice) -> Target:
    return target._replace(ptr=target.ptr[part])


def classes_of_target(target: Target, part: slice) -> Target:
    return target._replace(
        ptr=target.ptr if target.column is None else target.ptr[:, part],
        weight=None if target.weight is None else target.weight[part],
    )


def forward_with_gradients(out, input, linear_weight, linear_bias, target, options, needs_grad, chunk_bytes):
    """Losses, row state and the gradients of the summed loss, by chunks of rows."""
    N, V = len(input), len(linear_weight)
    rows = lines_at_a_time(max(N, 1), V, input.element_size(), chunk_bytes, 1 if chunk_bytes else MIN_ROWS)
    dx = torch.empty_like(input, memory_format=torch.contiguous_format) if needs_grad[0] else None
    sums = {"dtype": input.dtype if rows >= N else torch.float32, "device": input.device}
    dw = torch.zeros(linear_weight.shape, **sums) if needs_grad[1] else None
    db = torch.zeros(V, **sums) if needs_grad[2] else None
    one = torch.ones_like(out.loss[:1]).squeeze(0) if N else None
    buffer = input.new_empty(rows, V)
    for begin in range(0, N, rows):
        part = slice(begin, begin + rows)
        x, targets, state = input[part], rows_of_target(target, part), out.state[:, part]
        logits = form_logits(buffer[: len(x)], x, linear_weight, linear_bias)
        launch_forward(RowOutputs(out.loss[part], state), logits, targets, options)
        launch_backward(logits, upstream_of(one, None, None), logits, targets, Saved(None, state, None), options)
        if dx is not None:
            torch.mm(logits, linear_weight, out=dx[part])
        if dw is not None:
            add_product(dw, logits.t(), x)
        if db is not None:
            db += logits.sum(0, dtype=torch.float32)
    return dx, *(None if g is None else g.to(input.dtype) for g in (dw, db))


def linear_cross_entropy(
    input, linear_weight, target, linear_bias=None, weight=None, *, ignore_index=-100, label_smoothing=0.0,
    lse_square_scale=0.0, softcap=None, reduction="mean", chunk_bytes=0, form_input_grad=False, form_weight_grad=False,
    form_bias_grad=False
):  # fmt: skip
    """(loss, state, grad_input, grad_weight, grad_bias); gradients of the summed loss, or empty."""
    check_logits("linear_cross_entropy", input)
    row_loss = torch.empty(len(input), dtype=torch.float32, device=input.device)
    state = row_loss.new_empty(3 * len(input) + 1)
    row_state, total = split_state(state, 3)
    out = RowOutputs(row_loss, row_state)
    target = target_of(target, weight)
    arguments = (out, input, linear_weight, linear_bias, target)
    options = options_of(ignore_index, label_smoothing, lse_square_scale, softcap)
    needs_grad = (form_input_grad, form_weight_grad, form_bias_grad and linear_bias is not None)
    gradients = (None, None, None)
    if any(needs_grad) and reduction != "none" and input.dtype != torch.float16:
        gradients = forward_with_gradients(*arguments, options, needs_grad, chunk_bytes)
    else:
        fused_forward(*arguments, options)
    loss = reduce_rows(row_loss, total, target, V=len(linear_weight), ignore_index=ignore_index, reduction=reduction)
    return loss, state, *(input.new_empty(0) if g is None else g for g in gradients)


def linear_cross_entropy_backward(
    grad_loss, input, linear_weight, target, linear_bias, weight, state, *, reduction, chunk_bytes, input_grad,
    weight_grad, bias_grad, **options
):  # fmt: skip
    """(grad_input, grad_weight, grad_bias), empty where not needed, by blocks of classes of all rows."""
    check_logits("linear_cross_entropy_backward", input)
    N, V = len(input), len(linear_weight)
    bias_grad = bias_grad and linear_bias is not None
    dx = torch.zeros(input.shape, dtype=torch.float32, device=input.device) if input_grad else None
    dw = input.new_empty(linear_weight.shape) if weight_grad else None
    db = input.new_empty(V) if bias_grad else None
    upstream, target, options = upstream_of(grad_loss, None, None), target_of(target, weight), options_of(**options)
    row_state, total = split_state(state, 3)
    saved = Saved(None, row_state, total if reduction == "mean" else None)
    width = lines_at_a_time(V, N, input.element_size(), chunk_bytes, MIN_CLASSES)
    buffer = input.new_empty(N, width)
    for first in range(0, V, width):
        part = slice(first, first + width)
        w = linear_weight[part]
        block = form_logits(buffer[:, : len(w)], input, w, None if linear_bias is None else linear_bias[part])
        launch_backward(block, upstream, block, classes_of_target(target, part), saved, options, first, V)
        if dx is not None:
            dx += block @ w
        if dw is not None:
            torch.mm(block.t(), input, out=dw[part])
        if db is not None:
            torch.sum(block, 0, out=db[part])
    gradients = (None if dx is None else dx.to(input.dtype), dw, db)
    return tuple(input.new_empty(0) if g is None else g for g in gradients)


OPS = {"linear_cross_entropy": linear_cross_entropy, "linear_cross_entropy_backward": linear_cross_entropy_backward}
