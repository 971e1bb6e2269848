"""The gradients of magnitude-aware linear attention: of queries, chunk by chunk, which leaves three numbers a query; of
these the sums over queries; and of the sums those of keys and values.
"""

import torch
import triton
import triton.language as tl

from .mala import (
    Lengths,
    Plan,
    Sums,
    angles,
    before,
    load_coefficients,
    load_features,
    load_sums,
    load_tokens,
    other_of_pairs,
    product,
    product_of_all_bits,
    rows_of,
    sequence,
    store_tokens,
    tokens_of,
)


@triton.jit(do_not_specialize=["lengths"])
def mala_query_gradient_kernel(
    grad, given, sums, grad_q, coefficient_ptr, coefficient_stride, lengths, tile: tl.constexpr
):
    """dq of a chunk, and the coefficients with which its tokens enter dS, dZ and dU."""
    D: tl.constexpr = tile.D
    DV: tl.constexpr = tile.DV
    PRECISION: tl.constexpr = tile.PRECISION
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_D: tl.constexpr = tile.BLOCK_D
    ROTATES: tl.constexpr = given.rotation.cos is not None
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads = given.key_heads * given.group
    index, head = line // heads, line % heads
    batch, begin, length = sequence(given.q_bounds, index, lengths.queries)
    if chunk * BLOCK_N >= length:
        return
    _, _, k_length = sequence(given.k_bounds, index, lengths.keys)
    d = tl.arange(0, BLOCK_D)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < length
    q_rows = rows_of(given.q, batch, head, begin)
    f, a = load_features(q_rows, given.q.token, given.rotation, n, inside, d, D)
    key_head = head // given.group
    at = index * given.key_heads + key_head
    if tile.CAUSAL:
        at = at * given.chunks + chunk
    key_sums = tl.load(sums.z + at * D + d, mask=d < D, other=0.0)[None, :]
    count = tl.maximum(k_length, 1).to(tl.float32)
    grad_rows = rows_of(grad, batch, head, begin)
    v_rows = rows_of(given.v, batch, key_head, begin)
    w = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # S do
    mean = tl.zeros([BLOCK_N], tl.float32)  # do . U
    scores = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)  # do . v
    for start in range(0, DV, tile.BLOCK_V):
        v = start + tl.arange(0, tile.BLOCK_V)
        d_out = load_tokens(grad_rows, grad.token, n, inside, v, DV, 0.0)
        # Of values that are alike the terms of dq cancel: S has more bits than they.
        w = product_of_all_bits(d_out, tl.trans(load_sums(sums.s + at * D * DV, d, v, D, DV)), w, PRECISION)
        value_sums = tl.load(sums.u + at * DV + v, mask=v < DV, other=0.0)[None, :]
        if tile.CAUSAL:
            values = load_tokens(v_rows, given.v.token, n, inside, v, DV, 0.0)
            scores = product(d_out, tl.trans(values), scores, PRECISION)
            value_sums = value_sums + tl.cumsum(values, axis=0)
        mean += tl.sum(d_out * value_sums, axis=1)
    if tile.CAUSAL:
        k_rows = rows_of(given.k, batch, key_head, begin)
        g, b = load_features(k_rows, given.k.token, given.rotation, n, inside, d, D)
        scores = tl.where(n[:, None] >= n[None, :], scores, 0.0)
        w = product(scores, b, w, PRECISION)
        key_sums = key_sums + tl.cumsum(g, axis=0)
        count = (lengths.seen + n + 1).to(tl.float32)
    share = given.scale / count
    z = share * tl.sum(f * key_sums, axis=1)
    inverse = 1.0 / (z + given.eps)
    zeta = -share * tl.sum(a * w, axis=1) * inverse * inverse - mean / count
    beta = 1.0 + inverse
    if ROTATES:
        cos, sin = angles(given.rotation, n, inside, d, D)
        w = w * cos - other_of_pairs(w) * sin
    df = (share * zeta)[:, None] * key_sums + (share * beta)[:, None] * w
    store_tokens(rows_of(grad_q, batch, head, begin), grad_q.token, n, inside, d, D, df * tl.minimum(f, 1.0))
    coefficients = coefficient_ptr + (batch * heads + head) * lengths.queries + begin + n
    tl.store(coefficients, share * beta, mask=inside)
    tl.store(coefficients + coefficient_stride, share * zeta, mask=inside)
    tl.store(coefficients + 2 * coefficient_stride, -z / count, mask=inside)


@triton.jit(do_not_specialize=["lengths"])
def mala_key_gradient_kernel(
    grad, given, sums, coefficient_ptr, coefficient_stride, grad_k, grad_v, lengths, tile: tl.constexpr
):
    """dk and dv of a chunk from dS, dZ, dU: of all queries, or causal of those after the chunk and of every head."""
    D: tl.constexpr = tile.D
    DV: tl.constexpr = tile.DV
    PRECISION: tl.constexpr = tile.PRECISION
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_D: tl.constexpr = tile.BLOCK_D
    BLOCK_V: tl.constexpr = tile.BLOCK_V
    ROTATES: tl.constexpr = given.rotation.cos is not None
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index, key_head = line // given.key_heads, line % given.key_heads
    batch, begin, length = sequence(given.k_bounds, index, lengths.keys)
    if chunk * BLOCK_N >= length:
        return
    d = tl.arange(0, BLOCK_D)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < length
    k_rows = rows_of(given.k, batch, key_head, begin)
    g, b = load_features(k_rows, given.k.token, given.rotation, n, inside, d, D)
    v_rows = rows_of(given.v, batch, key_head, begin)
    grad_v_rows = rows_of(grad_v, batch, key_head, begin)
    sees = n[:, None] <= n[None, :]  # key (row), query (column)
    dg = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    w = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # dS v
    for start in range(0, DV, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        values = load_tokens(v_rows, given.v.token, n, inside, v, DV, 0.0)
        dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for member in range(0, given.group if tile.CAUSAL else 1):
            at = line
            if tile.CAUSAL:
                at = (line * given.group + member) * given.chunks + chunk
            dv = product(b, load_sums(sums.s + at * D * DV, d, v, D, DV), dv, PRECISION)
            dv += tl.load(sums.u + at * DV + v, mask=v < DV, other=0.0)[None, :]
            w = product(values, tl.trans(load_sums(sums.s + at * D * DV, d, v, D, DV)), w, PRECISION)
            if start == 0:
                dg += tl.load(sums.z + at * D + d, mask=d < D, other=0.0)[None, :]
            if tile.CAUSAL:
                head = key_head * given.group + member
                q_rows = rows_of(given.q, batch, head, begin)
                f, a = load_features(q_rows, given.q.token, given.rotation, n, inside, d, D)
                line_of_head = batch * given.key_heads * given.group + head
                coefficients = coefficient_ptr + line_of_head * lengths.queries + begin
                c0, c1, c2 = load_coefficients(coefficients, coefficient_stride, n, inside)
                d_out = load_tokens(rows_of(grad, batch, head, begin), grad.token, n, inside, v, DV, 0.0)
                zero = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
                scores = product(b, tl.trans(a * c0[:, None]), zero, PRECISION)
                dv = product(tl.where(sees, scores, 0.0), d_out, dv, PRECISION)
                weighted = d_out * c2[:, None]
                dv += tl.sum(weighted, axis=0)[None, :] - tl.cumsum(weighted, axis=0) + weighted
                scores = tl.where(sees, product(values, tl.trans(d_out), zero, PRECISION), 0.0)
                w = product(scores, a * c0[:, None], w, PRECISION)
                if start == 0:
                    weighted_f = f * c1[:, None]
                    dg += tl.sum(weighted_f, axis=0)[None, :] - tl.cumsum(weighted_f, axis=0) + weighted_f
        store_tokens(grad_v_rows, grad_v.token, n, inside, v, DV, dv)
    if ROTATES:
        cos, sin = angles(given.rotation, n, inside, d, D)
        w = w * cos - other_of_pairs(w) * sin
    store_tokens(rows_of(grad_k, batch, key_head, begin), grad_k.token, n, inside, d, D, (dg + w) * tl.minimum(g, 1.0))


def mala_backward(
    grad_out, q, k, v, cos, sin, q_bounds, k_bounds, s, z, u, *, causal, scale, eps, seen
):  # fmt: skip
    """(dq, dk, dv); s, z, u are the sums of the forward, or causal those before the first token."""
    plan = Plan(q, k, v, q_bounds, causal)
    given = plan.given(q, k, v, cos, sin, q_bounds, k_bounds, scale=scale, eps=eps)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    coefficients = torch.zeros((3, plan.batch * plan.heads * plan.queries), dtype=torch.float32, device=q.device)
    grad, lengths = tokens_of(grad_out), Lengths(plan.queries, plan.keys, seen)
    if causal:
        sums, _ = before(plan.sums(k, v, None, cos, sin, k_bounds), None if s is None else (s, z, u))
    else:
        sums = Sums(s, z, u)
    if q.numel():
        with torch.cuda.device_of(q):
            mala_query_gradient_kernel[(given.chunks, plan.sequences * plan.heads)](
                grad, given, sums, tokens_of(dq), coefficients, coefficients.stride(0), lengths, **plan.constants
            )
    parts = plan.sums(q, grad_out, coefficients, cos, sin, q_bounds)
    if causal:
        # Those of later chunks, per query head.
        earlier, total = before(parts, None)
        grad_sums = Sums(
            *((t.unsqueeze(2) - e - p).contiguous() for t, e, p in zip(total, earlier, parts, strict=True))
        )
    else:
        grad_sums = Sums(*(p.sum(2).unflatten(1, (plan.key_heads, plan.group)).sum(2) for p in parts))
    if k.numel() or v.numel():
        with torch.cuda.device_of(q):
            mala_key_gradient_kernel[(plan.chunks(plan.keys), plan.sequences * plan.key_heads)](
                grad, given, grad_sums, coefficients, coefficients.stride(0), tokens_of(dk), tokens_of(dv), lengths,
                **plan.constants,
            )  # fmt: skip
    return dq, dk, dv


OPS = {"mala_backward": mala_backward}
