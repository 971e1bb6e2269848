"""Magnitude-aware linear attention; csrc/mala/mala.h has the formulas.

Tokens go in chunks of BLOCK_N, values in blocks of BLOCK_V. The sums S (D, Dv), Z (D), U (Dv) of shares of the tokens
are kept in float32 and added by PyTorch: all of them where every query sees every key, those of earlier chunks where it
is causal. The feature beside d in its rotated pair is d ^ 1: it is loaded again rather than shuffled.
"""

import torch
import triton
import triton.language as tl

SHARES = 16  # of the tokens, at most, whose sums are kept apart


@triton.jit
def phi(x):
    """elu(x) + 1 without its cancellation, 0 where nothing was loaded (-inf)."""
    return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sequence(bounds_ptr, index, tokens):
    """Where a sequence begins among the packed tokens, and its length; unpacked, all have the same."""
    if bounds_ptr is None:
        begin = index * 0
        length = begin + tokens
    else:
        begin = tl.minimum(tl.maximum(tl.load(bounds_ptr + index), 0), tokens)
        length = tl.minimum(tl.maximum(tl.load(bounds_ptr + index + 1), begin), tokens) - begin
    return begin, length


@triton.jit
def place(rows, stride, n, cols):
    return rows + n.to(tl.int64)[:, None] * stride + cols[None, :]


@triton.jit
def load_tokens(rows, stride, n, inside, cols, width, other):
    """(BLOCK_N, cols) of a matrix with unit columns, in float32."""
    return tl.load(place(rows, stride, n, cols), mask=inside[:, None] & (cols < width)[None, :], other=other).to(
        tl.float32
    )


@triton.jit
def angles(cos_ptr, sin_ptr, n, inside, d, D):
    """cos, and sin with the sign that the pair's other feature enters with; (BLOCK_N, BLOCK_D)."""
    at = n[:, None] * (D // 2) + (d // 2)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    sign = tl.where(d % 2 == 0, -1.0, 1.0)[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32) * sign


@triton.jit
def load_features(rows, stride, cos_ptr, sin_ptr, n, inside, d, D):
    """f, R f, and R f at the other feature of each pair."""
    f = phi(load_tokens(rows, stride, n, inside, d, D, float("-inf")))
    a = f
    a_other = f
    if cos_ptr is not None:
        other = phi(load_tokens(rows, stride, n, inside, d ^ 1, D, float("-inf")))
        cos, sin = angles(cos_ptr, sin_ptr, n, inside, d, D)
        a = f * cos + other * sin
        a_other = other * cos - f * sin
    return f, a, a_other


@triton.jit
def load_sums(ptr, d, v, D, DV):
    """(BLOCK_D, BLOCK_V) of S."""
    return tl.load(ptr + d[:, None] * DV + v[None, :], mask=(d < D)[:, None] & (v < DV)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens", "per_share", "shares"])
def mala_sum_kernel(
    x_ptr,
    y_ptr,
    coefficient_ptr,
    cos_ptr,
    sin_ptr,
    bounds_ptr,
    s_ptr,
    z_ptr,
    u_ptr,
    tokens,
    heads,
    per_share,
    shares,
    coefficient_stride,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S = sum c0 R phi(x) y^T, Z = sum c1 phi(x), U = sum c2 y over a share of the tokens; c is 1 if not given."""
    share, line = tl.program_id(0), tl.program_id(2).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    index, head = line // heads, line % heads
    begin, length = sequence(bounds_ptr, index, tokens)
    batch = index if bounds_ptr is None else index * 0
    x_rows = x_ptr + batch * x_batch + head * x_head + begin * x_token
    y_rows = y_ptr + batch * y_batch + head * y_head + begin * y_token
    coefficients = coefficient_ptr
    if coefficient_ptr is not None:
        coefficients = coefficient_ptr + (batch * heads + head) * tokens + begin
    s = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_D], tl.float32)
    u = tl.zeros([BLOCK_V], tl.float32)
    for chunk in range(share * per_share, (share + 1) * per_share):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < length
        f, a, _ = load_features(x_rows, x_token, cos_ptr, sin_ptr, n, inside, d, D)
        y = load_tokens(y_rows, y_token, n, inside, v, DV, 0.0)
        of_y = y
        if coefficient_ptr is not None:
            c0 = tl.load(coefficients + n, mask=inside, other=0.0)
            c1 = tl.load(coefficients + coefficient_stride + n, mask=inside, other=0.0)
            c2 = tl.load(coefficients + 2 * coefficient_stride + n, mask=inside, other=0.0)
            a = a * c0[:, None]
            f = f * c1[:, None]
            of_y = y * c2[:, None]
        s = product(tl.trans(a), y, s, PRECISION)
        z += tl.sum(f, axis=0)
        u += tl.sum(of_y, axis=0)
    at = line * shares + share
    tl.store(s_ptr + at * D * DV + d[:, None] * DV + v[None, :], s, mask=(d < D)[:, None] & (v < DV)[None, :])
    tl.store(u_ptr + at * DV + v, u, mask=v < DV)
    if tl.program_id(1) == 0:
        tl.store(z_ptr + at * D + d, z, mask=d < D)


@triton.jit(do_not_specialize=["queries", "keys", "seen"])
def mala_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_bounds_ptr,
    k_bounds_ptr,
    s_ptr,
    z_ptr,
    u_ptr,
    out_ptr,
    queries,
    keys,
    heads,
    group,
    chunks,
    seen,
    scale,
    eps,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of queries and a block of values of the output. Causal, the sums are those before the chunk."""
    chunk, line = tl.program_id(0), tl.program_id(2).to(tl.int64)
    index, head = line // heads, line % heads
    begin, length = sequence(q_bounds_ptr, index, queries)
    if chunk * BLOCK_N >= length:
        return
    _, k_length = sequence(k_bounds_ptr, index, keys)
    batch = index if q_bounds_ptr is None else index * 0
    d = tl.arange(0, BLOCK_D)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < length
    q_rows = q_ptr + batch * q_batch + head * q_head + begin * q_token
    f, a, _ = load_features(q_rows, q_token, cos_ptr, sin_ptr, n, inside, d, D)
    at = index * (heads // group) + head // group
    if CAUSAL:
        at = at * chunks + chunk
    y = product(a, load_sums(s_ptr + at * D * DV, d, v, D, DV), tl.zeros([BLOCK_N, BLOCK_V], tl.float32), PRECISION)
    of_keys = tl.load(z_ptr + at * D + d, mask=d < D, other=0.0)[None, :]
    of_values = tl.load(u_ptr + at * DV + v, mask=v < DV, other=0.0)[None, :]
    count = tl.maximum(k_length, 1).to(tl.float32)
    if CAUSAL:
        k_rows = k_ptr + batch * k_batch + head // group * k_head + begin * k_token
        v_rows = v_ptr + batch * v_batch + head // group * v_head + begin * v_token
        g, b, _ = load_features(k_rows, k_token, cos_ptr, sin_ptr, n, inside, d, D)
        values = load_tokens(v_rows, v_token, n, inside, v, DV, 0.0)
        pairs = product(a, tl.trans(b), tl.zeros([BLOCK_N, BLOCK_N], tl.float32), PRECISION)
        y = product(tl.where(n[:, None] >= n[None, :], pairs, 0.0), values, y, PRECISION)
        of_keys = of_keys + tl.cumsum(g, axis=0)
        of_values = of_values + tl.cumsum(values, axis=0)
        count = (seen + n + 1).to(tl.float32)
    share = scale / count
    z = share * tl.sum(f * of_keys, axis=1)
    factor = (1.0 + 1.0 / (z + eps)) * share
    out = factor[:, None] * y - (z / count)[:, None] * of_values
    out_rows = out_ptr + batch * out_batch + head * out_head + begin * out_token
    tl.store(
        place(out_rows, out_token, n, v), out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (v < DV)[None, :]
    )


class Plan:
    """Sizes and launch constants of one call."""

    def __init__(self, q, k, v, q_bounds, causal):
        self.batch, self.heads, self.queries, self.D = q.shape
        self.key_heads, self.keys, self.DV = k.shape[1], k.shape[2], v.shape[3]
        self.sequences = self.batch if q_bounds is None else len(q_bounds) - 1
        self.group = self.heads // self.key_heads
        self.causal = causal
        self.block_d = max(16, triton.next_power_of_2(self.D))
        # 16-bit inputs are multiplied in tf32 by the tensor cores, which rounds phi and the sums to 10 bits, as many as
        # float16 has; float32 ones keep all theirs and need small tiles.
        precise = q.dtype == torch.float32
        wide = self.block_d > 64
        self.block_n, block_v = (16, 16) if precise or causal else (32, 16) if wide else (64, 64)
        self.block_v = min(block_v, max(16, triton.next_power_of_2(self.DV)))
        self.constants = {
            "D": self.D,
            "DV": self.DV,
            "BLOCK_N": self.block_n,
            "BLOCK_D": self.block_d,
            "BLOCK_V": self.block_v,
            "PRECISION": "ieee" if precise else "tf32",
            "num_warps": 8,
            "num_stages": 1,
        }

    def chunks(self, tokens):
        return max(1, triton.cdiv(tokens, self.block_n))

    def new_sums(self, like, heads, shares):
        lines = (self.sequences, heads, shares)
        sizes = ((self.D, self.DV), (self.D,), (self.DV,))
        return [torch.empty((*lines, *size), dtype=torch.float32, device=like.device) for size in sizes]

    def sums(self, x, y, coefficients, cos, sin, bounds, causal):
        """S, Z and U of each share of the tokens of every head: a share is a chunk when causal."""
        heads, tokens = x.shape[1], x.shape[2]
        chunks = self.chunks(tokens)
        per_share = 1 if causal else max(1, triton.cdiv(chunks, SHARES))
        shares = triton.cdiv(chunks, per_share)
        found = self.new_sums(x, heads, shares)
        with torch.cuda.device_of(x):
            mala_sum_kernel[(shares, triton.cdiv(self.DV, self.block_v), self.sequences * heads)](
                x, y, coefficients, cos, sin, bounds, *found, tokens, heads, per_share, shares,
                0 if coefficients is None else coefficients.stride(0), *x.stride()[:3], *y.stride()[:3],
                **self.constants,
            )  # fmt: skip
        return found


def before(parts, state):
    """The sums of all shares before each, those of the state included; and of all."""
    running = [part.cumsum(2) for part in parts]
    earlier = [total - part for total, part in zip(running, parts, strict=True)]
    last = [total[:, :, -1] for total in running]
    if state is not None:
        earlier = [e + s.unsqueeze(2) for e, s in zip(earlier, state, strict=True)]
        last = [e + s for e, s in zip(last, state, strict=True)]
    return [e.contiguous() for e in earlier], [e.contiguous() for e in last]


def mala(
    q, k, v, cos=None, sin=None, q_bounds=None, k_bounds=None, s=None, z=None, u=None, *, causal, scale, eps, seen=0
):  # fmt: skip
    """(out, S, Z, U)"""
    plan = Plan(q, k, v, q_bounds, causal)
    out = torch.empty((*q.shape[:3], plan.DV), dtype=q.dtype, device=q.device)
    parts = plan.sums(k, v, None, cos, sin, k_bounds, causal)
    chunks = plan.chunks(plan.queries)
    if causal:
        sums, last = before(parts, None if s is None else (s, z, u))
    else:
        sums = last = [part.sum(2) for part in parts]
    if out.numel():
        with torch.cuda.device_of(q):
            mala_forward_kernel[(chunks, triton.cdiv(plan.DV, plan.block_v), plan.sequences * plan.heads)](
                q, k, v, cos, sin, q_bounds, k_bounds, *sums, out, plan.queries, plan.keys, plan.heads, plan.group,
                chunks, seen, scale, eps, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                CAUSAL=causal, **plan.constants,
            )  # fmt: skip
    return out, *last


OPS = {"mala": mala}
