"""The k largest of a row and the threshold at which they sum to a total.

csrc/simplex_topk/simplex_topk.h has the formulas. A program has one row and walks along it in blocks, once for every
count: by bisection over the bits of the numbers, whose order is that of integers, the k-th largest is found in at most
32 passes.
"""

import torch
import triton
import triton.language as tl

from .rows import check_float32

MOST = 2048  # numbers of a block


@triton.jit
def load_scores(x_ptr, minus_ptr, i, size):
    """x - minus, or x; -inf beyond the last. Adding 0 makes -0 a 0."""
    inside = i < size
    s = tl.load(x_ptr + i, mask=inside, other=float("-inf"))
    if minus_ptr is not None:
        s -= tl.load(minus_ptr + i, mask=inside, other=0.0)
    return s + 0.0


@triton.jit
def ordered(bits):
    """From the bits of a float32 to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(s):
    return ordered(s.to(tl.int32, bitcast=True))


@triton.jit
def count_above(x_ptr, minus_ptr, size, key, BLOCK: tl.constexpr):
    count = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        s = load_scores(x_ptr, minus_ptr, begin + tl.arange(0, BLOCK), size)
        count += (key_of(s) > key).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def keeps(s, i, level, equal, last):
    return (s > level) | ((s == equal) & (i <= last))


@triton.jit
def find_cut(x_ptr, minus_ptr, size, k, total, tau, FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """(level, equal, last, top, below): entries s > level, or == equal up to index last, count as s - top - below.

    FIXED gives the threshold tau instead of the total. A row with NaN or without a finite largest has top = NaN.
    """
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        s = load_scores(x_ptr, minus_ptr, begin + tl.arange(0, BLOCK), size)
        highest = tl.maximum(highest, s)
        wrong |= (s != s).to(tl.int32)
    top = tl.max(highest, 0)
    numbers = (tl.max(wrong, 0) == 0) & (top < float("inf")) & (top > float("-inf"))
    top = tl.where(numbers, top, float("nan"))
    # A little below where the largest would have the total alone: what is too low gets nothing in the end.
    level = tau if FIXED else top - total - tl.abs(top) * 1.1920929e-7
    equal = tl.full([], float("nan"), tl.float32)
    last = tl.full([], -1, tl.int32)
    low, high = key_of(level).to(tl.int64), key_of(top).to(tl.int64)
    if numbers & (count_above(x_ptr, minus_ptr, size, low.to(tl.int32), BLOCK) > k):
        while high - low > 1:  # the k-th largest is in (low, high]
            middle = (low + high) >> 1
            enough = count_above(x_ptr, minus_ptr, size, middle.to(tl.int32), BLOCK) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        kth = high.to(tl.int32)
        quota = k - count_above(x_ptr, minus_ptr, size, kth, BLOCK)
        level = ordered(kth).to(tl.float32, bitcast=True)
        equal = level
        seen = tl.full([], 0, tl.int32)
        for begin in range(0, size, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            same = (load_scores(x_ptr, minus_ptr, i, size) == equal).to(tl.int32)
            rank = seen + tl.cumsum(same, 0)
            last = tl.maximum(last, tl.max(tl.where((same != 0) & (rank <= quota), i, -1), 0))
            seen += tl.sum(same, 0)
    below = tau - top
    # Newton's steps from below, where all that is kept counts. Fewer do at every step; where rounding takes one back,
    # one has arrived.
    if not FIXED:
        below = tl.full([], float("-inf"), tl.float32)
        active, going = tl.full([], 0, tl.int32), size > 0
        part = 1.0 / k  # sums stay in the range of the type whatever the scores are
        while going:
            sums, counts = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
            for begin in range(0, size, BLOCK):
                i = begin + tl.arange(0, BLOCK)
                s = load_scores(x_ptr, minus_ptr, i, size)
                counted = keeps(s, i, level, equal, last) & (s - top > below)
                sums += tl.where(counted, (s - top) * part, 0.0)
                counts += counted.to(tl.int32)
            count = tl.sum(counts, 0)
            going = (count > 0) & ((active == 0) | (count < active))
            active = count
            below = tl.where(going, (tl.sum(sums, 0) - total * part) / (count * part), below)
    return level, equal, last, top, below


@triton.jit
def simplex_topk_kernel(x_ptr, p_ptr, N, k, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * N
    level, equal, last, top, below = find_cut(x_ptr + row, None, N, k, scale, scale, False, BLOCK)
    for begin in range(0, N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        s = load_scores(x_ptr + row, None, i, N)
        p = tl.where(keeps(s, i, level, equal, last), tl.maximum(s - top - below, 0.0), 0.0)
        tl.store(p_ptr + row + i, tl.where(top == top, p, float("nan")), mask=i < N)


@triton.jit
def simplex_topk_backward_kernel(grad_ptr, p_ptr, out_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * N
    sums, counts = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        support = tl.load(p_ptr + row + i, mask=i < N, other=0.0) > 0
        sums += tl.where(support, tl.load(grad_ptr + row + i, mask=i < N, other=0.0), 0.0)
        counts += support.to(tl.float32)
    mean = tl.sum(sums, 0) / tl.sum(counts, 0)
    for begin in range(0, N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        support = tl.load(p_ptr + row + i, mask=i < N, other=0.0) > 0
        grad = tl.load(grad_ptr + row + i, mask=i < N, other=0.0)
        tl.store(out_ptr + row + i, tl.where(support, grad - mean, 0.0), mask=i < N)


def block_of(size: int) -> dict[str, int]:
    block = min(MOST, max(32, triton.next_power_of_2(size)))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def simplex_topk(x, *, k, scale=1.0):
    check_float32("simplex_topk", x)
    p = torch.empty_like(x)
    N = x.shape[-1]
    if x.numel():
        with torch.cuda.device_of(x):
            simplex_topk_kernel[(x.numel() // N,)](x, p, N, k, scale, **block_of(N))
    return p


def simplex_topk_backward(grad, p):
    out = torch.empty_like(grad)
    N = p.shape[-1]
    if p.numel():
        with torch.cuda.device_of(p):
            simplex_topk_backward_kernel[(p.numel() // N,)](grad, p, out, N, **block_of(N))
    return out


OPS = {"simplex_topk": simplex_topk, "simplex_topk_backward": simplex_topk_backward}
