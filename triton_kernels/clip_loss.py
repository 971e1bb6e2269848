"""clip_loss, a chunk of rows of the similarities S = X Y^T at a time; z = scale S, its positives on the diagonal.

A product forms the chunk in float32. Forward, an instance of the kernel per tile takes maxima and sums of e^(z - max)
over the others, all pairs but the positives, along its rows and along its columns; those of a row, and those of a
column with what earlier chunks left, are merged by a second kernel. Backward, from S again,

    G_ij = u_i row_weight_i e^(z_ij - row_max_i) + u_j column_weight_j e^(z_ij - column_max_j)    G_ii = -u_i share_i
    grad_x = G Y    grad_y += G^T X

The state is that of csrc/clip_loss/clip_loss.h.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pairwise import CHUNK_BYTES, LEAST_ROWS, add_product, form_similarities
from .pairwise_fold import INFINITY
from .pairwise_losses import sigmoid, softplus
from .rows import Target, check_logits, finite_max, reduce_rows

OP, STATE = "clip_loss", 5
TILE_ROWS, TILE_COLUMNS, MERGED = 32, 128, 1024


class Chunk(NamedTuple):
    similarities: Tensor  # (rows, columns)
    rows: int
    columns: int
    scale: Tensor


class State(NamedTuple):
    """Lines of N numbers; until they are finished, maxima and sums of the others, and share is z_ii."""

    row_max: Tensor
    row_weight: Tensor
    column_max: Tensor
    column_weight: Tensor
    share: Tensor


class Parts(NamedTuple):
    """Of the tiles of a chunk: one strip of columns, or one band of rows, after the other."""

    row_max: Tensor  # (strips, rows)
    row_sum: Tensor
    column_max: Tensor  # (bands, columns)
    column_sum: Tensor


@triton.jit
def load_tile(chunk, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Places of a tile, its z, and those of the others: -inf beside them."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < chunk.rows)[:, None] & (cols < chunk.columns)[None, :]
    place = rows.to(tl.int64)[:, None] * chunk.columns + cols[None, :]
    z = tl.load(chunk.similarities + place, mask=inside, other=0.0) * tl.load(chunk.scale)  # [ROWS, BLOCK]
    own = (first + rows)[:, None] == cols[None, :]
    return rows, cols, inside, place, own, z, tl.where(inside & (own == 0), z, -INFINITY)


@triton.jit(do_not_specialize=["first"])
def clip_statistics_kernel(chunk, state, parts, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols, inside, _, own, z, others = load_tile(chunk, first, ROWS, BLOCK)
    in_rows, in_columns = rows < chunk.rows, cols < chunk.columns
    row_max = tl.max(others, 1)
    row_sum = tl.sum(tl.exp(others - finite_max(row_max)[:, None]), 1)
    row_part = tl.program_id(0) * chunk.rows + rows
    tl.store(parts.row_max + row_part, row_max, mask=in_rows)
    tl.store(parts.row_sum + row_part, row_sum, mask=in_rows)
    column_max = tl.max(others, 0)
    column_sum = tl.sum(tl.exp(others - finite_max(column_max)[None, :]), 0)
    column_part = tl.program_id(1).to(tl.int64) * chunk.columns + cols
    tl.store(parts.column_max + column_part, column_max, mask=in_columns)
    tl.store(parts.column_sum + column_part, column_sum, mask=in_columns)
    begin = tl.program_id(0) * BLOCK
    here = in_rows & (first + rows >= begin) & (first + rows < begin + BLOCK)
    tl.store(state.share + first + rows, tl.sum(tl.where(own & inside, z, 0.0), 1), mask=here)


@triton.jit(do_not_specialize=["count", "n"])
def clip_merge_kernel(
    part_max, part_sum, max_ptr, sum_ptr, count, n, JOINS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The parts (count, n) of rows or columns; JOINS: with what stands there already."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < n
    top = tl.full([BLOCK], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if JOINS:
        top = tl.load(max_ptr + index, mask=in_range, other=-INFINITY)
        total = tl.load(sum_ptr + index, mask=in_range, other=0.0)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < count)[:, None] & in_range[None, :]
        place = part.to(tl.int64)[:, None] * n + index[None, :]
        maxima = tl.load(part_max + place, mask=inside, other=-INFINITY)  # [PARTS, BLOCK]
        sums = tl.load(part_sum + place, mask=inside, other=0.0)
        higher = tl.maximum(top, tl.max(maxima, 0))
        shift = finite_max(higher)
        total = total * tl.exp(top - shift) + tl.sum(sums * tl.exp(maxima - shift[None, :]), 0)
        top = higher
    tl.store(max_ptr + index, top, mask=in_range)
    tl.store(sum_ptr + index, total, mask=in_range)


@triton.jit
def finish_side(positive, max_ptr, weight_ptr, index, inside):
    """Of the others' maxima and sums: loss and 1 - p_ii; maxima and weights of all."""
    others = tl.load(max_ptr + index, mask=inside, other=0.0)
    total = tl.load(weight_ptr + index, mask=inside, other=1.0)
    gap = (others - positive) + tl.log(total)
    first = positive > others
    e = tl.exp(tl.where(first, others - positive, positive - others))
    tl.store(max_ptr + index, tl.where(first, positive, others), mask=inside)
    tl.store(weight_ptr + index, 0.5 / tl.where(first, 1.0 + total * e, total + e), mask=inside)
    return softplus(gap), sigmoid(gap)


@triton.jit(do_not_specialize=["n"])
def clip_finish_kernel(state, loss_rows, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    positive = tl.load(state.share + index, mask=inside, other=0.0)
    row_loss, row_share = finish_side(positive, state.row_max, state.row_weight, index, inside)
    column_loss, column_share = finish_side(positive, state.column_max, state.column_weight, index, inside)
    tl.store(state.share + index, 0.5 * (row_share + column_share), mask=inside)
    tl.store(loss_rows + index, 0.5 * (row_loss + column_loss), mask=inside)


@triton.jit(do_not_specialize=["first"])
def clip_gradient_kernel(chunk, state, grad_loss, gradient, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols, inside, place, own, _, others = load_tile(chunk, first, ROWS, BLOCK)
    in_rows, in_columns = rows < chunk.rows, cols < chunk.columns
    row_max = tl.load(state.row_max + first + rows, mask=in_rows, other=0.0)
    row_weight = tl.load(state.row_weight + first + rows, mask=in_rows, other=0.0)
    share = tl.load(state.share + first + rows, mask=in_rows, other=0.0)
    column_max = tl.load(state.column_max + cols, mask=in_columns, other=0.0)
    column_weight = tl.load(state.column_weight + cols, mask=in_columns, other=0.0)
    if grad_loss is not None:
        upstream = tl.load(grad_loss + first + rows, mask=in_rows, other=0.0)
        row_weight, share = row_weight * upstream, share * upstream
        column_weight *= tl.load(grad_loss + cols, mask=in_columns, other=0.0)
    g = tl.exp(others - row_max[:, None]) * row_weight[:, None]
    g += tl.exp(others - column_max[None, :]) * column_weight[None, :]
    g = tl.where(own, -share[:, None], g)
    tl.store(gradient + place, g.to(gradient.dtype.element_ty), mask=inside)


class Problem(NamedTuple):
    image: Tensor
    text: Tensor
    logit_scale: Tensor
    chunk_bytes: int


def chunks_of(problem: Problem):
    """The first row, the images and the similarities of each chunk; one buffer serves all."""
    n = len(problem.image)
    held, least = problem.chunk_bytes or CHUNK_BYTES, 1 if problem.chunk_bytes else LEAST_ROWS
    rows = min(n, max(held // max(1, 4 * n), least))
    buffer = torch.empty((rows, n), dtype=torch.float32, device=problem.image.device)
    for first in range(0, n, max(1, rows)):
        image = problem.image[first : first + rows]
        similarities = form_similarities(buffer[: len(image)], image, problem.text)
        yield first, image, Chunk(similarities, len(image), n, problem.logit_scale)


def grid_of(chunk: Chunk) -> tuple[int, int]:
    return triton.cdiv(chunk.columns, TILE_COLUMNS), triton.cdiv(chunk.rows, TILE_ROWS)


def merge(part_max: Tensor, part_sum: Tensor, maxima: Tensor, sums: Tensor, joins: bool) -> None:
    count, n = part_max.shape
    parts = min(64, triton.next_power_of_2(count))
    block = MERGED // parts
    clip_merge_kernel[(triton.cdiv(n, block),)](
        part_max, part_sum, maxima, sums, count, n, JOINS=joins, PARTS=parts, BLOCK=block
    )


def clip_loss(image, text, logit_scale, *, reduction="mean", chunk_bytes=0):
    """(loss, state)"""
    check_logits(OP, image, "images")
    n = len(image)
    state = torch.empty(STATE * n + 1, dtype=torch.float32, device=image.device)
    lines = State(*state[:-1].view(STATE, n))
    loss_rows = torch.empty(n, dtype=torch.float32, device=image.device)
    with torch.cuda.device_of(image):
        for first, _, chunk in chunks_of(Problem(image, text, logit_scale, chunk_bytes)):
            strips, bands = grid = grid_of(chunk)
            of_rows, of_columns = (loss_rows.new_empty(2, *size) for size in ((strips, chunk.rows), (bands, n)))
            parts = Parts(*of_rows, *of_columns)
            clip_statistics_kernel[grid](chunk, lines, parts, first, ROWS=TILE_ROWS, BLOCK=TILE_COLUMNS)
            rows = slice(first, first + chunk.rows)
            merge(parts.row_max, parts.row_sum, lines.row_max[rows], lines.row_weight[rows], False)
            merge(parts.column_max, parts.column_sum, lines.column_max, lines.column_weight, first > 0)
        if n > 0:
            clip_finish_kernel[(triton.cdiv(n, 256),)](lines, loss_rows, n, BLOCK=256)
    every_row = Target(None, 0, None)
    return reduce_rows(loss_rows, state[-1], every_row, V=0, ignore_index=0, reduction=reduction), state


def clip_loss_backward(
    image, text, logit_scale, state, grad_loss=None, *, chunk_bytes=0, image_grad=True, text_grad=True
):
    """(grad_image, grad_text), empty where not wanted."""
    check_logits(OP, image, "images")
    lines = State(*state[:-1].view(STATE, len(image)))
    d_image = image.new_empty(image.shape if image_grad else 0)
    d_text = torch.zeros(text.shape if text_grad else 0, dtype=torch.float32, device=text.device)
    narrow = None
    for first, images, chunk in chunks_of(Problem(image, text, logit_scale, chunk_bytes)):
        gradient = chunk.similarities
        if image.dtype != torch.float32:
            narrow = torch.empty_like(gradient, dtype=image.dtype) if narrow is None else narrow
            gradient = narrow[: chunk.rows]
        with torch.cuda.device_of(image):
            clip_gradient_kernel[grid_of(chunk)](
                chunk, lines, grad_loss, gradient, first, ROWS=TILE_ROWS, BLOCK=TILE_COLUMNS
            )
        if image_grad:
            torch.mm(gradient, text, out=d_image[first : first + chunk.rows])
        if text_grad:
            add_product(d_text, gradient.t(), images)
    return d_image, d_text.to(text.dtype)


OPS = {"clip_loss": clip_loss, "clip_loss_backward": clip_loss_backward}
