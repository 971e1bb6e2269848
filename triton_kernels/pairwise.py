"""Pairwise losses, a chunk of rows of the similarities S = X Y^T at a time.

A product forms the chunk in float32. An instance of the kernel per row walks it in tiles of BLOCK columns, once per
fold of its program (pairwise_losses.py, pairwise_shares.py), and where gradients are wanted once more to write
G = dL/dz, which enters two products:

    grad_x = G Y    grad_y += G^T X    grad_bias = G 1

16-bit G are kept of several chunks, and these products are then larger.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pairwise_fold import INFINITY, Program, with_parameters
from .pairwise_losses import LOSSES
from .pairwise_shares import SHARES
from .rows import check_logits

PROGRAMS = {program.name: program for program in LOSSES + SHARES}
CHUNK_BYTES, LEAST_ROWS, MOST_GRADIENTS, MOST_BLOCK = 128 << 20, 96, 4096, 1024  # as in csrc/pairwise/chunks.h


class Chunk(NamedTuple):
    similarities: Tensor  # (rows, columns)
    columns: int
    x_labels: Tensor
    y_labels: Tensor
    guide: Tensor | None  # (rows, columns)
    guide_margin: float
    scale: Tensor
    bias: Tensor | None
    loss_rows: Tensor
    active_rows: Tensor
    gradient: Tensor | None  # (rows, columns)
    bias_rows: Tensor


class Upstream(NamedTuple):
    """Of a row: its grad_loss (None: 1) over the divisor and over the number of active rows (None: 1)."""

    grad_loss: Tensor | None
    stride: int
    active: Tensor | None
    divisor: float


class Row(NamedTuple):
    similarities: tl.tensor
    columns: tl.tensor
    label: tl.tensor
    y_labels: tl.tensor
    own: tl.tensor  # the row's own column, -1 without
    scale: tl.tensor
    bias: tl.tensor


class Guide(NamedTuple):
    """Negatives of a row whose guide similarity exceeds `most` are none."""

    similarities: tl.tensor
    most: tl.tensor


@triton.jit
def load_pairs(row, guide, cols):
    """z of a tile, and how its pairs are related."""
    inside = cols < row.columns
    z = tl.load(row.similarities + cols, mask=inside, other=0.0) * row.scale + row.bias  # [BLOCK]
    same = tl.load(row.y_labels + cols, mask=inside, other=0) == row.label
    related = inside & (cols != row.own)
    if guide is not None:
        alike = tl.load(guide.similarities + cols, mask=inside, other=0.0) > guide.most
        related = related & (same | (alike == 0))
    return z, tl.where(related, tl.where(same, 1, -1), 0)


@triton.jit
def initial(OP: tl.constexpr, columns):
    if OP == "sum":
        return 0.0
    elif OP == "max":
        return -INFINITY
    elif OP == "min":
        return INFINITY
    else:
        tl.static_assert(OP == "first")
        return columns


@triton.jit
def combined(OP: tl.constexpr, total, value, cols, columns):
    if OP == "sum":
        return total + tl.sum(value)
    elif OP == "max":
        return tl.maximum(total, tl.max(value))
    elif OP == "min":
        return tl.minimum(total, tl.min(value))
    else:
        tl.static_assert(OP == "first")
        return tl.minimum(total, tl.min(tl.where(value, cols, columns)))


@triton.jit
def over_row(program, fold, row, guide, before, BLOCK: tl.constexpr):
    """The totals of a fold, which sees those of the folds before."""
    totals = ()
    for i in tl.static_range(fold.count):
        totals = totals + (initial(fold.ops[i], row.columns),)
    for start in range(0, row.columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, relation = load_pairs(row, guide, cols)
        values = fold.function(program, z, relation, before)
        longer = ()
        for i in tl.static_range(fold.count):
            longer = longer + (combined(fold.ops[i], totals[i], values[i], cols, row.columns),)
        totals = longer
    return totals


@triton.jit
def guide_of_row(chunk, index, row, BLOCK: tl.constexpr):
    first = row.columns  # positive
    for start in range(0, row.columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        _, relation = load_pairs(row, None, cols)
        first = tl.minimum(first, tl.min(tl.where(relation > 0, cols, row.columns)))
    similarities = chunk.guide + index * row.columns
    most = tl.load(similarities + first, mask=first < row.columns, other=INFINITY)
    return Guide(similarities, most - chunk.guide_margin)


@triton.jit(do_not_specialize=["self_offset"])
def pairwise_kernel(chunk, upstream, self_offset, program, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = Row(
        chunk.similarities + index * chunk.columns,
        chunk.columns,
        tl.load(chunk.x_labels + index),
        chunk.y_labels,
        -1 if self_offset is None else (index + self_offset).to(tl.int32),
        tl.load(chunk.scale),
        tl.load(chunk.bias) if chunk.bias is not None else 0.0,
    )
    guide = None
    if chunk.guide is not None:
        guide = guide_of_row(chunk, index, row, BLOCK)
    totals = ()
    for i in tl.static_range(program.count):
        totals = totals + over_row(program, program.folds[i], row, guide, totals, BLOCK)
    active, loss = program.finish(program, totals)
    tl.store(chunk.loss_rows + index, tl.where(active, loss, 0.0))
    tl.store(chunk.active_rows + index, tl.where(active, 1.0, 0.0))

    if chunk.gradient is not None:
        factor = 1.0 / upstream.divisor
        if upstream.grad_loss is not None:
            factor = tl.load(upstream.grad_loss + index * upstream.stride) / upstream.divisor
        if upstream.active is not None:
            factor = factor / tl.maximum(tl.load(upstream.active), 1.0)
        bias_gradient = 0.0
        for start in range(0, chunk.columns, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            if program.weight is not None:
                z, relation = load_pairs(row, guide, cols)
                weight = tl.where(relation != 0, program.weight(program, z, relation, totals + (loss,)), 0.0)
            else:
                a, at_a, b, at_b = program.write_two(program, totals + (loss,))
                weight = tl.where(cols == a, at_a, 0.0) + tl.where(cols == b, at_b, 0.0)
            g = tl.where(active, factor * weight, 0.0)
            bias_gradient += tl.sum(tl.where(cols < chunk.columns, g, 0.0))
            out = chunk.gradient + index * chunk.columns + cols
            tl.store(out, g.to(chunk.gradient.dtype.element_ty), mask=cols < chunk.columns)
        tl.store(chunk.bias_rows + index, bias_gradient)


class Problem(NamedTuple):
    x: Tensor
    y: Tensor
    x_labels: Tensor
    y_labels: Tensor
    scale: Tensor
    bias: Tensor | None
    guide_x: Tensor | None
    guide_y: Tensor | None
    loss: str
    parameters: list[float]
    self_offset: int | None = None
    guide_margin: float = 0.0
    chunk_bytes: int = 0


def program_of(problem: Problem) -> Program:
    if problem.loss not in PROGRAMS:
        raise ValueError(
            f"tilewise.pairwise_loss: expected loss to be the name of a loss, got {problem.loss!r}; "
            f"there are {', '.join(PROGRAMS)}"
        )
    program = PROGRAMS[problem.loss]
    if len(problem.parameters) != program.parameters:
        raise ValueError(
            f"tilewise.pairwise_loss: expected {program.parameters} parameters of loss {problem.loss!r}, "
            f"got {len(problem.parameters)}"
        )
    return with_parameters(program, problem.parameters)


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


def gradient_rows(rows: int, columns: int, item_bytes: int, chunk_bytes: int) -> int:
    """Rows whose 16-bit gradients are kept for products together, in whole chunks of `rows`."""
    most = min(MOST_GRADIENTS, 4 * (chunk_bytes or CHUNK_BYTES) // (max(1, columns) * item_bytes))
    return max(1, most // rows) * rows


def run_chunks(problem: Problem, upstream: Upstream, wanted: tuple[bool, bool, bool]):
    """Row losses, active rows and the gradients (empty where not wanted) with the upstream of each row."""
    x, y, self_offset = problem.x, problem.y, problem.self_offset
    check_logits("pairwise_loss", x)
    program = program_of(problem)
    N, M = len(x), len(y)
    loss_rows, active_rows, bias_rows = torch.empty((3, N), dtype=torch.float32, device=x.device)
    dx = x.new_empty(x.shape if wanted[0] else 0)
    dy = torch.zeros(y.shape if wanted[1] else 0, dtype=torch.float32, device=y.device)
    held = problem.chunk_bytes or CHUNK_BYTES
    rows = min(max(1, N), max(held // max(1, 4 * M), 1 if problem.chunk_bytes else LEAST_ROWS))
    buffer = torch.empty((rows, M), dtype=torch.float32, device=x.device)
    guides = None if problem.guide_x is None else torch.empty_like(buffer)
    gradient, kept = buffer, rows
    if any(wanted) and x.dtype != torch.float32:
        kept = gradient_rows(rows, M, x.element_size(), problem.chunk_bytes)
        gradient = x.new_empty((min(kept, N), M))
    for begin in range(0, N, rows):
        part = slice(begin, begin + rows)
        n, before = len(x[part]), begin % kept
        form_similarities(buffer[:n], x[part], y)
        if guides is not None:
            form_similarities(guides[:n], problem.guide_x[part], problem.guide_y)
        chunk = Chunk(
            buffer,
            M,
            problem.x_labels[part],
            problem.y_labels,
            guides,
            problem.guide_margin,
            problem.scale,
            problem.bias,
            loss_rows[part],
            active_rows[part],
            gradient[before:] if any(wanted) else None,
            bias_rows[part],
        )
        grad_loss = upstream.grad_loss
        if grad_loss is not None and grad_loss.dim() == 1:
            grad_loss = grad_loss[part]
        with torch.cuda.device_of(x):
            pairwise_kernel[(n,)](
                chunk,
                upstream._replace(grad_loss=grad_loss),
                None if self_offset is None else min(max(self_offset, -N), M) + begin,
                program,
                BLOCK=min(MOST_BLOCK, max(16, triton.next_power_of_2(M))),
                num_warps=8 if M > 512 else 1,
            )
        if before + n < kept and begin + n < N:
            continue
        g, rows_of_g = gradient[: before + n], slice(begin - before, begin + n)
        if wanted[0]:
            torch.mm(g, y, out=dx[rows_of_g])
        if wanted[1]:
            add_product(dy, g.t(), x[rows_of_g])
    return loss_rows, active_rows, dx, dy.to(y.dtype), bias_rows if any(wanted) else bias_rows.new_empty(0)


def pairwise_loss(
    x, y, x_labels, y_labels, scale, bias=None, guide_x=None, guide_y=None, *, reduction="mean", form_x_grad=False,
    form_y_grad=False, form_bias_grad=False, **options
):  # fmt: skip
    """(loss, total, grad_x, grad_y, grad_bias); gradients of the summed loss, or empty."""
    wanted = (form_x_grad, form_y_grad, form_bias_grad)
    if reduction == "none" or x.dtype == torch.float16:  # as forms_gradients of pysrc/ops/formed.py has it
        wanted = (False, False, False)
    problem = Problem(x, y, x_labels, y_labels, scale, bias, guide_x, guide_y, **options)
    rows, active, *gradients = run_chunks(problem, Upstream(None, 0, None, 1.0), wanted)
    total = active.sum()
    divisor = {"mean": max(1, len(x)), "mean_active": total.clamp(min=1)}.get(reduction, 1)
    return rows if reduction == "none" else rows.sum() / divisor, total, *gradients


def pairwise_loss_backward(
    grad_loss, x, y, x_labels, y_labels, scale, bias, guide_x, guide_y, total, *, reduction, x_grad, y_grad, bias_grad,
    **options
):  # fmt: skip
    """(grad_x, grad_y, grad_bias), empty where not wanted."""
    upstream = Upstream(
        grad_loss,
        grad_loss.stride(0) if grad_loss.dim() == 1 else 0,
        total if reduction == "mean_active" else None,
        float(max(1, len(x))) if reduction == "mean" else 1.0,
    )
    problem = Problem(x, y, x_labels, y_labels, scale, bias, guide_x, guide_y, **options)
    return run_chunks(problem, upstream, (x_grad, y_grad, bias_grad))[2:]


OPS = {"pairwise_loss": pairwise_loss, "pairwise_loss_backward": pairwise_loss_backward}
