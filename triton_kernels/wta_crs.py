"""Sampled column-row products: norms of rows, the choice of rows, their gathering.

csrc/wta_crs/wta_crs.h has the formulas. Weights are integers, so that sums and choices are those of every backend; they
are computed anew in every pass, from norms that stay in the second-level cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .rows import check_logits

MIX_BITS = 16
SAMPLE_BLOCK = 1024


@triton.jit
def wta_crs_norms_kernel(x_ptr, out_ptr, R, D, batch_stride, row_stride, column_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row // R * batch_stride + row % R * row_stride
    squares = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, D, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + j * column_stride, mask=j < D, other=0.0).to(tl.float32).to(tl.float64)
        squares += x * x
    tl.store(out_ptr + row, tl.sqrt(tl.sum(squares, 0)).to(tl.float32))


@triton.jit
def sizes_at(x_ptr, y_ptr, i, N):
    size = tl.load(x_ptr + i, mask=i < N, other=0.0).to(tl.float64)
    if y_ptr is not None:
        size *= tl.load(y_ptr + i, mask=i < N, other=0.0).to(tl.float64)
    return size


@triton.jit
def units_at(x_ptr, y_ptr, i, N, largest, whole):
    share = sizes_at(x_ptr, y_ptr, i, N) / tl.where(largest > 0, largest, 1.0)
    return tl.where(largest > 0, share * whole.to(tl.float64), 0.0).to(tl.int64)


@triton.jit
def weights_at(x_ptr, y_ptr, i, N, largest, whole, mean, mix, MIX_BITS: tl.constexpr):
    units = units_at(x_ptr, y_ptr, i, N, largest, whole)
    weights = 1 + (mean * mix >> MIX_BITS) + (units * ((1 << MIX_BITS) - mix) >> MIX_BITS)
    return tl.where(i < N, weights, 0)


@triton.jit
def random_below(rest, seed, index):
    z = seed.to(tl.uint64) + (index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    share = (z >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
    return tl.minimum((share * rest.to(tl.float64)).to(tl.int64), tl.maximum(rest - 1, 0))


@triton.jit
def points_before(left, rest, start, before):
    along = left * before - start
    return tl.where(along > 0, (along + rest - 1) // tl.maximum(rest, 1), 0)


@triton.jit
def scales_of(left, rest, weights):
    return (rest.to(tl.float64) / tl.maximum(left * weights, 1).to(tl.float64)).to(tl.float32)


class Samples(NamedTuple):
    """(problems, K) indices and their scales; running sums of weights where samples are drawn one by one."""

    indices: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor | None


@triton.jit
def wta_crs_sample_kernel(
    x_ptr, y_ptr, seed_ptr, out, N, K, whole, mix, steps, CERTAIN: tl.constexpr, MIX_BITS: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    APART: tl.constexpr = out.sums is None
    problem = tl.program_id(0).to(tl.int64)
    x_ptr += problem * N
    index_ptr, scale_ptr = out.indices + problem * K, out.scales + problem * K
    if y_ptr is not None:
        y_ptr += problem * N
    K, whole, mix = tl.cast(K, tl.int64), tl.cast(whole, tl.int64), tl.cast(mix, tl.int64)
    tops = tl.zeros([BLOCK], tl.float64)
    wrong = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, N, BLOCK):
        size = sizes_at(x_ptr, y_ptr, begin + tl.arange(0, BLOCK), N)
        wrong |= 1 - ((size >= 0) & (size < float("inf"))).to(tl.int32)
        tops = tl.maximum(tops, size)
    usable = tl.max(wrong, 0) == 0
    largest = tl.where(usable, tl.max(tops, 0), 0.0)
    units = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, N, BLOCK):
        units += units_at(x_ptr, y_ptr, begin + tl.arange(0, BLOCK), N, largest, whole)
    mean = tl.sum(units, 0) // N
    totals = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, N, BLOCK):
        totals += weights_at(x_ptr, y_ptr, begin + tl.arange(0, BLOCK), N, largest, whole, mean, mix, MIX_BITS)
    total = tl.sum(totals, 0)
    kept, left, rest = K * 0, K, total
    if CERTAIN:
        going = N > 0
        while going:
            counts, heavy = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
            for begin in range(0, N, BLOCK):
                i = begin + tl.arange(0, BLOCK)
                weights = weights_at(x_ptr, y_ptr, i, N, largest, whole, mean, mix, MIX_BITS)
                keep = (i < N) & (weights * left >= rest)
                counts += keep.to(tl.int64)
                heavy += tl.where(keep, weights, 0)
            count = tl.sum(counts, 0)
            going = count != kept
            kept, left, rest = count, K - count, total - tl.sum(heavy, 0)
    seed, stream = tl.load(seed_ptr), problem * K
    start = random_below(rest, seed, stream)
    certain_before, before = K * 0, K * 0
    for begin in range(0, N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        weights = weights_at(x_ptr, y_ptr, i, N, largest, whole, mean, mix, MIX_BITS)
        keep = (i < N) & (weights * left >= rest) & CERTAIN
        tail = tl.where(keep, 0, weights)
        sums = before + tl.cumsum(tail, 0)
        place = certain_before + tl.cumsum(keep.to(tl.int64), 0) - keep.to(tl.int64)
        chosen = keep
        if APART:
            points = points_before(left, rest, start, sums - tail)
            chosen = keep | (left * sums - start > points * rest)
            place += points
        else:
            tl.store(out.sums + problem * N + i, sums, mask=i < N)
        scale = tl.where(keep, 1.0, scales_of(left, rest, weights))
        chosen &= i < N
        tl.store(index_ptr + place, i, mask=chosen)
        tl.store(scale_ptr + place, tl.where(usable, scale, float("nan")), mask=chosen)
        certain_before += tl.sum(keep.to(tl.int64), 0)
        before += tl.sum(tail, 0)
    if not APART:
        tl.debug_barrier()
        for begin in range(0, left, BLOCK):
            t = begin + tl.arange(0, BLOCK)
            point = random_below(rest, seed, stream + t)
            first, last = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64) + (N - 1)
            for _ in range(steps):  # the first row whose running sum is above the point
                middle = (first + last) // 2
                above = tl.load(out.sums + problem * N + middle) > point
                last = tl.where(above, middle, last)
                first = tl.where(above, first, tl.minimum(middle + 1, last))
            row = first
            weights = weights_at(x_ptr, y_ptr, row, N, largest, whole, mean, mix, MIX_BITS)
            scale = tl.where(usable, scales_of(left, rest, weights), float("nan"))
            tl.store(index_ptr + kept + t, row.to(tl.int32), mask=t < left)
            tl.store(scale_ptr + kept + t, scale, mask=t < left)


@triton.jit
def wta_crs_gather_kernel(
    x_ptr, index_ptr, scale_ptr, out_ptr, R, K, D, batch_stride, row_stride, column_stride, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + place).to(tl.int64)
    inside = (index >= 0) & (index < R)  # else NaN, and no access
    x_ptr += place // K * batch_stride + tl.where(inside, index, 0) * row_stride
    x = tl.load(x_ptr + j * column_stride, mask=(j < D) & inside, other=float("nan")).to(tl.float32)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + place)
    tl.store(out_ptr + place * D + j, x.to(out_ptr.dtype.element_ty), mask=j < D)


def block_of(size: int) -> dict[str, int]:
    block = min(2048, max(32, triton.next_power_of_2(size)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def wta_crs_norms(x):
    check_logits("wta_crs_norms", x, "x")
    B, R, D = x.shape
    out = x.new_empty(B, R, dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(x):
            wta_crs_norms_kernel[(B * R,)](x, out, R, D, *x.stride(), **block_of(D))
    return out


def wta_crs_sample(x_norms, norms, seed, *, k, method="systematic", mix=0.05):
    B, N = x_norms.shape
    bits = min(30, 60 - N.bit_length() - k.bit_length())
    indices = x_norms.new_empty(B, k, dtype=torch.int32)
    scales = x_norms.new_empty(B, k)
    sums = None if method == "systematic" else x_norms.new_empty(B, N, dtype=torch.int64)
    if B:
        with torch.cuda.device_of(x_norms):
            wta_crs_sample_kernel[(B,)](
                x_norms, norms, seed, Samples(indices, scales, sums), N, k, 1 << bits, int(mix * 2**MIX_BITS),
                N.bit_length(), CERTAIN=method != "crs", MIX_BITS=MIX_BITS, BLOCK=SAMPLE_BLOCK, num_warps=8
            )  # fmt: skip
    return indices, scales


def wta_crs_gather(x, indices, scales=None):
    check_logits("wta_crs_gather", x, "x")
    (B, R, D), K = x.shape, indices.shape[1]
    out = x.new_empty(B, K, D)
    if out.numel():
        blocks = block_of(D)
        with torch.cuda.device_of(x):
            wta_crs_gather_kernel[(B * K, triton.cdiv(D, blocks["BLOCK"]))](
                x, indices, scales, out, R, K, D, *x.stride(), **blocks
            )
    return out


OPS = {"wta_crs_norms": wta_crs_norms, "wta_crs_sample": wta_crs_sample, "wta_crs_gather": wta_crs_gather}
