"""What a launch of each kernel takes, a line for each: registers of a thread, then its work.

Instructions, special functions and FLOP are those of one element: of the main loop's machine code for sm_90, or, where
it says "assumed", counted from the source. Numbers that depend on data stand below, as assumptions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import ceil
from types import SimpleNamespace
from typing import NamedTuple

CUT_PASSES, TOPK_PASSES = 30, 11  # of a warp over the numbers of a row that it holds: levels, then Newton's steps
NARROW_PASSES, NEWTON_PASSES = 7, 3  # of a block over the numbers that it keeps of a long column
KEPT = 0.12  # of a long column: what is above the hint
SHARING_PASSES = 2  # over all weights, until the rows that are certain are found
EVALUATIONS = 130  # of sparse_ot until its tolerance; the launches after them return at once


class Work(NamedTuple):
    """Of a whole launch; an instruction is one of a thread."""

    instructions: float
    special: float
    flop: float
    bytes: float  # of the GPU's memory, read and written
    rounds: float  # accesses of one thread that wait for each other
    tensor: float = 0.0  # FLOP on the tensor cores, in tf32


class Kernel(NamedTuple):
    registers: int
    work: Callable[[SimpleNamespace], Work]  # of the launch's sizes, and what sizes_of() adds


def each(elements: float, instructions: float, special=0.0, flop=0.0, *, bytes: float, rounds=0.0) -> Work:
    """What every element takes, then what the launch does."""
    return Work(instructions * elements, special * elements, flop * elements, bytes, rounds)


def alone(rounds: float, bytes: float = 0.0) -> Work:
    """A block for a problem, that does little but wait for what it reads."""
    return Work(0.0, 0.0, 0.0, bytes, rounds)


def folds(s: SimpleNamespace, walks: int, instructions: float, special: float, gradient: tuple[float, float]) -> Work:
    """Walks over float32 similarities; with a gradient one more, of so many instructions and special functions."""
    more, functions = gradient if s.gradient else (0.0, 0.0)
    moved = 4 * walks + (4 + s.item if s.gradient else 0)
    return each(s.cells, instructions + more, special + functions, 8, bytes=moved * s.cells)


def one_walk(s: SimpleNamespace, loss: tuple[float, float], gradient: tuple[float, float]) -> Work:
    """The same where the gradient comes with the loss."""
    return folds(s, 0, 0, 0, gradient) if s.gradient else folds(s, 1, *loss, gradient)


def attention(s: SimpleNamespace, tensors: int, products: int, others: float, rounds: int, split: int = 0) -> Work:
    """Of tensors like q: products of tiles of tokens, and what a feature takes beside them. A block waits for memory a
    few times for each of its four chunks. Floats are split for three products in tf32, of 16 bits some for two.
    """
    instructions, terms = (17 * products + 5 * split, products + split) if s.item < 4 else (31 * products, 3 * products)
    moved = tensors * s.item * s.cells + s.causal * 4 * s.batch * s.steps * s.width**2
    work = each(s.cells, others + instructions, 1, bytes=moved, rounds=4 * rounds)
    return work._replace(tensor=2.0 * terms * s.width * s.cells)


def by_products(s: SimpleNamespace, times: int, instructions: float, flop: float) -> Work:
    """Costs formed from products of points: numbers for each feature of a pair, all pairs so many times."""
    points = s.item * s.marginals * s.width
    return each(times * s.cells, instructions * s.width, 1.2, flop * s.width, bytes=points)


def by_tensor_cores(s: SimpleNamespace, instructions: float, products: int) -> Work:
    """The same in products of tf32: floats take three."""
    work = by_products(s, 1, instructions, 0)
    return work._replace(tensor=products * 2 * s.width * s.cells)


def small(s: SimpleNamespace, instructions: float, special: float) -> Work:
    """Every iteration of problems in the threads that have them; the pass after the last is one of these."""
    return each(s.threads * (s.steps + 1), instructions, special, bytes=4 * s.cells + 8 * s.marginals)


def scan(s: SimpleNamespace, instructions: float, rounds: float) -> Work:
    """Over the costs, until the search has ended."""
    return each(s.searched * s.cells, instructions, bytes=s.searched * s.read, rounds=s.searched * rounds)


def of_kept(s: SimpleNamespace) -> Work:
    """What is gathered of long columns is joined and cut in shared memory, until the search has ended."""
    numbers = s.searched * KEPT * s.cells
    passes = NARROW_PASSES + NEWTON_PASSES
    return each(numbers, 4.7 * passes + 20, 0.05, bytes=4 * numbers, rounds=s.searched * (4 * passes + 12))


def of_weights(s: SimpleNamespace) -> Work:
    """Weights of rows, by all blocks; then the last block looks for certain rows, two parts of a warp at a time."""
    parts = min(1024, ceil(s.rows / 32))
    looks = SHARING_PASSES * ceil(parts / 64) * (ceil(s.rows / 32 / parts) + 2)
    return each(s.rows, 60, bytes=12 * s.rows, rounds=20 + looks)


# The first pattern that the name of a kernel begins with counts.
KERNELS = {
    # rows of logits
    "row_statistics_kernel<.*PlainSoftmax": Kernel(56, lambda s: each(s.cells, 7.4, 1.13, 4, bytes=s.read)),
    "row_statistics_kernel<.*RowMoments": Kernel(56, lambda s: each(s.cells, 6, 0, 4, bytes=s.read)),  # assumed
    "row_gradient_kernel<.*PlainSoftmax": Kernel(64, lambda s: each(s.cells, 8.8, 1, 4, bytes=2 * s.read)),
    "row_gradient_kernel<.*Affine": Kernel(64, lambda s: each(s.cells, 7, 0, 3, bytes=2 * s.read)),  # assumed
    "merge_parts_kernel": Kernel(32, lambda s: each(s.threads, 100, 6, bytes=32 * s.threads, rounds=8)),  # assumed
    "row_reduction_kernel": Kernel(32, lambda s: each(s.rows, 10, 0, 2, bytes=8 * s.rows, rounds=s.rows / 2048 + 8)),
    "accumulate_kernel": Kernel(32, lambda s: each(s.rows, 12, 0, 1, bytes=(8 + s.item) * s.rows)),  # assumed
    # pairs of vectors
    "pairwise_kernel<.*MultiSimilarity": Kernel(58, lambda s: folds(s, 2, 8.3 + 19.4, 1, (21.9, 1))),
    "pairwise_kernel<.*Softmax": Kernel(60, lambda s: folds(s, 2, 7.3 + 13.3, 1, (14.8, 1))),
    "pairwise_kernel<.*Sigmoid": Kernel(44, lambda s: one_walk(s, (20.4, 1), (33, 3))),
    "short_labels_kernel": Kernel(28, lambda s: each(s.columns, 20, bytes=12 * s.columns)),
    "clip_statistics_kernel": Kernel(64, lambda s: each(s.cells, 26, 2.2, 8, bytes=(4 + 8 / 32 + 8 / 256) * s.cells)),
    "clip_merge_kernel": Kernel(32, lambda s: each(s.cells / 28, 12, 2, 4, bytes=(8 / 32 + 8 / 256) * s.cells)),
    "clip_finish_kernel": Kernel(32, lambda s: each(s.rows, 150, 8, 60, bytes=48 * s.rows)),  # assumed
    "clip_gradient_kernel": Kernel(64, lambda s: each(s.cells, 14, 2, 8, bytes=(4 + s.item) * s.cells)),
    # attention: a token's feature is an element
    "mala_sums_kernel": Kernel(128, lambda s: attention(s, 2, 1, 22, 2, split=1)),  # assumed
    "mala_scan_kernel": Kernel(32, lambda s: each(s.parts, 3, bytes=4 * (1 + s.causal) * s.parts)),
    "mala_forward_kernel<.*true": Kernel(126, lambda s: attention(s, 4, 4, 75, 3)),  # assumed
    "mala_forward_kernel": Kernel(112, lambda s: attention(s, 2, 1, 24, 2)),  # assumed
    "mala_query_gradient_kernel<.*true": Kernel(128, lambda s: attention(s, 5, 5, 128, 4, split=1)),  # assumed
    "mala_query_gradient_kernel": Kernel(115, lambda s: attention(s, 3, 1, 53, 3, split=1)),  # assumed
    "mala_key_gradient_kernel<.*true": Kernel(126, lambda s: attention(s, 6, 7, 120, 5)),  # assumed
    "mala_key_gradient_kernel": Kernel(115, lambda s: attention(s, 4, 2, 50, 4)),  # assumed
    # transport: a pair is an element
    "matrix_half_step_kernel<false": Kernel(64, lambda s: each(s.cells, 8.1, 1.25, 4, bytes=s.read)),
    "matrix_half_step_kernel<true": Kernel(64, lambda s: each(s.cells, 10.9, 1.25, 4, bytes=s.read)),
    "half_step_kernel<SquaredEuclidean": Kernel(75, lambda s: by_products(s, 1, 2.7, 2)),
    "product_half_step_kernel<false": Kernel(124, lambda s: by_tensor_cores(s, 0.46, 3)),
    "product_half_step_kernel<true": Kernel(110, lambda s: by_tensor_cores(s, 0.3, 1)),
    "apply_kernel<SquaredEuclidean, 80": Kernel(128, lambda s: by_products(s, ceil((s.width + 1) / 80), 4, 4)),
    "apply_kernel<SquaredEuclidean": Kernel(128, lambda s: by_products(s, ceil((s.width + 1) / 64), 4, 4)),
    "squares_kernel": Kernel(32, lambda s: each(s.threads / 32, 6 * s.width, bytes=s.width * s.threads / 8)),  # assumed
    "plan_kernel": Kernel(40, lambda s: each(s.cells, 40, 1, 4, bytes=2 * s.read)),  # assumed
    "prepare_kernel": Kernel(32, lambda s: alone(2 * s.lines + 16, 8 * s.marginals)),
    "finish_kernel": Kernel(40, lambda s: each(s.threads, 530, bytes=16 * s.marginals, rounds=4 * s.lines + 16)),
    "small_kernel<Single": Kernel(96, lambda s: small(s, 345, 44)),
    "small_kernel": Kernel(64, lambda s: small(s, 200, 19)),  # of 8 x 8 pairs
    "unrolled_kernel<Single": Kernel(128, lambda s: each(s.threads * s.steps, 900, 80, bytes=8 * s.history)),
    "unrolled_kernel": Kernel(72, lambda s: each(s.threads * s.steps, 520, 36, bytes=8 * s.history)),  # of 8 x 8 pairs
    "small_(plan|apply)_kernel": Kernel(40, lambda s: each(s.cells, 180, 6, bytes=2 * s.read)),
    # sparse transport
    "sparse_cut_kernel": Kernel(71, lambda s: scan(s, 6 * CUT_PASSES + 20, 4)),  # assumed
    "sparse_long_cut_kernel": Kernel(63, of_kept),  # assumed
    "sparse_guess_kernel": Kernel(59, lambda s: each(4096 * s.columns, 60, bytes=2**14 * s.columns)),  # assumed
    "sparse_gather_kernel": Kernel(40, lambda s: scan(s, 13.2, 4)),
    "sparse_rows_kernel": Kernel(56, lambda s: scan(s, 19 + 13.2, s.columns / 64)),  # assumed
    "sparse_lists_kernel": Kernel(58, lambda s: each(s.cells, 103, 2, bytes=s.read, rounds=s.turns)),  # assumed
    "sparse_(begin|accept)_kernel": Kernel(32, lambda s: alone(2 * s.lines)),
    "sparse_step_kernel": Kernel(64, lambda s: alone(s.searched * (45 * s.lines + 180))),
    "sparse_finish_kernel": Kernel(40, lambda s: alone(8 * s.lines + 40)),
    "simplex_topk_kernel": Kernel(48, lambda s: each(s.cells, 5.75 * TOPK_PASSES + 4, bytes=2 * s.read)),  # assumed
    "simplex_topk_backward_kernel": Kernel(48, lambda s: each(s.cells, 24, bytes=3 * s.read)),  # assumed
    "simplex_topk_long_kernel": Kernel(48, lambda s: each(s.cells, 4 * 12 + 20, bytes=2 * s.read)),  # assumed
    "simplex_topk_long_backward_kernel": Kernel(28, lambda s: each(s.cells, 20, bytes=3 * s.read)),  # assumed
    # sampled products
    "wta_crs_norms_kernel": Kernel(64, lambda s: each(s.cells, 3.8, 0, 2, bytes=s.read)),
    "wta_crs_gather_kernel": Kernel(46, lambda s: each(s.taken, 6, bytes=2 * s.item * s.taken)),  # assumed
    "wta_crs_sample_kernel": Kernel(96, lambda s: each(s.rows, 400, bytes=8 * s.rows, rounds=s.rows / 30)),  # assumed
    "wta_crs_sizes_kernel": Kernel(32, lambda s: each(s.rows, 24, bytes=8 * s.rows, rounds=6)),
    "wta_crs_weigh_kernel": Kernel(64, of_weights),  # assumed
    "wta_crs_place_kernel": Kernel(56, lambda s: each(s.rows, 110, bytes=4 * s.rows, rounds=8)),  # assumed
    "wta_crs_draw_kernel": Kernel(30, lambda s: each(s.k, 20 * 17, bytes=24 * s.k, rounds=20)),  # assumed
}  # fmt: skip


def sizes_of(launch) -> SimpleNamespace:
    """The sizes of a recorded launch and what kernels make of them."""
    s = launch.sizes
    threads, marginals = launch.blocks * launch.threads, s.batch * (s.rows + s.columns)
    return SimpleNamespace(
        **s._asdict(),
        cells=s.cells,
        read=s.item * s.cells,  # bytes of the matrix, once
        threads=threads,
        marginals=marginals,
        history=s.steps * marginals,  # potentials of all iterations
        parts=s.steps * threads,  # of sums, one for each thread and step
        taken=s.k * s.columns,  # elements of the rows that are drawn
        turns=ceil(s.rows / launch.block[0]),  # of a team over a column
        lines=ceil((s.rows + s.columns) / launch.threads),  # of a block over the numbers of a problem
        searched=min(1.0, EVALUATIONS / s.steps),  # the share of a search's launches that do something
    )


def kernel_of(launch, kernels: dict[str, Kernel] = KERNELS) -> Kernel | None:
    return next((kernel for pattern, kernel in kernels.items() if re.match(pattern, launch.kernel)), None)
