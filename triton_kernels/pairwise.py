"""Pairwise losses, a chunk of rows of the similarities S = X Y^T at a time (csrc/pairwise/losses.h has the formulas).

A product forms the chunk in float32; one program per row walks it in tiles of BLOCK columns: once for extremes and
counts, once for sums, and where gradients are wanted once more to write G = dL/dz, which enters two products:

    grad_x = G Y    grad_y += G^T X    grad_bias = G 1
"""

import torch
import triton
import triton.language as tl

from .pairwise_losses import LOSSES, kept_pairs, log_one_plus, sigmoid, softplus, terms, weights
from .rows import check_logits

CHUNK_BYTES, LEAST_ROWS, MOST_BLOCK = 64 << 20, 96, 1024


@triton.jit
def load_pairs(s_row, y_labels_ptr, guide_row, cols, M, label, self_col, guide_most, scale, bias):
    """z of a tile, and which of its pairs are positive and which negative."""
    inside = cols < M
    z = tl.load(s_row + cols, mask=inside, other=0.0) * scale + bias  # [BLOCK]
    related = inside & (cols != self_col)
    same = tl.load(y_labels_ptr + cols, mask=inside, other=0) == label
    negative = related & (same == 0)
    if guide_row is not None:
        negative = negative & (tl.load(guide_row + cols, mask=inside, other=0.0) <= guide_most)
    return z, related & same, negative


@triton.jit(do_not_specialize=["self_offset", "grad_stride", "p0", "p1", "p2", "epsilon", "guide_margin", "divisor"])
def pairwise_kernel(
    s_ptr,
    gradient_ptr,
    x_labels_ptr,
    y_labels_ptr,
    guide_ptr,
    scale_ptr,
    bias_ptr,
    upstream_ptr,
    total_ptr,
    loss_ptr,
    active_ptr,
    bias_rows_ptr,
    M,
    self_offset,
    upstream_stride,
    guide_margin,
    p0,
    p1,
    p2,
    epsilon,
    divisor,
    LOSS: tl.constexpr,
    EXCLUDES_SELF: tl.constexpr,
    MINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * M
    label = tl.load(x_labels_ptr + row)
    self_col = row * 0 - 1
    if EXCLUDES_SELF:
        self_col = row + self_offset
    scale = tl.load(scale_ptr)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr)
    tile = tl.arange(0, BLOCK)
    guide_row = guide_ptr
    guide_most = 0.0
    if guide_ptr is not None:
        guide_row = guide_ptr + row * M
        first = M
        for start in range(0, M, BLOCK):
            cols = start + tile
            _, positive, _ = load_pairs(s_row, y_labels_ptr, None, cols, M, label, self_col, 0.0, scale, bias)
            first = tl.minimum(first, tl.min(tl.where(positive, cols, M)))
        guide_most = tl.load(guide_row + first, mask=first < M, other=float("inf")) - guide_margin

    least = float("inf")
    most = float("-inf")
    top = float("-inf")
    n_positive = 0.0
    n_negative = 0.0
    for start in range(0, M, BLOCK):
        cols = start + tile
        z, positive, negative = load_pairs(
            s_row, y_labels_ptr, guide_row, cols, M, label, self_col, guide_most, scale, bias
        )
        least = tl.minimum(least, tl.min(tl.where(positive, z, float("inf"))))
        most = tl.maximum(most, tl.max(tl.where(negative, z, float("-inf"))))
        of_top = z
        if LOSS == "window_log_sum_exp":
            positive, negative = kept_pairs(z, positive, negative, least, most, epsilon, p1, p2, LOSS, MINES)
            of_top = p0 * z
        top = tl.maximum(top, tl.max(tl.where(positive | negative, of_top, float("-inf"))))
        n_positive += tl.sum(positive.to(tl.float32))
        n_negative += tl.sum(negative.to(tl.float32))

    some_positive = n_positive > 0
    some_negative = n_negative > 0
    of_positive = 0.0
    of_negative = 0.0
    kept_positive = 0.0
    kept_negative = 0.0
    below_top = 0.0
    first_positive = M
    first_negative = M
    for start in range(0, M, BLOCK):
        cols = start + tile
        z, positive, negative = load_pairs(
            s_row, y_labels_ptr, guide_row, cols, M, label, self_col, guide_most, scale, bias
        )
        if LOSS == "triplet" or LOSS == "least_positive" or LOSS == "most_negative":
            first_positive = tl.minimum(first_positive, tl.min(tl.where(positive & (z == least), cols, M)))
            first_negative = tl.minimum(first_negative, tl.min(tl.where(negative & (z == most), cols, M)))
        else:
            positive, negative = kept_pairs(z, positive, negative, least, most, epsilon, p1, p2, LOSS, MINES)
            a, b = terms(z, positive, negative, least, most, top, p0, p1, p2, LOSS)
            of_positive += tl.sum(a)
            of_negative += tl.sum(b)
            if LOSS == "softmax":
                below_top += tl.sum(tl.where(positive, top - z, 0.0))
            kept_positive += tl.sum(positive.to(tl.float32))
            kept_negative += tl.sum(negative.to(tl.float32))
    # A row without a kind of pair divides by one of it.
    n_positive = tl.maximum(n_positive, 1.0)
    n_negative = tl.maximum(n_negative, 1.0)

    active = some_positive & some_negative
    if LOSS == "softmax":
        active = some_positive
        loss = log_one_plus(0.0, (of_positive - 1.0) + of_negative) + below_top / n_positive
    elif LOSS == "decoupled_softmax":
        active = some_positive
        log_sum = tl.log(of_negative)
        pull = 0.0
        of_positive = 0.0
        for start in range(0, M, BLOCK):
            cols = start + tile
            z, positive, negative = load_pairs(
                s_row, y_labels_ptr, guide_row, cols, M, label, self_col, guide_most, scale, bias
            )
            gap = (most - z) + log_sum
            pull += tl.sum(tl.where(positive, softplus(gap), 0.0))
            of_positive += tl.sum(tl.where(positive, sigmoid(gap), 0.0))
        of_negative = log_sum
        loss = pull / n_positive
    elif LOSS == "sigmoid":
        active = n_positive > 0  # 1 at least by now: every row
        loss = of_positive + of_negative
    elif LOSS == "log_sum_exp":
        active = n_positive > 0
        loss = top + tl.log(of_positive + of_negative)
    elif LOSS == "positive_sum":
        active = n_positive > 0
        loss = of_positive
    elif LOSS == "least_positive":
        active = n_positive > 0
        loss = least
    elif LOSS == "most_negative":
        active = n_positive > 0
        loss = most
    elif LOSS == "window_log_sum_exp":
        active = n_positive > 0
        loss = top + tl.log(of_positive + of_negative)
    elif LOSS == "multi_similarity":
        pull_shift = tl.maximum(-p0 * (least - p2), 0.0)
        push_shift = tl.maximum(p1 * (most - p2), 0.0)
        loss = log_one_plus(pull_shift, of_positive) / p0 + log_one_plus(push_shift, of_negative) / p1
        active = (kept_positive > 0) | (kept_negative > 0)
        if MINES:
            active = some_positive & some_negative & (kept_positive > 0) & (kept_negative > 0)
    elif LOSS == "lifted_structure":
        loss = (p0 - least + tl.log(of_positive)) + (most - p1 + tl.log(of_negative))
        loss = tl.where(loss < 0, 0.0, loss)
    elif LOSS == "triplet":
        loss = most - least + p0
        loss = tl.where(loss < 0, 0.0, loss)
    else:
        active = some_positive | some_negative
        loss = of_positive / n_positive + of_negative / n_negative
    tl.store(loss_ptr + row, tl.where(active, loss, 0.0))
    tl.store(active_ptr + row, active.to(tl.float32))

    if gradient_ptr is not None:
        upstream = 1.0 / divisor
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + row * upstream_stride) / divisor
        if total_ptr is not None:
            upstream = upstream / tl.maximum(tl.load(total_ptr), 1.0)
        sums = 0.0
        for start in range(0, M, BLOCK):
            cols = start + tile
            z, positive, negative = load_pairs(
                s_row, y_labels_ptr, guide_row, cols, M, label, self_col, guide_most, scale, bias
            )
            positive, negative = kept_pairs(z, positive, negative, least, most, epsilon, p1, p2, LOSS, MINES)
            w = weights(
                z, cols, positive, negative, least, most, top, n_positive, n_negative, of_positive, of_negative, loss,
                first_positive, first_negative, p0, p1, p2, LOSS
            )  # fmt: skip
            g = tl.where(active, upstream * w, 0.0)
            sums += tl.sum(g)
            tl.store(gradient_ptr + row * M + cols, g.to(gradient_ptr.dtype.element_ty), mask=cols < M)
        tl.store(bias_rows_ptr + row, sums)


def form_similarities(out, x, y):
    """x @ y^T in float32, written to `out`: one buffer serves every chunk."""
    if x.dtype == torch.float32:
        return torch.mm(x, y.t(), out=out)
    if x.is_cuda:
        return torch.ops.aten.mm.dtype_out(x, y.t(), torch.float32, out=out)
    return torch.mm(x.float(), y.t().float(), out=out)


def add_product(total, a, b):
    """total += a @ b, kept in float32."""
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    if a.is_cuda:
        return total.add_(torch.mm(a, b, out_dtype=torch.float32))
    return total.addmm_(a.float(), b.float())


def run_chunks(
    upstream, total, x, y, x_labels, y_labels, scale, bias, guide_x, guide_y, wanted, divisor, *, loss, parameters,
    self_offset, guide_margin, chunk_bytes
):  # fmt: skip
    """Row losses, active rows and the gradients (None where not wanted) with the upstream of each row."""
    check_logits("pairwise_loss", x)
    if loss not in LOSSES:
        raise ValueError(f"tilewise.pairwise_loss: expected loss to be one of {', '.join(LOSSES)}, got {loss!r}")
    N, M = len(x), len(y)
    loss_rows, active, bias_rows = torch.empty((3, N), dtype=torch.float32, device=x.device)
    dx = x.new_empty(x.shape) if wanted[0] else None
    dy = torch.zeros(y.shape, dtype=torch.float32, device=y.device) if wanted[1] else None
    held = chunk_bytes or CHUNK_BYTES
    rows = min(max(1, N), max(held // max(1, 4 * M), 1 if chunk_bytes else LEAST_ROWS))
    buffer = torch.empty((rows, M), dtype=torch.float32, device=x.device)
    guides = None if guide_x is None else torch.empty_like(buffer)
    narrow = buffer if x.dtype == torch.float32 or not any(wanted) else torch.empty_like(buffer, dtype=x.dtype)
    p0, p1, p2, epsilon = (*map(float, parameters), *(0.0,) * (4 - len(parameters)))
    mines = epsilon < float("inf")
    for begin in range(0, N, rows):
        part = slice(begin, begin + rows)
        n = len(x[part])
        similarities = form_similarities(buffer[:n], x[part], y)
        if guides is not None:
            form_similarities(guides[:n], guide_x[part], guide_y)
        with torch.cuda.device_of(x):
            pairwise_kernel[(n,)](
                similarities,
                narrow if any(wanted) else None,
                x_labels[part],
                y_labels,
                guides,
                scale,
                bias,
                upstream if upstream is None or upstream.dim() == 0 else upstream[part],
                total,
                loss_rows[part],
                active[part],
                bias_rows[part],
                M,
                0 if self_offset is None else min(max(self_offset, -N), M) + begin,
                0 if upstream is None or upstream.dim() == 0 else upstream.stride(0),
                guide_margin,
                p0,
                p1,
                p2,
                epsilon if mines else 0.0,
                divisor,
                LOSS=loss,
                EXCLUDES_SELF=self_offset is not None,
                MINES=mines,
                BLOCK=min(MOST_BLOCK, max(16, triton.next_power_of_2(M))),
                num_warps=8 if M > 512 else 1,
            )
        if dx is not None:
            torch.mm(narrow[:n], y, out=dx[part])
        if dy is not None:
            add_product(dy, narrow[:n].t(), x[part])
    dy = None if dy is None else dy.to(y.dtype)
    return loss_rows, active, dx, dy, bias_rows if any(wanted) else None


def pairwise_loss(
    x,
    y,
    x_labels,
    y_labels,
    scale,
    bias=None,
    guide_x=None,
    guide_y=None,
    *,
    loss,
    parameters,
    self_offset=None,
    guide_margin=0.0,
    reduction="mean",
    chunk_bytes=0,
    form_x_grad=False,
    form_y_grad=False,
    form_bias_grad=False,
):
    """(loss, total, grad_x, grad_y, grad_bias); gradients of the summed loss, or empty."""
    wanted = (form_x_grad, form_y_grad, form_bias_grad)
    if reduction == "none" or x.dtype != torch.float32:
        wanted = (False, False, False)
    options = {"loss": loss, "parameters": parameters, "self_offset": self_offset, "guide_margin": guide_margin}
    tensors = (x, y, x_labels, y_labels, scale, bias, guide_x, guide_y)
    rows, active, *gradients = run_chunks(None, None, *tensors, wanted, 1.0, **options, chunk_bytes=chunk_bytes)
    total = active.sum()
    divisor = {"mean": max(1, len(x)), "mean_active": total.clamp(min=1)}.get(reduction, 1)
    value = rows if reduction == "none" else rows.sum() / divisor
    return value, total, *(found(x, g) for g in gradients)


def pairwise_loss_backward(
    grad_loss, x, y, x_labels, y_labels, scale, bias, guide_x, guide_y, total, *, reduction, x_grad, y_grad, bias_grad,
    **options
):  # fmt: skip
    """(grad_x, grad_y, grad_bias), empty where not wanted."""
    divisor = float(max(1, len(x))) if reduction == "mean" else 1.0
    tensors = (x, y, x_labels, y_labels, scale, bias, guide_x, guide_y)
    over = total if reduction == "mean_active" else None
    _, _, *gradients = run_chunks(grad_loss, over, *tensors, (x_grad, y_grad, bias_grad), divisor, **options)
    return tuple(found(x, g) for g in gradients)


def found(like, gradient):
    return like.new_empty(0) if gradient is None else gradient


OPS = {"pairwise_loss": pairwise_loss, "pairwise_loss_backward": pairwise_loss_backward}
