"""Shapes in which the kernels of the CUDA library are launched, as csrc computes them, with the warps that a
multiprocessor is to hold of each. A launch that was recorded has the same four numbers."""

from collections.abc import Callable
from typing import NamedTuple

from occupancy import Launch

TEAM_BYTES = 32 * 8  # a number of each warp (csrc/common/team.cuh)
LONG_ROOM = 24576  # numbers of a long row that a block keeps (csrc/simplex_topk/long_rows.cuh)
PITCH = 64 + 4  # of a tile of pairs (csrc/sinkhorn/pairs.cuh)

WARP, BLOCK = (32, 8), (256, 1)  # a warp for each of 8 rows, a block for one


class Case(NamedTuple):
    launch: Launch
    warps: tuple[int, int, int, int]  # at least: on sm_80, on sm_90, on sm_100, on each of sm_86, 89 and 120


def case(kernel: str, block: tuple[int, int], shared_bytes: int, warps: tuple[int, int, int, int]) -> Case:
    return Case(Launch(kernel, (1024, 1), block, shared_bytes), warps)


def by_size(kernel: str, shape: Callable[[int], tuple[tuple[int, int], int]], warps: dict[int, tuple]) -> list[Case]:
    """Of a kernel for each size, with the block and the shared bytes that `shape` tells."""
    return [case(kernel.replace("SIZE", str(size)), *shape(size), least) for size, least in warps.items()]


def by_warps(size: int) -> tuple[tuple[int, int], int]:
    return WARP, 0


def mala_bytes(tiles: int, vectors: int) -> int:
    """Tiles of 64 x 64 and rows of 64 (csrc/mala/mala_tiles.cuh), and where a block reads."""
    return 4 * (64 + tiles * 64 * 64 + vectors * 64)


def apply_bytes(values: int) -> int:
    return 64 * (2 * PITCH + values + 2) * 4


def long_bytes(numbers: int) -> int:
    return TEAM_BYTES + numbers * 4


def small_block(size: int) -> tuple[int, int]:
    return (128 if size < 32 else 32, 1)


def small_bytes(size: int, matrices: int) -> int:
    problems = small_block(size)[0] // min(size, 32)
    return problems * (matrices * size * (size + 1) + 2 * size) * 4


ROWS = [
    case("row_statistics_kernel<*, PlainSoftmax, *", BLOCK, 8 * 32, (32, 32, 32, 32)),
    case("row_statistics_kernel<*, PlainSoftmax, *", WARP, 32, (32, 32, 32, 32)),
    case("row_statistics_kernel<*, RowMoments, *", BLOCK, 8 * 16, (32, 32, 32, 32)),
    case("row_statistics_kernel<*, FullSoftmax<void>, *", BLOCK, 8 * 32, (24, 24, 24, 24)),
    case("row_statistics_kernel<*, FullSoftmax<[!v]*", BLOCK, 8 * 32, (16, 16, 16, 16)),
    case("merge_parts_kernel<*", WARP, 0, (64, 64, 64, 48)),
    case("row_reduction_kernel", (512, 1), TEAM_BYTES, (64, 64, 64, 48)),
    case("row_gradient_kernel<*, PlainSoftmaxGradient, *", BLOCK, 0, (32, 32, 32, 32)),
    case("row_gradient_kernel<*, AffineGradient, *", BLOCK, 0, (32, 32, 32, 32)),
    case("row_gradient_kernel<*, FullSoftmaxGradient<void>, *", BLOCK, 0, (24, 24, 32, 24)),
    case("row_gradient_kernel<*, FullSoftmaxGradient<[!v]*", BLOCK, 0, (16, 16, 16, 16)),
    case("accumulate_kernel<*", BLOCK, 0, (64, 64, 64, 48)),
    case("pairwise_kernel<*, Sigmoid>", BLOCK, 2 * 8 * 16, (40, 40, 40, 40)),
    case("pairwise_kernel<*, Softmax>", BLOCK, 2 * 8 * 16, (32, 32, 32, 32)),
    case("pairwise_kernel<*, MultiSimilarity>", BLOCK, 2 * 8 * 16, (32, 32, 32, 32)),
    case("pairwise_kernel<*", BLOCK, 2 * 8 * 16, (32, 32, 32, 32)),
    case("short_labels_kernel", (64, 1), 0, (64, 64, 64, 32)),
    case("clip_statistics_kernel<*", BLOCK, 32 * 256 * 4, (32, 32, 32, 24)),
    case("clip_merge_kernel", BLOCK, 0, (64, 64, 64, 48)),
    case("clip_finish_kernel", (64, 1), 0, (48, 48, 48, 32)),
    case("clip_gradient_kernel<*", BLOCK, 16 * 16, (32, 32, 32, 32)),
]

MALA = [
    case("mala_sums_kernel<*", BLOCK, mala_bytes(2, 0), (16, 16, 16, 16)),
    case("mala_forward_kernel<*, false>", BLOCK, mala_bytes(2, 7), (16, 16, 16, 16)),
    case("mala_forward_kernel<*, true>", BLOCK, mala_bytes(4, 7), (16, 16, 16, 8)),
    case("mala_query_gradient_kernel<*, false>", BLOCK, mala_bytes(2, 12), (16, 16, 16, 16)),
    case("mala_query_gradient_kernel<*, true>", BLOCK, mala_bytes(4, 12), (16, 16, 16, 8)),
    case("mala_query_gradient_kernel<*, true>", BLOCK, mala_bytes(5, 12), (8, 16, 16, 8)),
    case("mala_key_gradient_kernel<*, false>", BLOCK, mala_bytes(2, 5), (16, 16, 16, 16)),
    case("mala_key_gradient_kernel<*, true>", BLOCK, mala_bytes(4, 5), (16, 16, 16, 8)),
    case("mala_scan_kernel", BLOCK, 0, (64, 64, 64, 48)),
    case("mala_group_sum_kernel<*", BLOCK, 0, (64, 64, 64, 48)),
]

SINKHORN = [
    case("matrix_half_step_kernel<false, true>", BLOCK, 32 * 8 + (8 + 2048) * 4, (32, 32, 32, 32)),
    case("matrix_half_step_kernel<true, true>", BLOCK, 8 * 128 * 8 + (8 + 2048) * 4, (32, 32, 32, 32)),
    case("matrix_half_step_kernel<false, false>", BLOCK, 32 * 8 + (8 + 2048) * 4, (24, 24, 24, 24)),
    case("matrix_half_step_kernel<true, false>", BLOCK, 8 * 128 * 8 + (8 + 2048) * 4, (32, 32, 24, 24)),
    case("half_step_kernel<SquaredEuclidean>", BLOCK, (64 * (PITCH + 2) + 8) * 4, (32, 24, 16, 16)),
    case("half_step_kernel<Euclidean>", BLOCK, (64 * (PITCH + 2) + 8) * 4, (24, 32, 16, 16)),
    case("product_half_step_kernel<false, true>", (128, 1), (64 * 152 + 2 * 64 + 4) * 4, (16, 16, 16, 8)),
    case("product_half_step_kernel<true, true>", (128, 1), (48 * 152 + 2 * 64 + 4) * 4, (16, 16, 16, 12)),
    case("product_half_step_kernel<false, false>", (128, 1), (64 * 152 + 2 * 64 + 4) * 4, (16, 16, 16, 8)),
    case("product_half_step_kernel<true, false>", (128, 1), (48 * 152 + 2 * 64 + 4) * 4, (16, 16, 16, 12)),
    case("apply_kernel<*, 16>", BLOCK, apply_bytes(16), (16, 16, 16, 16)),
    case("apply_kernel<*, 64>", BLOCK, apply_bytes(64), (16, 16, 16, 8)),
    case("apply_kernel<*, 80>", BLOCK, apply_bytes(80), (16, 16, 16, 8)),
    case("plan_kernel", BLOCK, 64 * PITCH * 4, (40, 40, 40, 40)),
    case("squares_kernel", WARP, 0, (64, 64, 64, 48)),
    case("prepare_kernel", BLOCK, 8 * 8, (48, 48, 48, 48)),
    case("decide_kernel", BLOCK, 8 * 4, (64, 64, 48, 48)),
    case("finish_kernel", BLOCK, 8 * 8, (40, 40, 32, 32)),
    case("small_plan_kernel", BLOCK, 0, (64, 64, 64, 48)),
    case("small_apply_kernel<*", BLOCK, 32 * 33 * 4, (48, 48, 32, 32)),
    case("small_kernel<Single<4>>", (128, 1), 0, (20, 20, 20, 20)),
    case("unrolled_kernel<Single<4>>", (128, 1), 0, (16, 16, 16, 16)),
    *by_size(
        "small_kernel<Group<SIZE, false>>",
        lambda size: (small_block(size), small_bytes(size, 1)),
        {8: (36, 36, 36, 36), 16: (36, 32, 36, 32), 32: (28, 28, 28, 16), 64: (9, 12, 12, 5)},
    ),
    *by_size(
        "unrolled_kernel<Group<SIZE, true>>",
        lambda size: (small_block(size), small_bytes(size, 3)),
        {8: (28, 28, 28, 24), 16: (20, 20, 20, 12), 32: (12, 16, 16, 7), 64: (3, 4, 4, 1)},
    ),
]

SPARSE = [
    *by_size(
        "sparse_cut_kernel<SIZE>",
        by_warps,
        {4: (48, 48, 48, 48), 8: (40, 40, 40, 40), 16: (24, 24, 32, 24), 32: (16, 16, 24, 16)},
    ),
    case("sparse_long_cut_kernel", BLOCK, long_bytes(4096), (32, 32, 40, 32)),
    case("sparse_long_cut_kernel", BLOCK, long_bytes(LONG_ROOM), (8, 16, 16, 8)),
    case("sparse_guess_kernel", BLOCK, long_bytes(4096), (64, 64, 32, 32)),
    case("sparse_gather_kernel", BLOCK, 0, (48, 48, 40, 40)),
    case("sparse_rows_kernel<1>", WARP, 32 * 8 * 4, (48, 48, 48, 48)),
    case("sparse_rows_kernel<4>", WARP, 32 * 8 * 4 * 4, (32, 32, 32, 32)),
    case("sparse_lists_kernel", WARP, TEAM_BYTES, (32, 32, 32, 32)),
    case("sparse_lists_kernel", (1024, 1), TEAM_BYTES, (32, 32, 32, 32)),
    case("sparse_begin_kernel", (256, 1), TEAM_BYTES, (64, 64, 64, 48)),
    case("sparse_begin_kernel", (1024, 1), TEAM_BYTES, (64, 64, 64, 32)),
    case("sparse_step_kernel", (256, 1), TEAM_BYTES, (32, 32, 32, 32)),
    case("sparse_step_kernel", (1024, 1), TEAM_BYTES, (32, 32, 32, 32)),
    case("sparse_accept_kernel", (256, 1), TEAM_BYTES, (64, 64, 64, 48)),
    case("sparse_accept_kernel", (1024, 1), TEAM_BYTES, (64, 64, 64, 32)),
    case("sparse_finish_kernel", (256, 1), TEAM_BYTES, (48, 48, 32, 32)),
    case("sparse_finish_kernel", (1024, 1), TEAM_BYTES, (32, 32, 32, 32)),
    *by_size(
        "simplex_topk_kernel<SIZE>",
        by_warps,
        {4: (48, 48, 64, 48), 8: (40, 40, 48, 40), 16: (24, 24, 40, 24), 32: (16, 16, 32, 16)},
    ),
    *by_size(
        "simplex_topk_backward_kernel<SIZE>",
        by_warps,
        {4: (64, 64, 64, 48), 8: (48, 48, 48, 48), 16: (32, 40, 32, 32), 32: (24, 24, 16, 16)},
    ),
    case("simplex_topk_long_kernel", BLOCK, long_bytes(4096), (40, 40, 40, 40)),
    case("simplex_topk_long_kernel", BLOCK, long_bytes(LONG_ROOM), (8, 16, 16, 8)),
    case("simplex_topk_long_backward_kernel", BLOCK, TEAM_BYTES, (64, 64, 64, 48)),
]

SAMPLING = [
    case("wta_crs_norms_kernel<*", BLOCK, TEAM_BYTES, (32, 32, 32, 32)),
    case("wta_crs_gather_kernel<*", BLOCK, 0, (64, 64, 64, 48)),
    case("wta_crs_sample_kernel", (512, 1), TEAM_BYTES, (16, 16, 16, 16)),
    case("wta_crs_sizes_kernel", BLOCK, TEAM_BYTES, (64, 64, 64, 48)),
    case("wta_crs_weigh_kernel", (1024, 1), TEAM_BYTES, (32, 32, 32, 32)),
    case("wta_crs_place_kernel", BLOCK, 0, (32, 32, 32, 32)),
    case("wta_crs_draw_kernel", BLOCK, 0, (64, 64, 64, 48)),
]

CASES = [*ROWS, *MALA, *SINKHORN, *SPARSE, *SAMPLING]
