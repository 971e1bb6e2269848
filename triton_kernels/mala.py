"""Magnitude-aware linear attention; csrc/mala/mala.h has the formulas.

Tokens go in chunks of BLOCK_N, values in blocks of BLOCK_V. The sums S (D, Dv), Z (D), U (Dv) of shares of the tokens
are kept in float32 and added by PyTorch: all of them where every query sees every key, those of earlier chunks where it
is causal. The feature beside d in its rotated pair is d ^ 1: it is loaded again rather than shuffled.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .rows import to_tf32

SHARES = 16  # of the tokens, at most, whose sums are kept apart


class Tokens(NamedTuple):
    """(batch, heads, tokens, width) with unit columns, and its strides."""

    ptr: torch.Tensor
    batch: int
    head: int
    token: int


class Rotation(NamedTuple):
    cos: torch.Tensor | None
    sin: torch.Tensor | None


class Sums(NamedTuple):
    s: torch.Tensor
    z: torch.Tensor
    u: torch.Tensor


class Attention(NamedTuple):
    """What a query sees: `group` query heads share a key head, and where sequences begin if they are packed."""

    q: Tokens
    k: Tokens
    v: Tokens
    rotation: Rotation
    q_bounds: torch.Tensor | None
    k_bounds: torch.Tensor | None
    key_heads: int
    group: int
    chunks: int
    scale: float
    eps: float


class Lengths(NamedTuple):
    """What no kernel is compiled for; `seen` keys came before the first."""

    queries: int
    keys: int
    seen: int = 0


class Tile(NamedTuple):
    D: int
    DV: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_V: int
    PRECISION: str
    CAUSAL: bool


@triton.jit
def phi(x):
    """elu(x) + 1 without its cancellation, 0 where nothing was loaded (-inf)."""
    return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product_of_all_bits(a, b, acc, PRECISION: tl.constexpr):
    """Of an a that was stored in 16 bits where PRECISION is tf32, and of all bits of b."""
    if PRECISION == "tf32":
        acc = product(a, b - to_tf32(b), acc, PRECISION)
        b = to_tf32(b)
    return product(a, b, acc, PRECISION)


@triton.jit
def other_of_pairs(x):
    """x with the columns 2i and 2i + 1 in each other's place."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(odd, even), [x.shape[0], x.shape[1]])


@triton.jit
def sequence(bounds_ptr, index, tokens):
    """Its batch, where it begins among the packed tokens, and its length; unpacked, all have the same."""
    if bounds_ptr is None:
        batch = index
        begin = index * 0
        length = begin + tokens
    else:
        batch = index * 0
        begin = tl.minimum(tl.maximum(tl.load(bounds_ptr + index), 0), tokens)
        length = tl.minimum(tl.maximum(tl.load(bounds_ptr + index + 1), begin), tokens) - begin
    return batch, begin, length


@triton.jit
def rows_of(tokens, batch, head, begin):
    """Where the tokens of a head of a sequence begin."""
    return tokens.ptr + batch * tokens.batch + head * tokens.head + begin * tokens.token


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
def store_tokens(rows, stride, n, inside, cols, width, values):
    mask = inside[:, None] & (cols < width)[None, :]
    tl.store(place(rows, stride, n, cols), values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def angles(rotation, n, inside, d, D):
    """cos, and sin with the sign that the pair's other feature enters with; (BLOCK_N, BLOCK_D)."""
    at = n[:, None] * (D // 2) + (d // 2)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    sign = tl.where(d % 2 == 0, -1.0, 1.0)[None, :]
    cos = tl.load(rotation.cos + at, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(rotation.sin + at, mask=mask, other=0.0).to(tl.float32) * sign


@triton.jit
def load_features(rows, stride, rotation, n, inside, d, D):
    """f and R f."""
    f = phi(load_tokens(rows, stride, n, inside, d, D, float("-inf")))
    a = f
    if rotation.cos is not None:
        cos, sin = angles(rotation, n, inside, d, D)
        a = f * cos + other_of_pairs(f) * sin
    return f, a


@triton.jit
def load_sums(ptr, d, v, D, DV):
    """(BLOCK_D, BLOCK_V) of S."""
    return tl.load(ptr + d[:, None] * DV + v[None, :], mask=(d < D)[:, None] & (v < DV)[None, :], other=0.0)


@triton.jit
def load_coefficients(coefficient_ptr, stride, n, inside):
    """How a query enters dS, dZ and dU."""
    c0 = tl.load(coefficient_ptr + n, mask=inside, other=0.0)
    c1 = tl.load(coefficient_ptr + stride + n, mask=inside, other=0.0)
    return c0, c1, tl.load(coefficient_ptr + 2 * stride + n, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens", "per_share", "shares"])
def mala_sum_kernel(
    x, y, coefficient_ptr, coefficient_stride, rotation, bounds_ptr, sums, tokens, heads, per_share, shares,
    tile: tl.constexpr
):  # fmt: skip
    """S = sum c0 R phi(x) y^T, Z = sum c1 phi(x), U = sum c2 y over a share of the tokens; c is 1 if not given."""
    D: tl.constexpr = tile.D
    DV: tl.constexpr = tile.DV
    PRECISION: tl.constexpr = tile.PRECISION
    BLOCK_D: tl.constexpr = tile.BLOCK_D
    BLOCK_V: tl.constexpr = tile.BLOCK_V
    share, line = tl.program_id(0), tl.program_id(2).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    index, head = line // heads, line % heads
    batch, begin, length = sequence(bounds_ptr, index, tokens)
    x_rows, y_rows = rows_of(x, batch, head, begin), rows_of(y, batch, head, begin)
    coefficients = coefficient_ptr
    if coefficient_ptr is not None:
        coefficients = coefficient_ptr + (batch * heads + head) * tokens + begin
    s = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_D], tl.float32)
    u = tl.zeros([BLOCK_V], tl.float32)
    for chunk in range(share * per_share, (share + 1) * per_share):
        n = chunk * tile.BLOCK_N + tl.arange(0, tile.BLOCK_N)
        inside = n < length
        f, a = load_features(x_rows, x.token, rotation, n, inside, d, D)
        y_values = load_tokens(y_rows, y.token, n, inside, v, DV, 0.0)
        weighted = y_values
        if coefficient_ptr is not None:
            c0, c1, c2 = load_coefficients(coefficients, coefficient_stride, n, inside)
            a = a * c0[:, None]
            f = f * c1[:, None]
            weighted = y_values * c2[:, None]
        s = product(tl.trans(a), y_values, s, PRECISION)
        z += tl.sum(f, axis=0)
        u += tl.sum(weighted, axis=0)
    at = line * shares + share
    tl.store(sums.s + at * D * DV + d[:, None] * DV + v[None, :], s, mask=(d < D)[:, None] & (v < DV)[None, :])
    tl.store(sums.u + at * DV + v, u, mask=v < DV)
    if tl.program_id(1) == 0:
        tl.store(sums.z + at * D + d, z, mask=d < D)


@triton.jit(do_not_specialize=["lengths"])
def mala_forward_kernel(given, sums, out, lengths, tile: tl.constexpr):
    """A chunk of queries and a block of values of the output. Causal, the sums are those before the chunk."""
    D: tl.constexpr = tile.D
    DV: tl.constexpr = tile.DV
    PRECISION: tl.constexpr = tile.PRECISION
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_V: tl.constexpr = tile.BLOCK_V
    chunk, line = tl.program_id(0), tl.program_id(2).to(tl.int64)
    heads = given.key_heads * given.group
    index, head = line // heads, line % heads
    batch, begin, length = sequence(given.q_bounds, index, lengths.queries)
    if chunk * BLOCK_N >= length:
        return
    _, _, k_length = sequence(given.k_bounds, index, lengths.keys)
    d = tl.arange(0, tile.BLOCK_D)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < length
    q_rows = rows_of(given.q, batch, head, begin)
    f, a = load_features(q_rows, given.q.token, given.rotation, n, inside, d, D)
    key_head = head // given.group
    at = index * given.key_heads + key_head
    if tile.CAUSAL:
        at = at * given.chunks + chunk
    y = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    y = product(a, load_sums(sums.s + at * D * DV, d, v, D, DV), y, PRECISION)
    key_sums = tl.load(sums.z + at * D + d, mask=d < D, other=0.0)[None, :]
    value_sums = tl.load(sums.u + at * DV + v, mask=v < DV, other=0.0)[None, :]
    count = tl.maximum(k_length, 1).to(tl.float32)
    if tile.CAUSAL:
        k_rows = rows_of(given.k, batch, key_head, begin)
        g, b = load_features(k_rows, given.k.token, given.rotation, n, inside, d, D)
        values = load_tokens(rows_of(given.v, batch, key_head, begin), given.v.token, n, inside, v, DV, 0.0)
        scores = product(a, tl.trans(b), tl.zeros([BLOCK_N, BLOCK_N], tl.float32), PRECISION)
        y = product(tl.where(n[:, None] >= n[None, :], scores, 0.0), values, y, PRECISION)
        key_sums = key_sums + tl.cumsum(g, axis=0)
        value_sums = value_sums + tl.cumsum(values, axis=0)
        count = (lengths.seen + n + 1).to(tl.float32)
    share = given.scale / count
    z = share * tl.sum(f * key_sums, axis=1)
    factor = (1.0 + 1.0 / (z + given.eps)) * share
    o = factor[:, None] * y - (z / count)[:, None] * value_sums
    store_tokens(rows_of(out, batch, head, begin), out.token, n, inside, v, DV, o)


def tokens_of(tensor: torch.Tensor) -> Tokens:
    return Tokens(tensor, *tensor.stride()[:3])


class Plan:
    """Sizes and launch constants of one call."""

    def __init__(self, q, k, v, q_bounds, causal):
        self.batch, self.heads, self.queries, D = q.shape
        self.key_heads, self.keys, DV = k.shape[1], k.shape[2], v.shape[3]
        self.sequences = self.batch if q_bounds is None else len(q_bounds) - 1
        self.group = self.heads // self.key_heads
        block_d = max(16, triton.next_power_of_2(D))
        # 16-bit inputs are multiplied in tf32 by the tensor cores, which rounds phi and the sums to 10 bits, as many as
        # float16 has; float32 ones keep all theirs and need small tiles.
        precise = q.dtype == torch.float32
        block_n, block_v = (16, 16) if precise or causal else (32, 16) if block_d > 64 else (64, 64)
        block_v = min(block_v, max(16, triton.next_power_of_2(DV)))
        self.tile = Tile(D, DV, block_n, block_d, block_v, "ieee" if precise else "tf32", causal)
        self.constants = {"tile": self.tile, "num_warps": 8, "num_stages": 1}

    def given(self, q, k, v, cos, sin, q_bounds, k_bounds, *, scale, eps):
        tokens = (tokens_of(t) for t in (q, k, v))
        chunks = self.chunks(self.queries)
        return Attention(
            *tokens, Rotation(cos, sin), q_bounds, k_bounds, self.key_heads, self.group, chunks, scale, eps
        )

    def chunks(self, tokens):
        return max(1, triton.cdiv(tokens, self.tile.BLOCK_N))

    def value_blocks(self):
        return triton.cdiv(self.tile.DV, self.tile.BLOCK_V)

    def sums(self, x, y, coefficients, cos, sin, bounds):
        """S, Z and U of each share of the tokens of every head: a share is a chunk when causal."""
        heads, tokens = x.shape[1], x.shape[2]
        chunks = self.chunks(tokens)
        per_share = 1 if self.tile.CAUSAL else max(1, triton.cdiv(chunks, SHARES))
        shares = triton.cdiv(chunks, per_share)
        sizes = ((self.tile.D, self.tile.DV), (self.tile.D,), (self.tile.DV,))
        sums = Sums(*(x.new_empty(self.sequences, heads, shares, *size, dtype=torch.float32) for size in sizes))
        with torch.cuda.device_of(x):
            mala_sum_kernel[(shares, self.value_blocks(), self.sequences * heads)](
                tokens_of(x), tokens_of(y), coefficients, 0 if coefficients is None else coefficients.stride(0),
                Rotation(cos, sin), bounds, sums, tokens, heads, per_share, shares,
                **self.constants | {"tile": self.tile._replace(CAUSAL=False)},
            )  # fmt: skip
        return sums


def before(parts, state):
    """The sums of all shares before each, those of the state included; and of all."""
    running = [part.cumsum(2) for part in parts]
    earlier = [total - part for total, part in zip(running, parts, strict=True)]
    last = [total[:, :, -1] for total in running]
    if state is not None:
        earlier = [e + s.unsqueeze(2) for e, s in zip(earlier, state, strict=True)]
        last = [e + s for e, s in zip(last, state, strict=True)]
    return Sums(*(e.contiguous() for e in earlier)), Sums(*(e.contiguous() for e in last))


def mala(
    q, k, v, cos=None, sin=None, q_bounds=None, k_bounds=None, s=None, z=None, u=None, *, causal, scale, eps, seen=0
):  # fmt: skip
    """(out, S, Z, U)"""
    plan = Plan(q, k, v, q_bounds, causal)
    given = plan.given(q, k, v, cos, sin, q_bounds, k_bounds, scale=scale, eps=eps)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    parts = plan.sums(k, v, None, cos, sin, k_bounds)
    if causal:
        sums, last = before(parts, None if s is None else (s, z, u))
    else:
        sums = last = Sums(*(part.sum(2) for part in parts))
    if out.numel():
        with torch.cuda.device_of(q):
            mala_forward_kernel[(given.chunks, plan.value_blocks(), plan.sequences * plan.heads)](
                given, sums, tokens_of(out), Lengths(plan.queries, plan.keys, seen), **plan.constants
            )
    return out, *last


OPS = {"mala": mala}
