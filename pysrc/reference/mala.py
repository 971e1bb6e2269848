"""Magnitude-aware linear attention in plain PyTorch; csrc/mala/mala.h has the formulas.

Sequences are taken one after the other; PyTorch differentiates the output.
"""

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1 without its cancellation."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """The pairs (x_2i, x_2i+1) of (..., tokens, D) by the angles of (tokens, D/2)."""
    if cos is None:
        return x
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def attend(q, k, v, cos=None, sin=None, state=None, *, causal, scale, eps, seen=0):
    """Output and the sums over all keys, of one batch of sequences: q (B, H, N, D), k and v (B, Hk, M, ..)."""
    group = q.shape[1] // k.shape[1]
    s, z, u = (None,) * 3 if state is None else (t.repeat_interleave(group, 1) for t in state)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    f, g = phi(q), phi(k)
    a, b = rotate(f, cos, sin), rotate(g, cos, sin)
    sums = [b.transpose(-1, -2) @ v, g.sum(-2), v.sum(-2)]
    if state is not None:
        sums = [total + before for total, before in zip(sums, (s, z, u), strict=True)]
    if causal:
        n = seen + torch.arange(1, q.shape[2] + 1, device=q.device, dtype=q.dtype)[:, None]
        of_keys, of_values = g.cumsum(-2), v.cumsum(-2)
        y = (a @ b.transpose(-1, -2)).tril() @ v
        if state is not None:
            of_keys, of_values, y = of_keys + z[:, :, None], of_values + u[:, :, None], y + a @ s
    else:
        n = max(1, k.shape[2])
        of_keys, of_values, y = sums[1][:, :, None], sums[2][:, :, None], a @ sums[0]
    z = scale / n * (f * of_keys).sum(-1, keepdim=True)
    out = (1 + 1 / (z + eps)) * (scale / n) * y - z / n * of_values
    return out, [total[:, ::group] for total in sums]


def _sequences(q, k, v, q_bounds, k_bounds):
    """(q, k, v) with a batch of 1, one sequence after the other."""
    if q_bounds is None:
        for i in range(q.shape[0]):
            yield q[i : i + 1], k[i : i + 1], v[i : i + 1]
        return
    q_at, k_at = q_bounds.tolist(), k_bounds.tolist()
    for i in range(len(q_at) - 1):
        keys = slice(k_at[i], k_at[i + 1])
        yield q[:, :, q_at[i] : q_at[i + 1]], k[:, :, keys], v[:, :, keys]


def mala(q, k, v, cos, sin, q_bounds, k_bounds, s, z, u, *, causal, scale, eps, seen=0):
    """Output (B, H, N, Dv) and the sums S, Z, U of every sequence, in the type of statistics."""
    wide = statistics_dtype(q)
    tensors = [t.to(wide) for t in (q, k, v)]
    angles = [None if t is None else t.to(wide) for t in (cos, sin)]
    outputs, sums = [], []
    for i, parts in enumerate(_sequences(*tensors, q_bounds, k_bounds)):
        state = None if s is None else [t[i : i + 1].to(wide) for t in (s, z, u)]
        out, total = attend(*parts, *angles, state, causal=causal, scale=scale, eps=eps, seen=seen)
        outputs.append(out)
        sums.append(total)
    if not outputs:
        b, h, n, d = q.shape
        hk, dv = v.shape[1], v.shape[3]
        empty = [tensors[0].new_zeros(0, hk, d, dv), tensors[0].new_zeros(0, hk, d), tensors[0].new_zeros(0, hk, dv)]
        return tensors[0].new_zeros(b, h, n, dv), *empty
    return torch.cat(outputs, 0 if q_bounds is None else 2), *(torch.cat(t) for t in zip(*sums, strict=True))


def _forward(q, *tensors, **options):
    out, *sums = mala(q, *tensors, **options)
    return out.to(q.dtype), *sums


def _backward(grad_out, q, k, v, cos, sin, q_bounds, k_bounds, s, z, u, *, causal, **options):
    wide = statistics_dtype(q)
    start = (s, z, u) if causal else (None, None, None)

    def function(q, k, v):
        return mala(q, k, v, cos, sin, q_bounds, k_bounds, *start, causal=causal, **options)[0]

    gradients = torch.func.vjp(function, *(t.to(wide) for t in (q, k, v)))[1](grad_out.to(wide))
    return tuple(g.to(t.dtype) for g, t in zip(gradients, (q, k, v), strict=True))


OPS = {"mala": _forward, "mala_backward": _backward}
