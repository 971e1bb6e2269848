"""sinkhorn_points, 100 iterations and the gradient of both sets; geomloss stands beside it, which updates otherwise."""

from __future__ import annotations

import importlib
from functools import partial

import torch

from case import TRANSPORT, Case, Contender, common_contenders, peer, why_not
from transport import (
    ITERATIONS,
    NO_STOP,
    eager_value,
    geomloss_value,
    ott_of_points,
    reference_of,
    squared_distances,
)

FAMILY = TRANSPORT
SIZES = {  # (n, m, d), timed runs, seconds at most once three runs are done
    "quick": [((96, 80, 16), 3, 1.0)],
    "cpu": [((2048, 2048, 64), 5, 60.0)],
    "cuda": [((5000, 5000, 64), 10, 20.0), ((10000, 10000, 64), 5, 30.0), ((50000, 50000, 64), 3, 60.0)],
}


def inputs(shape, device):
    """Two sets whose squared distances are about 1."""
    n, m, d = shape
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(size, d, generator=generator, device=device) / (2 * d) ** 0.5 for size in (n, m))
    return [x, y], []


def ours(device):
    def value(x, y, **options):
        return importlib.import_module("tilewise").sinkhorn_points(x, y, **NO_STOP, **options).value

    return {"": value} if device == "cpu" else {"": value, "allow_tf32": partial(value, allow_tf32=True)}


def eager(x, y):
    return eager_value(squared_distances(x, y))


def flash():
    """flash-sinkhorn's solver; its loss is ours, its default products are tf32."""
    solver = importlib.import_module("flash_sinkhorn")
    loss = solver.SamplesLoss(
        "sinkhorn", p=2, blur=(NO_STOP["epsilon"] / 2) ** 0.5, debias=False, use_epsilon_scaling=False,
        n_iters=ITERATIONS
    )  # fmt: skip
    return lambda x, y: 2 * loss(x, y)


def cases(device: str, quick: bool = False):
    for shape, runs, seconds in SIZES["quick" if quick else device]:
        present, absent = common_contenders(partial(ours, device), eager, device, compiled=False)
        absent.pop("torch.compile", None)
        if device == "cpu":
            peer(present, absent, "OTT-JAX", "ott", ott_of_points)
        else:
            peer(present, absent, "flash-sinkhorn", "flash_sinkhorn", flash)
        if reason := why_not("geomloss"):
            absent["geomloss"] = reason
        else:
            present.append(Contender("geomloss", geomloss_value(), "peer", same=False))
        n, m, d = shape
        passes = n * m * 4
        traffic = {"forward": ITERATIONS * passes, "backward": 2 * passes}
        yield Case(
            op="sinkhorn_points",
            shape=shape,
            dtype=torch.float32,
            device=device,
            inputs=partial(inputs, shape, device),
            reference=partial(reference_of, eager),
            contenders=present,
            absent=absent,
            traffic=traffic | {"both": sum(traffic.values())},
            flops={"forward": 2 * n * m * d, "backward": 4 * n * m * d, "both": 6 * n * m * d},
            runs=runs,
            seconds=seconds,
        )
