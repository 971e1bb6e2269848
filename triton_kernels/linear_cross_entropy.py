"""Cross entropy of a linear layer's logits X W^T + b, which are never held.

The losses come from one fused kernel: a program owns some rows and a share of the classes, forms tiles of logits on the
tensor cores and merges them into the running (m, sum of exp(x - m) less m's own 1, W, sum of c (x - m)) of
cross_entropy; a second, tiny kernel merges the shares. Where the gradient is formed with the loss (float32, reduced), a
chunk of rows of logits is written after all, for it becomes the gradient G of two more products:

    grad_input = G W    grad_weight += G^T X    grad_bias += 1^T G

Other gradients are formed by blocks of classes in the backward, as the C++ kernels do.
"""

import torch
import triton
import triton.language as tl
from triton import knobs

from .cross_entropy import launch_backward, launch_forward
from .rows import check_logits, effective_logit, finite_max, reduce_rows, soft_coefficients, store_rows

LEAST_BYTES, MOST_BYTES, SHARE, LEAST_ROWS, LEAST_CLASSES = 128 << 20, 512 << 20, 22, 64, 256
STATISTICS = 5  # m, sum of exp(x - m) less m's own 1, W, sum of c (x - m), the target's logit
FULL_GRID = 512  # programs that fill a large GPU


@triton.jit(do_not_specialize=["N", "ignore_index", "tiles_per_share"])
def linear_cross_entropy_forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    class_weight_ptr,
    statistics_ptr,
    N,
    V,
    D,
    input_stride_row,
    input_stride_col,
    weight_stride_row,
    weight_stride_col,
    bias_stride,
    target_stride_row,
    target_stride_col,
    tiles_per_share,
    label_smoothing,
    softcap,
    PROBABILITIES: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """statistics[share, :, row] of the program's classes; logits are rounded to the type of the input, as the backward
    will see them."""
    SOFT: tl.constexpr = PROBABILITIES or label_smoothing is not None
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < N
    depth = tl.arange(0, DEPTH)
    input_rows = input_ptr + rows * input_stride_row
    target_rows = target_ptr + rows * target_stride_row
    if not PROBABILITIES:
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
        weight_cols = weight_ptr + cols.to(tl.int64)[None, :] * weight_stride_row
        product = tl.zeros([ROWS, BLOCK], tl.float32)
        for k in tl.range(0, D, DEPTH, num_stages=STAGES):
            in_depth = k + depth < D
            a = tl.load(
                input_rows[:, None] + (k + depth)[None, :] * input_stride_col,
                mask=in_rows[:, None] & in_depth[None, :],
                other=0.0,
            )  # [ROWS, DEPTH]
            b = tl.load(
                weight_cols + (k + depth)[:, None] * weight_stride_col,
                mask=in_depth[:, None] & (cols < V)[None, :],
                other=0.0,
            )  # [DEPTH, BLOCK]
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            product = tl.dot(a, b, product, input_precision="ieee")
        if bias_ptr is not None:
            product += tl.load(bias_ptr + cols * bias_stride, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        raw = product.to(input_ptr.dtype.element_ty)
        x = tl.where(inside, effective_logit(raw, None, softcap), float("-inf"))
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
            c = soft_coefficients(
                target_rows, target_stride_col, class_weight_ptr, cols, inside, V, V, label_smoothing, PROBABILITIES
            )
            soft_dot += soft_sum * (finite_max(row_max) - shift) + tl.sum(tl.where(c != 0, c * d, 0.0), axis=1)
            soft_sum += tl.sum(c, axis=1)
        if not PROBABILITIES:
            x_y += tl.sum(tl.where(cols[None, :] == y[:, None], x, 0.0), axis=1)
        row_max = new_max

    stride = tl.cast(N, tl.int64)
    out = statistics_ptr + tl.program_id(1) * 5 * stride + rows
    tl.store(out, row_max, mask=in_rows)
    tl.store(out + stride, sum_exp, mask=in_rows)
    tl.store(out + 2 * stride, soft_sum, mask=in_rows)
    tl.store(out + 3 * stride, soft_dot, mask=in_rows)
    tl.store(out + 4 * stride, x_y, mask=in_rows)


@triton.jit(do_not_specialize=["N", "shares", "state_stride", "ignore_index"])
def linear_cross_entropy_merge_kernel(
    statistics_ptr,
    target_ptr,
    class_weight_ptr,
    loss_ptr,
    row_state_ptr,
    N,
    V,
    shares,
    target_stride_row,
    state_stride,
    ignore_index,
    label_smoothing,
    lse_square_scale,
    PROBABILITIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merges the shares of each row, and ends as cross_entropy does."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < N
    stride = tl.cast(N, tl.int64)
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
    store_rows(
        row_max, sum_exp, soft_sum, soft_dot, x_y, target_ptr, class_weight_ptr, None, loss_ptr, row_state_ptr, rows,
        in_rows, V, target_stride_row, state_stride, ignore_index, label_smoothing, lse_square_scale, PROBABILITIES
    )  # fmt: skip


def fused_forward(
    row_loss,
    row_state,
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    *,
    ignore_index,
    label_smoothing,
    lse_square_scale,
    softcap,
):
    """Row losses and row state from tiles of logits that never leave the multiprocessor."""
    (N, D), V = input.shape, linear_weight.shape[0]
    if N == 0:
        return
    probabilities = target.is_floating_point()
    plain = not probabilities and label_smoothing == 0 and softcap is None
    if input.dtype == torch.float32:  # no tensor cores: full precision
        tile = {"ROWS": 32, "BLOCK": 64, "DEPTH": 16, "STAGES": 2}
    else:
        tile = {"ROWS": 128 if plain else 64, "BLOCK": 128 if plain else 64, "DEPTH": 64, "STAGES": 3}
    tile["ROWS"] = min(tile["ROWS"], max(16, triton.next_power_of_2(N)))
    groups, tiles = triton.cdiv(N, tile["ROWS"]), triton.cdiv(V, tile["BLOCK"])
    tiles_per_share = triton.cdiv(tiles, max(1, FULL_GRID // groups))
    shares = triton.cdiv(tiles, tiles_per_share)
    statistics = row_loss.new_empty((shares, STATISTICS, N))
    target_strides = (target.stride(0), target.stride(1) if probabilities else 0)
    with torch.cuda.device_of(input):
        linear_cross_entropy_forward_kernel[(groups, shares)](
            input,
            linear_weight,
            linear_bias,
            target,
            weight,
            statistics,
            N,
            V,
            D,
            *input.stride(),
            *linear_weight.stride(),
            0 if linear_bias is None else linear_bias.stride(0),
            *target_strides,
            tiles_per_share,
            label_smoothing or None,
            softcap,
            PROBABILITIES=probabilities,
            UPCAST=knobs.runtime.interpret,  # the interpreter's 16-bit products are wrong
            num_warps=8,
            **tile,
        )
        linear_cross_entropy_merge_kernel[(triton.cdiv(N, 128),)](
            statistics,
            target,
            weight,
            row_loss,
            row_state,
            N,
            V,
            shares,
            target_strides[0],
            row_state.stride(0),
            ignore_index,
            label_smoothing or None,
            lse_square_scale,
            PROBABILITIES=probabilities,
            ROWS=128,
        )


def lines_at_a_time(count: int, length: int, element_size: int, chunk_bytes: int, least: int) -> int:
    """How many of `count` lines of `length` logits are formed at a time, in parts of about equal size."""
    line = max(1, length * element_size)
    held = chunk_bytes or min(max(count * line // SHARE, LEAST_BYTES), MOST_BYTES)
    most = min(max(held // line, min(least, count)), count)
    return triton.cdiv(count, triton.cdiv(count, most))


def form_logits(out, input, linear_weight, linear_bias):
    """input @ linear_weight^T + linear_bias, written to `out`: one buffer serves every chunk."""
    if linear_bias is None:
        return torch.mm(input, linear_weight.t(), out=out)
    return torch.addmm(linear_bias, input, linear_weight.t(), out=out)


def formed_gradients(row_loss, row_state, tensors, wanted, chunk_bytes, options):
    """Losses, row state and the gradients of the summed loss, by chunks of rows."""
    input, linear_weight, target, linear_bias, weight = tensors
    N, V = len(input), len(linear_weight)
    dx = torch.empty_like(input, memory_format=torch.contiguous_format) if wanted[0] else None
    dw = torch.zeros(linear_weight.shape, dtype=input.dtype, device=input.device) if wanted[1] else None
    db = input.new_zeros(V) if wanted[2] else None
    one = torch.ones_like(row_loss[:1]).squeeze(0) if N else None
    rows = lines_at_a_time(max(N, 1), V, input.element_size(), chunk_bytes, 1 if chunk_bytes else LEAST_ROWS)
    buffer = input.new_empty(rows, V)
    for begin in range(0, N, rows):
        part = slice(begin, begin + rows)
        x, state = input[part], row_state[:, part]
        logits = form_logits(buffer[: len(x)], x, linear_weight, linear_bias)
        launch_forward(row_loss[part], state, None, logits, target[part], weight, None, **options)
        saved = (logits, target[part], weight, None, None, state, one)
        launch_backward(logits, one, None, None, *saved, **options, reduction="sum")
        if dx is not None:
            torch.mm(logits, linear_weight, out=dx[part])
        if dw is not None:
            dw.addmm_(logits.t(), x)
        if db is not None:
            db += logits.sum(0)
    return dx, dw, db


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    linear_bias=None,
    weight=None,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale=0.0,
    softcap=None,
    reduction="mean",
    chunk_bytes=0,
    form_input_grad=False,
    form_weight_grad=False,
    form_bias_grad=False,
):
    """(loss, row_state, total, grad_input, grad_weight, grad_bias); gradients of the summed loss, or empty."""
    check_logits("linear_cross_entropy", input)
    tensors = (input, linear_weight, target, linear_bias, weight)
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
    }
    row_loss = torch.empty(len(input), dtype=torch.float32, device=input.device)
    row_state = row_loss.new_empty((3, len(input)))
    wanted = (form_input_grad, form_weight_grad, form_bias_grad and linear_bias is not None)
    gradients = (None, None, None)
    if any(wanted) and reduction != "none" and input.dtype == torch.float32:
        gradients = formed_gradients(row_loss, row_state, tensors, wanted, chunk_bytes, options | {"logit_scale": 1.0})
    else:
        fused_forward(row_loss, row_state, *tensors, **options)
    classes = None if target.is_floating_point() else target
    with torch.cuda.device_of(input):
        loss, total = reduce_rows(
            row_loss, classes, weight, V=len(linear_weight), ignore_index=ignore_index, reduction=reduction
        )
    return loss, row_state, total, *(input.new_empty(0) if g is None else g for g in gradients)


def linear_cross_entropy_backward(
    grad_loss,
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    row_state,
    total,
    *,
    chunk_bytes,
    input_grad,
    weight_grad,
    bias_grad,
    **options,
):
    """(grad_input, grad_weight, grad_bias), empty where not wanted, by blocks of classes of all rows."""
    check_logits("linear_cross_entropy_backward", input)
    N, V = len(input), len(linear_weight)
    bias_grad = bias_grad and linear_bias is not None
    dx = torch.zeros(input.shape, dtype=torch.float32, device=input.device) if input_grad else None
    dw = input.new_empty(linear_weight.shape) if weight_grad else None
    db = input.new_empty(V) if bias_grad else None
    width = lines_at_a_time(V, N, input.element_size(), chunk_bytes, LEAST_CLASSES)
    buffer = input.new_empty(N, width)
    for first in range(0, V, width):
        part = slice(first, first + width)
        w = linear_weight[part]
        block = form_logits(buffer[:, : len(w)], input, w, None if linear_bias is None else linear_bias[part])
        targets = target[:, part] if target.is_floating_point() else target
        weights = None if weight is None else weight[part]
        saved = (block, targets, weights, None, None, row_state, total)
        launch_backward(block, grad_loss, None, None, *saved, **options, logit_scale=1.0, first_class=first, classes=V)
        if dx is not None:
            dx += block @ w
        if dw is not None:
            torch.mm(block.t(), input, out=dw[part])
        if db is not None:
            torch.sum(block, 0, out=db[part])
    found = (None if dx is None else dx.to(input.dtype), dw, db)
    return tuple(input.new_empty(0) if g is None else g for g in found)


OPS = {"linear_cross_entropy": linear_cross_entropy, "linear_cross_entropy_backward": linear_cross_entropy_backward}
