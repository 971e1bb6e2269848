"""Cross entropy over rows of logits, with its statistics, and its gradient.

With x the effective logits, m their row maximum, lse = m + log sum_k exp(x_k - m), coefficients c_k and W = sum_k c_k:

    loss = r [log_sum W - sum_k c_k (x_k - m) + lambda lse^2],   log_sum = lse - m,   r = row weight
    c_k  = (1 - eps) w_y 1[k = y] + (eps / V) w_k                for a class index y
    c_k  = w_k ((1 - eps) t_k + eps / V)                         for probabilities t
    H    = log_sum - sum_k p_k (x_k - m),                        the entropy; p_k = exp(d_k), d_k = (x_k - m) - log_sum

    dx_k = p_k (A - g_H d_k) - g c_k,   A = g (W + 2 lambda lse) + g_lse - g_H H,   g = upstream * r / total

The losses never form lse W - sum c x, which cancels for large logits. c_k = 0 adds 0 even where x_k = -inf.
"""

import torch
import triton
import triton.language as tl

from .rows import (
    check_logits,
    class_target,
    class_weight,
    effective_logit,
    effective_slope,
    finite_max,
    hold_back_max,
    reduce_rows,
    soft_coefficients,
    softmax_gradient,
    softmax_rows,
    store_rows,
    tile_groups,
    tile_pointers,
    tile_shape,
    upstream_gradient,
)

STRIDES = ("grad_loss_stride", "grad_lse_stride", "grad_entropy_stride", "state_stride")


@triton.jit(do_not_specialize=["N", "state_stride", "ignore_index"])
def cross_entropy_forward_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    row_weight_ptr,
    loss_ptr,
    row_state_ptr,
    lse_ptr,
    entropy_ptr,
    argmax_ptr,
    N,
    V,
    logits_stride_row,
    logits_stride_col,
    target_stride_row,
    target_stride_col,
    state_stride,
    ignore_index,
    label_smoothing,
    lse_square_scale,
    softcap,
    logit_scale,
    PROBABILITIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row losses, row state (m, log_sum, W) and, where lse_ptr is given, lse, entropy and argmax. One pass."""
    STATS: tl.constexpr = lse_ptr is not None
    SOFT: tl.constexpr = PROBABILITIES or label_smoothing is not None

    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < N
    logits_rows = logits_ptr + rows * logits_stride_row
    target_rows = target_ptr + rows * target_stride_row

    # Of each lane: its maximum m, the sum of exp(x - m) without that maximum, and what else is wanted.
    lane_max = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    lane_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if STATS:
        exp_dot = tl.zeros([ROWS, BLOCK], tl.float32)  # sum of exp(x - m) (x - m)
        place = tl.zeros([ROWS, BLOCK], tl.int32)  # of the maximum
    if SOFT:
        soft_sum = tl.zeros([ROWS, BLOCK], tl.float32)  # sum of c
        soft_dot = tl.zeros([ROWS, BLOCK], tl.float32)  # sum of c (x - m)

    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = in_rows[:, None] & (cols < V)[None, :]  # [ROWS, BLOCK]
        raw = tl.load(tile_pointers(logits_rows, cols, logits_stride_col), mask=inside, other=0.0)
        x = tl.where(inside, effective_logit(raw, logit_scale, softcap), float("-inf"))
        last_max, last_sum = lane_max, lane_sum
        lane_max, lane_sum, rises, e, d = hold_back_max(last_max, last_sum, x)
        if STATS:
            d = tl.maximum(d, -104.0)  # exp(-104) is 0 in float32: e d = 0 at d = -inf
            exp_dot = tl.where(rises, e * (exp_dot + d * last_sum), exp_dot) + e * d
            place = tl.where(rises, cols[None, :], place)
        if SOFT:
            c = soft_coefficients(
                target_rows, target_stride_col, weight_ptr, cols, inside, V, V, label_smoothing, PROBABILITIES
            )
            shift = finite_max(lane_max)
            soft_dot += soft_sum * (finite_max(last_max) - shift) + tl.where(c != 0, c * (x - shift), 0.0)
            soft_sum += c

    row_max, sum_exp, lane_shift = softmax_rows(lane_max, lane_sum)  # [ROWS]
    weight_sum = tl.zeros([ROWS], tl.float32)  # W
    weighted_dot = tl.zeros([ROWS], tl.float32)  # sum of c (x - m)
    if SOFT:
        weight_sum += tl.sum(soft_sum, axis=1)
        moved = finite_max(lane_max) - finite_max(row_max)[:, None]
        weighted_dot += tl.sum(soft_dot + soft_sum * moved, axis=1)
    x_y = tl.zeros([ROWS], tl.float32)
    if not PROBABILITIES:
        y, _, known = class_target(target_ptr, target_stride_row, rows, in_rows, ignore_index, V)
        raw_y = tl.load(logits_rows + y * logits_stride_col, mask=known, other=0.0)
        x_y += effective_logit(raw_y, logit_scale, softcap)
    lse, log_sum = store_rows(
        row_max, sum_exp, weight_sum, weighted_dot, x_y, target_ptr, weight_ptr, row_weight_ptr, loss_ptr,
        row_state_ptr, rows, in_rows, V, target_stride_row, state_stride, ignore_index, label_smoothing,
        lse_square_scale, PROBABILITIES
    )  # fmt: skip
    if STATS:
        tl.store(lse_ptr + rows, lse, mask=in_rows)
        d = tl.maximum(lane_shift, -104.0)
        spread = tl.sum(tl.exp(d) * (exp_dot + d * (lane_sum + 1.0)), axis=1)
        tl.store(entropy_ptr + rows, log_sum - spread / (1.0 + sum_exp), mask=in_rows)
        argmax = tl.min(tl.where(lane_max == row_max[:, None], place, V), axis=1)
        tl.store(argmax_ptr + rows, argmax.to(tl.int64), mask=in_rows)


@triton.jit(do_not_specialize=["N", "first_class", *STRIDES, "ignore_index"])
def cross_entropy_backward_kernel(
    grad_loss_ptr,
    grad_lse_ptr,
    grad_entropy_ptr,
    logits_ptr,
    target_ptr,
    weight_ptr,
    row_weight_ptr,
    entropy_ptr,
    row_state_ptr,
    total_ptr,
    grad_ptr,
    N,
    V,
    grad_loss_stride,
    grad_lse_stride,
    grad_entropy_stride,
    logits_stride_row,
    logits_stride_col,
    target_stride_row,
    target_stride_col,
    grad_stride_row,
    grad_stride_col,
    state_stride,
    first_class,
    classes,
    ignore_index,
    label_smoothing,
    lse_square_scale,
    softcap,
    logit_scale,
    tiles_per_program,
    programs_per_row,
    MEAN: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dL/draw_k = dx_k dx_k/draw_k for some tiles of the program's rows; grad_ptr may be logits_ptr.

    Rows without any gradient (ignored, weight 0) are written as zeros and their logits are not read. The V columns are
    classes [first_class, first_class + V) of all `classes`; weights and probabilities are those of these columns.
    """
    SOFT: tl.constexpr = PROBABILITIES or label_smoothing is not None
    WARPED: tl.constexpr = logit_scale is not None or softcap is not None

    program = tl.program_id(0)
    rows = (program // programs_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < N
    logits_rows = logits_ptr + rows * logits_stride_row
    target_rows = target_ptr + rows * target_stride_row
    grad_rows = grad_ptr + rows * grad_stride_row

    if not PROBABILITIES:
        y, kept, known = class_target(target_ptr, target_stride_row, rows, in_rows, ignore_index, classes)
        y -= first_class
        hard = class_weight(weight_ptr, y, kept, known & (y >= 0) & (y < V))
        if label_smoothing is not None:
            hard = hard * (1.0 - label_smoothing)
    g = tl.zeros([ROWS], tl.float32)
    if grad_loss_ptr is not None:
        g = upstream_gradient(grad_loss_ptr, grad_loss_stride, rows, in_rows, total_ptr, MEAN)
        if row_weight_ptr is not None:
            g = g * tl.load(row_weight_ptr + rows, mask=in_rows, other=0.0)
        if not PROBABILITIES:
            g = tl.where(kept, tl.where(known, g, float("nan")), 0.0)

    row_max = tl.load(row_state_ptr + rows, mask=in_rows, other=0.0)
    stride = tl.cast(state_stride, tl.int64)
    log_sum = tl.load(row_state_ptr + stride + rows, mask=in_rows, other=0.0)
    weight_sum = tl.load(row_state_ptr + 2 * stride + rows, mask=in_rows, other=0.0)
    alpha = tl.where(g != 0, g * (weight_sum + 2.0 * lse_square_scale * (row_max + log_sum)), 0.0)  # A
    if grad_lse_ptr is not None:
        alpha += tl.load(grad_lse_ptr + rows * grad_lse_stride, mask=in_rows, other=0.0)
    if grad_entropy_ptr is None:
        beta = None
        active = (g != 0) | (alpha != 0)
    else:
        beta = -tl.load(grad_entropy_ptr + rows * grad_entropy_stride, mask=in_rows, other=0.0)
        entropy = tl.load(entropy_ptr + rows, mask=in_rows, other=0.0)
        alpha += tl.where(beta != 0, beta * entropy, 0.0)
        active = (g != 0) | (alpha != 0) | (beta != 0)

    first = (program % programs_per_row) * tiles_per_program * BLOCK
    last = tl.minimum(first + tiles_per_program * BLOCK, V)
    if not SOFT:
        # Only where it is among the program's own columns: others may have written over it.
        own = known & (y >= first) & (y < last)
        raw_y = tl.load(logits_rows + y * logits_stride_col, mask=own, other=0.0)  # [ROWS]
        d_y = (effective_logit(raw_y, logit_scale, softcap) - row_max) - log_sum
        dx_y = softmax_gradient(d_y, alpha, beta, g * hard)[:, None]
    alpha = alpha[:, None]
    if beta is not None:
        beta = beta[:, None]
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = in_rows[:, None] & (cols < V)[None, :]  # [ROWS, BLOCK]
        read = active[:, None] & inside
        raw = tl.load(
            tile_pointers(logits_rows, cols, logits_stride_col), mask=read, other=0.0, eviction_policy="evict_first"
        )
        d = (effective_logit(raw, logit_scale, softcap) - row_max[:, None]) - log_sum[:, None]
        if SOFT:
            c = g[:, None] * soft_coefficients(
                target_rows, target_stride_col, weight_ptr, cols, read, V, classes, label_smoothing, PROBABILITIES
            )
            if not PROBABILITIES:
                c += tl.where(cols[None, :] == y[:, None], (g * hard)[:, None], 0.0)
            dx = softmax_gradient(d, alpha, beta, c)
        else:
            dx = tl.where(cols[None, :] == y[:, None], dx_y, softmax_gradient(d, alpha, beta, None))
        if WARPED:
            dx = dx * effective_slope(raw, logit_scale, softcap)
        dx = tl.where(active[:, None], dx, 0.0)
        tl.store(tile_pointers(grad_rows, cols, grad_stride_col), dx, mask=inside)


def launch_forward(
    row_loss,
    row_state,
    details,
    logits,
    target,
    weight,
    row_weight,
    *,
    ignore_index,
    label_smoothing,
    lse_square_scale,
    softcap,
    logit_scale,
):
    """Writes the row losses, the row state (3, N) and, where `details` is given, (lse, entropy, argmax)."""
    N, V = logits.shape
    if N == 0:
        return
    probabilities = target.is_floating_point()
    soft = probabilities or label_smoothing != 0 or details is not None
    shape = tile_shape(logits, elements_per_thread=8 if soft else 16, max_warps=16)
    with torch.cuda.device_of(logits):
        cross_entropy_forward_kernel[(triton.cdiv(N, shape["ROWS"]),)](
            logits,
            target,
            weight,
            row_weight,
            row_loss,
            row_state,
            *(details or (None, None, None)),
            N,
            V,
            *logits.stride(),
            target.stride(0),
            target.stride(1) if probabilities else 0,
            row_state.stride(0),
            ignore_index,
            label_smoothing or None,
            lse_square_scale,
            softcap,
            None if logit_scale == 1.0 else logit_scale,
            PROBABILITIES=probabilities,
            **shape,
        )


def cross_entropy(
    logits,
    target,
    weight=None,
    row_weight=None,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale=0.0,
    softcap=None,
    logit_scale=1.0,
    reduction="mean",
    return_stats=False,
    inplace_backward=False,
):
    """(loss, lse, entropy, argmax, row_state, total); `inplace_backward` concerns the backward operator only."""
    check_logits("cross_entropy", logits)
    N, V = logits.shape
    row_loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    row_state = row_loss.new_empty((3, N))
    lse = row_loss.new_empty(N if return_stats else 0)
    entropy = torch.empty_like(lse)
    argmax = torch.empty_like(lse, dtype=torch.int64)
    launch_forward(
        row_loss,
        row_state,
        (lse, entropy, argmax) if return_stats else None,
        logits,
        target,
        weight,
        row_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    classes = None if target.is_floating_point() else target
    with torch.cuda.device_of(logits):
        loss, total = reduce_rows(row_loss, classes, weight, V=V, ignore_index=ignore_index, reduction=reduction)
    return loss, lse, entropy, argmax, row_state, total


def launch_backward(
    grad,
    grad_loss,
    grad_lse,
    grad_entropy,
    logits,
    target,
    weight,
    row_weight,
    entropy,
    row_state,
    total,
    *,
    ignore_index,
    label_smoothing,
    lse_square_scale,
    softcap,
    logit_scale,
    reduction,
    first_class=0,
    classes=None,
):
    """Writes the gradient with respect to the raw logits into `grad`, which may be `logits` itself.

    `logits`, `weight` and probabilities may be those of a block of classes, from `first_class` on, of all `classes`.
    """
    check_logits("cross_entropy_backward", logits)
    N, V = logits.shape
    if N == 0:
        return
    probabilities = target.is_floating_point()
    shape = tile_shape(logits, elements_per_thread=8 if probabilities or label_smoothing != 0 else 16, max_warps=8)
    tiles_per_program, programs_per_row = tile_groups(N, V, shape)
    with torch.cuda.device_of(logits):
        cross_entropy_backward_kernel[(triton.cdiv(N, shape["ROWS"]) * programs_per_row,)](
            grad_loss,
            grad_lse,
            grad_entropy,
            logits,
            target,
            weight,
            row_weight,
            entropy,
            row_state,
            total,
            grad,
            N,
            V,
            *(0 if g is None or g.dim() == 0 else g.stride(0) for g in (grad_loss, grad_lse, grad_entropy)),
            *logits.stride(),
            target.stride(0),
            target.stride(1) if probabilities else 0,
            *grad.stride(),
            row_state.stride(0),
            first_class,
            classes or V,
            ignore_index,
            label_smoothing or None,
            lse_square_scale,
            softcap,
            None if logit_scale == 1.0 else logit_scale,
            tiles_per_program,
            programs_per_row,
            MEAN=reduction == "mean",
            PROBABILITIES=probabilities,
            **shape,
        )


def cross_entropy_backward(grad_loss, grad_lse, grad_entropy, logits, *saved, **options):
    """The gradient as a fresh contiguous tensor."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch_backward(grad, grad_loss, grad_lse, grad_entropy, logits, *saved, **options)
    return grad


def cross_entropy_backward_(grad_loss, grad_lse, grad_entropy, logits, *saved, **options):
    """The gradient in the place of the logits."""
    launch_backward(logits, grad_loss, grad_lse, grad_entropy, logits, *saved, **options)


OPS = {
    "cross_entropy": cross_entropy,
    "cross_entropy_backward": cross_entropy_backward,
    "cross_entropy_backward_": cross_entropy_backward_,
}
