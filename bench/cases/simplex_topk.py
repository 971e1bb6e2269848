"""simplex_topk along rows, against a full sort and torch.topk."""

from __future__ import annotations

import importlib
from functools import partial

import torch

from case import ROWS, Case, Contender, common_contenders, spread

FAMILY = ROWS
SIZES = {  # rows, columns, k, timed runs, seconds at most
    "quick": [(64, 100, 4, 5, 1.0)],
    "cpu": [(65536, 256, 8, 11, 12.0)],
    "cuda": [(1048576, 256, 8, 30, 6.0), (65536, 4096, 32, 30, 6.0)],
}


def inputs(rows, columns, device):
    generator = torch.Generator(device).manual_seed(0)
    x, weights = (torch.randn(rows, columns, generator=generator, device=device) for _ in range(2))
    return [x], [weights]


def projected(x, values, indices):
    """From the k largest of every row in falling order."""
    levels = (values.cumsum(-1) - 1) / torch.arange(1, values.shape[-1] + 1, device=x.device)
    support = (values > levels).sum(-1, keepdim=True)
    return torch.zeros_like(x).scatter(-1, indices, (values - levels.gather(-1, support - 1)).clamp(min=0))


def by_sort(k, x, weights):
    return (projected(x, *(t[:, :k] for t in x.sort(-1, descending=True))) * weights).sum()


def by_topk(k, x, weights):
    return (projected(x, *x.topk(k, -1)) * weights).sum()


def ours(k):
    return {"": lambda x, weights: (importlib.import_module("tilewise").simplex_topk(x, k) * weights).sum()}


def reference(k, x, weights, rows=64):
    blocks = zip(x.detach().split(8192), weights.split(8192), strict=True)
    value = sum(by_sort(k, *(t.double() for t in block)).item() for block in blocks)
    # Of rows with one entry the gradient is 0, and has no relative error.
    x = x.detach()
    several = (projected(x, *x.topk(k, -1)).count_nonzero(-1) > 1).nonzero()[:, 0]
    index = several[spread(len(several), rows, x.device)]
    sample = x[index].double().requires_grad_()
    (gradient,) = torch.autograd.grad(by_sort(k, sample, weights[index].double()), sample)
    return value, [(index, gradient)]


def cases(device: str, quick: bool = False):
    for rows, columns, k, runs, seconds in SIZES["quick" if quick else device]:
        present, absent = common_contenders(partial(ours, k), partial(by_sort, k), device, not quick)
        present.append(Contender("torch.topk", partial(by_topk, k)))
        matrix = rows * columns * 4
        yield Case(
            op="simplex_topk",
            shape=(rows, columns, k),
            dtype=torch.float32,
            device=device,
            inputs=partial(inputs, rows, columns, device),
            reference=partial(reference, k),
            contenders=present,
            absent=absent,
            traffic={"forward": 2 * matrix, "backward": 3 * matrix, "both": 5 * matrix},
            flops={"forward": 0, "backward": 0, "both": 0},
            runs=runs,
            seconds=seconds,
        )
