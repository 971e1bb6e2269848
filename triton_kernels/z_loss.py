"""The spherical family: losses of one logit o_c and the row's mean mu and squared deviation M2 = sum_k (o_k - mu)^2.

    z_loss     L = softplus(a (b - z)) / a,  z = (o_c - mu) / sd,  sd^2 = M2 / D    (z = 0 where sd = 0)
    taylor     L = log Z - log n,  n = 1 + o_c + o_c^2 / 2,  Z = sum_k (1 + o_k + o_k^2 / 2)
    spherical  L = log Z - log n,  n = o_c^2 + eps,          Z = sum_k (o_k^2 + eps)

All have one gradient, dL/do_k = kappa + lambda (o_k - mu) + gamma 1[k = c]: the forward epilogues differ, the backward
does not. mu and M2 come from one streaming pass (Welford in each lane, Chan's merge of the lanes). D is the row length.
"""

import torch
import triton
import triton.language as tl

from .rows import (
    Matrix,
    RowOutputs,
    check_logits,
    class_target,
    groups_of,
    log1p,
    matrix_of,
    reduce_rows,
    split_state,
    target_of,
    tile_of,
    tile_pointers,
    upstream_gradient,
    welford_merge,
    welford_rows,
)

# Squares of larger logits overflow, though losses and gradients do not: moments are those of SCALE x, a power of two.
MOST = tl.constexpr(2.0**48)
SCALE = tl.constexpr(2.0**-96)


@triton.jit
def row_moments(
    logits_rows, stride_col, in_rows, V, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Mean and M2 of scale x."""
    lane_mean = tl.zeros([ROWS, BLOCK], tl.float32)
    lane_m2 = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = in_rows[:, None] & (cols < V)[None, :]  # [ROWS, BLOCK]
        x = tl.load(tile_pointers(logits_rows, cols, stride_col), mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            x *= scale[:, None]
        lane_mean, lane_m2 = welford_merge(lane_mean, lane_m2, x, inside, start // BLOCK)
    lanes = tl.arange(0, BLOCK)
    count = ((V - lanes + BLOCK - 1) // BLOCK).to(tl.float32)[None, :]  # [1, BLOCK], elements each lane has seen
    return welford_rows(lane_mean, lane_m2, count, V)  # [ROWS]


@triton.jit
def z_epilogue(o_c, mean, m2, scale, D, a, b):
    """Loss, gamma, root of lambda, kappa of z_loss; a constant row (m2 = 0) has z = 0 and no gradient."""
    inv_sd = tl.where(m2 == 0, 0.0, 1.0 / tl.sqrt(m2 / D))  # [ROWS]
    z = (o_c * scale - mean) * inv_sd
    t = a * (b - z)
    e = tl.exp(-tl.abs(t))
    loss = (tl.maximum(t, 0.0) + log1p(e)) / a
    s = tl.where(t >= 0, 1.0, e) / (1.0 + e)  # sigmoid(t)
    rate = scale * inv_sd
    root = tl.sqrt(s * tl.abs(z) / D) * rate
    return loss, -s * rate, tl.where(z < 0, -root, root), s / D * rate


@triton.jit
def square_epilogue(o, mean, m2, scale, D, c):
    """The same of -log n / Z, n = o^2 + c, Z = sum_k (o_k^2 + c), o the logits less an offset."""
    far = tl.where((scale == 1.0) & (tl.abs(mean) >= MOST), SCALE, 1.0)
    mean, m2, scale = mean * far, m2 * far * far, scale * far
    near = o * scale
    n = near * near + c * scale * scale  # [ROWS]
    Z = m2 + D * (mean * mean + c * scale * scale)
    # In these units n may vanish.
    apart = tl.log(Z) - 2.0 * tl.log(scale) - tl.log(o * o + c)
    loss = tl.where((scale == 1.0) | (n > SCALE), tl.log(Z) - tl.log(n), apart)
    norm = tl.sqrt(Z)
    rate = scale / norm  # 1 / sqrt(Z)
    return loss, -2.0 / (o + c / o), 1.41421356237309505 * rate, 2.0 * (mean / norm) * rate


@triton.jit
def taylor_epilogue(o_c, mean, m2, scale, D, a, b):
    """1 + o + o^2 / 2 is ((1 + o)^2 + 1) / 2."""
    return square_epilogue(1.0 + o_c, mean + scale, m2, scale, D, 1.0)


@triton.jit
def spherical_epilogue(o_c, mean, m2, scale, D, eps, b):
    return square_epilogue(o_c, mean, m2, scale, D, eps)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def spherical_family_forward_kernel(
    logits, target, out, N, V, ignore_index, a, b, EPILOGUE: tl.constexpr, tile: tl.constexpr
):
    """Row losses and row state (mu, gamma, r, kappa), lambda = r |r|. One pass, two for rows of large logits."""
    ROWS: tl.constexpr = tile.ROWS
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    in_rows = rows < N
    logits_rows = logits.ptr + rows * logits.row

    scale = tl.full([ROWS], 1.0, tl.float32)
    mean, m2 = row_moments(logits_rows, logits.column, in_rows, V, None, ROWS, tile.BLOCK, tile.STAGES)  # [ROWS]
    large = (m2 < MOST * MOST) == 0  # NaN, too
    if tl.max(large.to(tl.int32), axis=0) > 0:
        scale = tl.where(large, SCALE, 1.0)
        mean, m2 = row_moments(logits_rows, logits.column, in_rows, V, scale, ROWS, tile.BLOCK, tile.STAGES)

    y, kept, known = class_target(target, rows, in_rows, ignore_index, V)
    o_c = tl.load(logits_rows + y * logits.column, mask=known, other=0.0).to(tl.float32)
    loss, gamma, root, kappa = EPILOGUE(o_c, mean, m2, scale, V, a, b)
    loss = tl.where(kept, tl.where(known, loss, float("nan")), 0.0)
    tl.store(out.loss + rows, loss, mask=in_rows)
    state = out.state + rows
    stride = tl.cast(N, tl.int64)
    tl.store(state, mean / scale, mask=in_rows)
    tl.store(state + stride, gamma, mask=in_rows)
    tl.store(state + 2 * stride, root, mask=in_rows)
    tl.store(state + 3 * stride, kappa, mask=in_rows)


@triton.jit(do_not_specialize=["N", "grad_loss_stride", "ignore_index"])
def spherical_family_backward_kernel(
    grad_loss_ptr, grad_loss_stride, logits, target, state_ptr, total_ptr, out, N, V, ignore_index, groups,
    tile: tl.constexpr
):  # fmt: skip
    """g (kappa + lambda (o_k - mu) + gamma 1[k = c]) for some tiles of the program's rows.

    Rows with g = 0 are written as zeros and their logits are not read.
    """
    program = tl.program_id(0)
    rows = (program // groups.programs).to(tl.int64) * tile.ROWS + tl.arange(0, tile.ROWS)  # [ROWS]
    in_rows = rows < N
    logits_rows = logits.ptr + rows * logits.row
    out_rows = out.ptr + rows * out.row

    y, kept, known = class_target(target, rows, in_rows, ignore_index, V)
    g = upstream_gradient(grad_loss_ptr, grad_loss_stride, rows, in_rows, total_ptr)
    g = tl.where(kept, tl.where(known, g, float("nan")), 0.0)
    active = g != 0
    state = state_ptr + rows
    stride = tl.cast(N, tl.int64)
    mean = tl.load(state, mask=active, other=0.0)
    gamma = g * tl.load(state + stride, mask=active, other=0.0)
    root = tl.load(state + 2 * stride, mask=active, other=0.0)
    lambda_, rate = (g * root)[:, None], tl.abs(root)[:, None]
    kappa = g * tl.load(state + 3 * stride, mask=active, other=0.0)

    BLOCK: tl.constexpr = tile.BLOCK
    first = (program % groups.programs) * groups.tiles * BLOCK
    last = tl.minimum(first + groups.tiles * BLOCK, V)
    for start in tl.range(first, last, BLOCK, num_stages=tile.STAGES):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = in_rows[:, None] & (cols < V)[None, :]  # [ROWS, BLOCK]
        x = tl.load(
            tile_pointers(logits_rows, cols, logits.column),
            mask=active[:, None] & inside,
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        dx = kappa[:, None] + lambda_ * (rate * (x - mean[:, None]))
        dx += tl.where(cols[None, :] == y[:, None], gamma[:, None], 0.0)
        tl.store(tile_pointers(out_rows, cols, out.column), tl.where(active[:, None], dx, 0.0), mask=inside)


def launch_forward(op, epilogue, logits, target, a, b, ignore_index, reduction):
    """(loss, state) of the member of the family that `epilogue` is, with its constants a and b."""
    check_logits(op, logits)
    N, V = logits.shape
    row_loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    state = row_loss.new_empty(4 * N + 1)
    row_state, total = split_state(state, 4)
    target = target_of(target)
    if N > 0:
        tile, warps = tile_of(logits, elements_per_thread=8, max_warps=16)
        with torch.cuda.device_of(logits):
            spherical_family_forward_kernel[(triton.cdiv(N, tile.ROWS),)](
                matrix_of(logits), target, RowOutputs(row_loss, row_state), N, V, ignore_index, a, b,
                EPILOGUE=epilogue, tile=tile, num_warps=warps,
            )  # fmt: skip
    return reduce_rows(row_loss, total, target, V=V, ignore_index=ignore_index, reduction=reduction), state


def z_loss(logits, target, *, a, b, ignore_index=-100, reduction="mean"):
    """(loss, state) of softplus(a (b - z)) / a."""
    return launch_forward("z_loss", z_epilogue, logits, target, a, b, ignore_index, reduction)


def taylor_softmax_loss(logits, target, *, ignore_index=-100, reduction="mean"):
    """(loss, state) of -log of the second-order Taylor softmax."""
    return launch_forward("taylor_softmax_loss", taylor_epilogue, logits, target, None, None, ignore_index, reduction)


def spherical_softmax_loss(logits, target, *, eps=1e-6, ignore_index=-100, reduction="mean"):
    """(loss, state) of -log of the spherical softmax."""
    return launch_forward(
        "spherical_softmax_loss", spherical_epilogue, logits, target, eps, None, ignore_index, reduction
    )


def spherical_family_backward(grad_loss, logits, target, state, *, ignore_index, reduction):
    """The gradient of any member of the family as a fresh contiguous tensor."""
    check_logits("spherical_family_backward", logits)
    N, V = logits.shape
    grad = torch.empty((N, V), dtype=logits.dtype, device=logits.device)
    if N == 0:
        return grad
    row_state, total = split_state(state, 4)
    tile, warps = tile_of(logits, elements_per_thread=16, max_warps=8)
    groups = groups_of(N, V, tile)
    with torch.cuda.device_of(logits):
        spherical_family_backward_kernel[(triton.cdiv(N, tile.ROWS) * groups.programs,)](
            grad_loss, 0 if grad_loss.dim() == 0 else grad_loss.stride(0), matrix_of(logits), target_of(target),
            row_state, total if reduction == "mean" else None, Matrix(grad, V, 1), N, V, ignore_index, groups, tile,
            num_warps=warps,
        )  # fmt: skip
    return grad


OPS = {
    "z_loss": z_loss,
    "taylor_softmax_loss": taylor_softmax_loss,
    "spherical_softmax_loss": spherical_softmax_loss,
    "spherical_family_backward": spherical_family_backward,
}
