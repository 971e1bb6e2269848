"""Linear layers one behind the other, without biases: with gradients of the weights from a sample of rows, whole, and
with torch's checkpointing of each. Of ours results and the gradient of x are compared, and not the estimates."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from case import SAMPLED, Case, Contender, common_contenders, spread

FAMILY = SAMPLED
RATIOS = (0.1, 0.3)
SIZES = {  # dtype, rows, width, layers, timed runs, seconds at most
    "quick": [("float32", 100, 16, 2, 3, 1.0)],
    "cpu": [
        ("float32", 8192, 1024, 1, 9, 20.0),
        ("float32", 2048, 1024, 4, 7, 20.0),
        ("float32", 512, 1024, 1, 15, 5.0),
    ],
    "cuda": [
        ("bfloat16", 16384, 4096, 1, 30, 8.0),
        ("bfloat16", 16384, 4096, 4, 20, 8.0),
        ("bfloat16", 131072, 1024, 4, 20, 8.0),
        ("float32", 8192, 1024, 1, 20, 8.0),
    ],
}


def inputs(dtype, rows, width, layers, device):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return [normal(rows, width), *(normal(width, width) / width**0.5 for _ in range(layers))], []


def chained(layer, x, *weights):
    """The mean square of a row."""
    for weight in weights:
        x = layer(x, weight)
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norms.square().mean()


def checkpointed(x, weight):
    return checkpoint(linear, x, weight, use_reentrant=False)


def ours():
    sampled = importlib.import_module("tilewise").wta_crs_linear
    return {f"ratio {ratio}": partial(chained, partial(sampled, ratio=ratio)) for ratio in RATIOS}


def reference(x, *weights, rows=64):
    """The loss, and the gradient of some rows of x; of the weights none."""
    wide = [weight.detach().double() for weight in weights]
    value = chained(linear, x.detach().double(), *wide).item()
    index = spread(len(x), rows, x.device)
    sample = x.detach()[index].double().requires_grad_()
    (gradient,) = torch.autograd.grad(chained(linear, sample, *wide) * len(index) / len(x), sample)
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    return value, [(index, gradient), *((none, w[:0]) for w in wide)]


def cases(device: str, quick: bool = False):
    for name, rows, width, layers, runs, seconds in SIZES["quick" if quick else device]:
        dtype = getattr(torch, name)
        present, absent = common_contenders(ours, partial(chained, linear), device, not quick)
        present.append(Contender("torch checkpoint", partial(chained, checkpointed)))
        matrix, product = rows * width * dtype.itemsize, 2 * rows * width * width
        yield Case(
            op="wta_crs_linear",
            shape=(rows, width, layers),
            dtype=dtype,
            device=device,
            inputs=partial(inputs, dtype, rows, width, layers, device),
            reference=reference,
            contenders=present,
            absent=absent,
            traffic={"forward": 2 * layers * matrix, "backward": 4 * layers * matrix, "both": 6 * layers * matrix},
            flops={"forward": layers * product, "backward": 2 * layers * product, "both": 3 * layers * product},
            runs=runs,
            seconds=seconds,
        )
