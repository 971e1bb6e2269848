"""sinkhorn over matrices: one of some size, 100 iterations and the envelope; thousands that are differentiated through
their 20 iterations."""

from __future__ import annotations

import importlib
from functools import partial

import torch

from case import TRANSPORT, Case, common_contenders, peer
from transport import ITERATIONS, NO_STOP, eager_value, loop, ott_of_matrix, plan_of, pot_value, reference_of

FAMILY = TRANSPORT
SIZES = {  # shape, timed runs, seconds at most once three runs are done
    "quick": [((96, 80), 3, 1.0), ((9, 8, 8), 3, 1.0)],
    "cpu": [((2048, 2048), 5, 60.0), ((4096, 8, 8), 15, 5.0)],
    "cuda": [((10000, 10000), 5, 30.0), ((32768, 4, 4), 20, 5.0)],
}
SMALL_EPSILON, SMALL_ITERATIONS = 0.1, 20


def inputs(shape, device):
    generator = torch.Generator(device).manual_seed(0)
    cost, weights = (torch.rand(shape, generator=generator, device=device) for _ in range(2))
    return [cost], [] if len(shape) == 2 else [weights]


def ours():
    return {"": lambda cost: importlib.import_module("tilewise").sinkhorn(cost, **NO_STOP).value}


def eager_unrolled(cost, weights):
    f, g = loop(cost, SMALL_ITERATIONS, SMALL_EPSILON)
    return (plan_of(cost, f, g, SMALL_EPSILON) * weights).sum()


def ours_unrolled():
    def loss(cost, weights):
        options = {"epsilon": SMALL_EPSILON, "max_iter": SMALL_ITERATIONS, "gradient": "unrolled"}
        return (importlib.import_module("tilewise").sinkhorn(cost, **options).plan() * weights).sum()

    return {"": loss}


def unrolled_reference(cost, weights):
    return reference_of(lambda wide: eager_unrolled(wide, weights.double()), cost)


def cases(device: str, quick: bool = False):
    for shape, runs, seconds in SIZES["quick" if quick else device]:
        single = len(shape) == 2
        compiled = not quick and not single  # a loop of 100 iterations takes minutes to compile
        variants, eager = (ours, eager_value) if single else (ours_unrolled, eager_unrolled)
        present, absent = common_contenders(variants, eager, device, compiled)
        if single:
            absent.pop("torch.compile", None)
            peer(present, absent, "POT", "ot", pot_value)
            if device == "cpu":
                peer(present, absent, "OTT-JAX", "ott", ott_of_matrix)
        elements = torch.Size(shape).numel()
        passes = ITERATIONS if single else SMALL_ITERATIONS
        traffic = {"forward": passes * elements * 4, "backward": 2 * elements * 4}
        yield Case(
            op="sinkhorn",
            shape=shape,
            dtype=torch.float32,
            device=device,
            inputs=partial(inputs, shape, device),
            reference=partial(reference_of, eager_value) if single else unrolled_reference,
            contenders=present,
            absent=absent,
            traffic=traffic | {"both": sum(traffic.values())},
            flops={"forward": 0, "backward": 0, "both": 0},
            runs=runs,
            seconds=seconds,
        )
