"""mala, bidirectional, forward and backward; softmax attention stands beside it, which is another function."""

from __future__ import annotations

import importlib
from functools import partial

import torch
import torch.nn.functional as F

from case import ATTENTION, Case, Contender, common_contenders, spread

FAMILY = ATTENTION
SIZES = {  # (batch, heads, tokens, features), dtype, timed runs, seconds at most once three runs are done
    "quick": [((1, 2, 96, 16), torch.float32, 5, 1.0)],
    "cpu": [((1, 8, 4096, 64), torch.float32, 9, 20.0), ((8, 8, 256, 64), torch.float32, 15, 4.0)],
    "cuda": [((8, 16, 4096, 64), torch.bfloat16, 20, 8.0), ((8, 16, 4096, 64), torch.float32, 10, 6.0)],
}
EPS = 1e-6


def inputs(size, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4)]
    return tensors[:3], tensors[3:]


def phi(x):
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def composition(q, k, v):
    f, g = phi(q), phi(k)
    scale, n = q.shape[-1] ** -0.5, k.shape[-2]
    z = scale * (f @ g.mean(-2, keepdim=True).transpose(-1, -2))
    y = f @ (scale / n * (g.transpose(-1, -2) @ v))
    return (1 + 1 / (z + EPS)) * y - z * v.mean(-2, keepdim=True)


def weighted(attention):
    """A scalar of the output whose gradient is `weights`."""
    return lambda q, k, v, weights: (attention(q, k, v) * weights).sum()


def ours():
    return {"": weighted(importlib.import_module("tilewise").mala)}


def reference(q, k, v, weights, checked: int = 64):
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    loss = weighted(composition)(*wide, weights.double())
    gradients = torch.autograd.grad(loss, wide)
    batch = spread(q.shape[0], checked, q.device)
    return loss.item(), [(batch, gradient[batch]) for gradient in gradients]


def cases(device: str, quick: bool = False):
    for size, dtype, runs, seconds in SIZES["quick" if quick else device]:
        batch, heads, tokens, features = size
        present, absent = common_contenders(ours, weighted(composition), device, compiled=not quick)
        present.append(Contender("softmax attention", weighted(F.scaled_dot_product_attention), same=False))
        tensor = batch * heads * tokens * features * dtype.itemsize
        product = 2 * batch * heads * tokens * features**2
        yield Case(
            op="mala",
            shape=size,
            dtype=dtype,
            device=device,
            inputs=partial(inputs, size, dtype, device),
            reference=reference,
            contenders=present,
            absent=absent,
            traffic={"forward": 4 * tensor, "backward": 7 * tensor, "both": 11 * tensor},
            flops={"forward": 2 * product, "backward": 4 * product, "both": 6 * product},
            runs=runs,
            seconds=seconds,
        )
