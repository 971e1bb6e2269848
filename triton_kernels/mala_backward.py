"""The gradients of magnitude-aware linear attention: of queries, chunk by chunk, which leaves three numbers a query; of
these the sums over queries; and of the sums those of keys and values.
"""

import torch
import triton
import triton.language as tl

from .mala import Plan, angles, before, load_features, load_sums, load_tokens, place, product, sequence


@triton.jit(do_not_specialize=["queries", "keys", "seen"])
def mala_query_gradient_kernel(
    grad_ptr,
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
    grad_q_ptr,
    coefficient_ptr,
    queries,
    keys,
    heads,
    group,
    chunks,
    seen,
    scale,
    eps,
    coefficient_stride,
    grad_batch,
    grad_head,
    grad_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    grad_q_batch,
    grad_q_head,
    grad_q_token,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a chunk, and the coefficients with which its tokens enter dS, dZ and dU."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index, head = line // heads, line % heads
    begin, length = sequence(q_bounds_ptr, index, queries)
    if chunk * BLOCK_N >= length:
        return
    _, k_length = sequence(k_bounds_ptr, index, keys)
    batch = index if q_bounds_ptr is None else index * 0
    d = tl.arange(0, BLOCK_D)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < length
    f, a, _ = load_features(
        q_ptr + batch * q_batch + head * q_head + begin * q_token, q_token, cos_ptr, sin_ptr, n, inside, d, D
    )
    at = index * (heads // group) + head // group
    if CAUSAL:
        at = at * chunks + chunk
    of_keys = tl.load(z_ptr + at * D + d, mask=d < D, other=0.0)[None, :]
    count = tl.maximum(k_length, 1).to(tl.float32)
    grad_rows = grad_ptr + batch * grad_batch + head * grad_head + begin * grad_token
    v_rows = v_ptr + batch * v_batch + head // group * v_head + begin * v_token
    w = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # S do
    w_other = w
    mean = tl.zeros([BLOCK_N], tl.float32)  # do . U
    pairs = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)  # do . v
    for start in range(0, DV, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        grad = load_tokens(grad_rows, grad_token, n, inside, v, DV, 0.0)
        w = product(grad, tl.trans(load_sums(s_ptr + at * D * DV, d, v, D, DV)), w, PRECISION)
        if cos_ptr is not None:
            w_other = product(grad, tl.trans(load_sums(s_ptr + at * D * DV, d ^ 1, v, D, DV)), w_other, PRECISION)
        of_values = tl.load(u_ptr + at * DV + v, mask=v < DV, other=0.0)[None, :]
        if CAUSAL:
            values = load_tokens(v_rows, v_token, n, inside, v, DV, 0.0)
            pairs = product(grad, tl.trans(values), pairs, PRECISION)
            of_values = of_values + tl.cumsum(values, axis=0)
        mean += tl.sum(grad * of_values, axis=1)
    if CAUSAL:
        k_rows = k_ptr + batch * k_batch + head // group * k_head + begin * k_token
        g, b, b_other = load_features(k_rows, k_token, cos_ptr, sin_ptr, n, inside, d, D)
        pairs = tl.where(n[:, None] >= n[None, :], pairs, 0.0)
        w = product(pairs, b, w, PRECISION)
        if cos_ptr is not None:
            w_other = product(pairs, b_other, w_other, PRECISION)
        of_keys = of_keys + tl.cumsum(g, axis=0)
        count = (seen + n + 1).to(tl.float32)
    share = scale / count
    z = share * tl.sum(f * of_keys, axis=1)
    inverse = 1.0 / (z + eps)
    zeta = -share * tl.sum(a * w, axis=1) * inverse * inverse - mean / count
    beta = 1.0 + inverse
    if cos_ptr is not None:
        cos, sin = angles(cos_ptr, sin_ptr, n, inside, d, D)
        w = w * cos - w_other * sin
    df = (share * zeta)[:, None] * of_keys + (share * beta)[:, None] * w
    out = grad_q_ptr + batch * grad_q_batch + head * grad_q_head + begin * grad_q_token
    dq = df * tl.minimum(f, 1.0)
    tl.store(
        place(out, grad_q_token, n, d), dq.to(grad_q_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :]
    )
    coefficients = coefficient_ptr + (batch * heads + head) * queries + begin + n
    tl.store(coefficients, share * beta, mask=inside)
    tl.store(coefficients + coefficient_stride, share * zeta, mask=inside)
    tl.store(coefficients + 2 * coefficient_stride, -z / count, mask=inside)


@triton.jit(do_not_specialize=["queries", "keys"])
def mala_key_gradient_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    k_bounds_ptr,
    s_ptr,
    z_ptr,
    u_ptr,
    coefficient_ptr,
    grad_k_ptr,
    grad_v_ptr,
    queries,
    keys,
    key_heads,
    group,
    chunks,
    coefficient_stride,
    grad_batch,
    grad_head,
    grad_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    grad_k_batch,
    grad_k_head,
    grad_k_token,
    grad_v_batch,
    grad_v_head,
    grad_v_token,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a chunk from dS, dZ, dU: of all queries, or causal of those after the chunk and of every head."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index, key_head = line // key_heads, line % key_heads
    begin, length = sequence(k_bounds_ptr, index, keys)
    if chunk * BLOCK_N >= length:
        return
    batch = index if k_bounds_ptr is None else index * 0
    d = tl.arange(0, BLOCK_D)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < length
    k_rows = k_ptr + batch * k_batch + key_head * k_head + begin * k_token
    g, b, _ = load_features(k_rows, k_token, cos_ptr, sin_ptr, n, inside, d, D)
    v_rows = v_ptr + batch * v_batch + key_head * v_head + begin * v_token
    sees = n[:, None] <= n[None, :]  # key (row), query (column)
    dg = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    w = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # dS v
    w_other = w
    for start in range(0, DV, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        values = load_tokens(v_rows, v_token, n, inside, v, DV, 0.0)
        dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for member in range(0, group if CAUSAL else 1):
            at = line
            if CAUSAL:
                at = (line * group + member) * chunks + chunk
            dv = product(b, load_sums(s_ptr + at * D * DV, d, v, D, DV), dv, PRECISION)
            dv += tl.load(u_ptr + at * DV + v, mask=v < DV, other=0.0)[None, :]
            w = product(values, tl.trans(load_sums(s_ptr + at * D * DV, d, v, D, DV)), w, PRECISION)
            if cos_ptr is not None:
                w_other = product(values, tl.trans(load_sums(s_ptr + at * D * DV, d ^ 1, v, D, DV)), w_other, PRECISION)
            if start == 0:
                dg += tl.load(z_ptr + at * D + d, mask=d < D, other=0.0)[None, :]
            if CAUSAL:
                head = key_head * group + member
                q_rows = q_ptr + batch * q_batch + head * q_head + begin * q_token
                f, a, a_other = load_features(q_rows, q_token, cos_ptr, sin_ptr, n, inside, d, D)
                coefficients = coefficient_ptr + (batch * key_heads * group + head) * queries + begin + n
                c0 = tl.load(coefficients, mask=inside, other=0.0)
                c1 = tl.load(coefficients + coefficient_stride, mask=inside, other=0.0)
                c2 = tl.load(coefficients + 2 * coefficient_stride, mask=inside, other=0.0)
                grad_rows = grad_ptr + batch * grad_batch + head * grad_head + begin * grad_token
                grad = load_tokens(grad_rows, grad_token, n, inside, v, DV, 0.0)
                pairs = product(b, tl.trans(a * c0[:, None]), tl.zeros([BLOCK_N, BLOCK_N], tl.float32), PRECISION)
                dv = product(tl.where(sees, pairs, 0.0), grad, dv, PRECISION)
                of_values = grad * c2[:, None]
                dv += tl.sum(of_values, axis=0)[None, :] - tl.cumsum(of_values, axis=0) + of_values
                pairs = product(values, tl.trans(grad), tl.zeros([BLOCK_N, BLOCK_N], tl.float32), PRECISION)
                pairs = tl.where(sees, pairs, 0.0)
                w = product(pairs, a * c0[:, None], w, PRECISION)
                if cos_ptr is not None:
                    w_other = product(pairs, a_other * c0[:, None], w_other, PRECISION)
                if start == 0:
                    of_keys = f * c1[:, None]
                    dg += tl.sum(of_keys, axis=0)[None, :] - tl.cumsum(of_keys, axis=0) + of_keys
        out = grad_v_ptr + batch * grad_v_batch + key_head * grad_v_head + begin * grad_v_token
        tl.store(
            place(out, grad_v_token, n, v), dv.to(grad_v_ptr.dtype.element_ty), mask=inside[:, None] & (v < DV)[None, :]
        )
    if cos_ptr is not None:
        cos, sin = angles(cos_ptr, sin_ptr, n, inside, d, D)
        w = w * cos - w_other * sin
    out = grad_k_ptr + batch * grad_k_batch + key_head * grad_k_head + begin * grad_k_token
    dk = (dg + w) * tl.minimum(g, 1.0)
    tl.store(
        place(out, grad_k_token, n, d), dk.to(grad_k_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :]
    )


def mala_backward(
    grad_out, q, k, v, cos, sin, q_bounds, k_bounds, s, z, u, *, causal, scale, eps, seen
):  # fmt: skip
    """(dq, dk, dv); s, z, u are the sums of the forward, or causal those before the first token."""
    plan = Plan(q, k, v, q_bounds, causal)
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    coefficients = torch.zeros((3, plan.batch * plan.heads * plan.queries), dtype=torch.float32, device=q.device)
    chunks = plan.chunks(plan.queries)
    if causal:
        sums, _ = before(plan.sums(k, v, None, cos, sin, k_bounds, True), None if s is None else (s, z, u))
    else:
        sums = [s, z, u]
    strides = [stride for t in (grad_out, q, k, v) for stride in t.stride()[:3]]
    if q.numel():
        with torch.cuda.device_of(q):
            mala_query_gradient_kernel[(chunks, plan.sequences * plan.heads)](
                grad_out, q, k, v, cos, sin, q_bounds, k_bounds, *sums, gradients[0], coefficients, plan.queries,
                plan.keys, plan.heads, plan.group, chunks, seen, scale, eps, coefficients.stride(0), *strides,
                *gradients[0].stride()[:3], CAUSAL=causal, **plan.constants,
            )  # fmt: skip
    parts = plan.sums(q, grad_out, coefficients, cos, sin, q_bounds, causal)
    if causal:
        # Those of later chunks, per query head.
        ahead, total = before(parts, None)
        of_keys = [(t.unsqueeze(2) - e - p).contiguous() for t, e, p in zip(total, ahead, parts, strict=True)]
    else:
        of_keys = [p.sum(2).unflatten(1, (plan.key_heads, plan.group)).sum(2) for p in parts]
    if k.numel() or v.numel():
        with torch.cuda.device_of(q):
            mala_key_gradient_kernel[(plan.chunks(plan.keys), plan.sequences * plan.key_heads)](
                grad_out, q, k, v, cos, sin, k_bounds, *of_keys, coefficients, *gradients[1:], plan.queries, plan.keys,
                plan.key_heads, plan.group, chunks, coefficients.stride(0), *strides,
                *gradients[1].stride()[:3], *gradients[2].stride()[:3], CAUSAL=causal, **plan.constants,
            )  # fmt: skip
    return tuple(gradients)


OPS = {"mala_backward": mala_backward}
