"""Predicted times of the CUDA kernels at every benchmark size, for GPUs that nobody has to have: `make predict`.

A launch takes what a launch takes, and the longest of: its bytes at copy speed, its float32 operations, its special
functions, its instructions, and accesses that wait for each other. The busiest multiprocessor decides, with as many
warps as it holds; a matrix product takes its operations or its bytes. The launches come from the .cu files, recorded
(tests/gpu/cuda_emulator/traced.py), their work from bench/kernels.py, the GPUs from bench/devices.py.

None of this is measured. Errors of 40 % are to be expected; what is three times off is worth a look.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import multiprocessors
import recorded
import traced

from devices import GPUS, LATENCY, LAUNCH, LONE, MOST_ISSUED, PACE, Gpu
from kernels import KERNELS, kernel_of, sizes_of
from predicted import FOLDER, save, table

TILE = 128  # rows and columns of a product's block: the rest of one is work, too


class Taken(NamedTuple):
    """Seconds of one step, and what takes them."""

    seconds: float
    limit: str


def resident(gpu: Gpu, launch: recorded.Launch, registers: int) -> int:
    """Blocks of a launch that one multiprocessor holds."""
    part = multiprocessors.PARTS[gpu.capability]
    return max(1, multiprocessors.resident(part, launch.threads, registers, launch.shared))


def of_launch(gpu: Gpu, launch: recorded.Launch, kernels=KERNELS) -> Taken:
    kernel = kernel_of(launch, kernels)
    if kernel is None:
        raise KeyError(f"bench/kernels.py says nothing of {launch.kernel}")
    of = kernel.work(sizes_of(launch))
    most = ceil(launch.blocks / gpu.multiprocessors)  # blocks of the busiest multiprocessor
    held = min(most, resident(gpu, launch, kernel.registers))
    share = most / launch.blocks  # of the work, that it does
    warps = held * launch.threads / 32 / gpu.schedulers
    issued = gpu.schedulers * min(MOST_ISSUED, warps / PACE)
    drawn = gpu.copy * min(1.0, LONE * launch.blocks / gpu.multiprocessors)
    limits = {
        "memory": of.bytes / drawn,
        "float32": of.flop * share / (gpu.float32 / gpu.multiprocessors),
        "tensor cores": of.tensor * share / (gpu.tf32 / gpu.multiprocessors),
        "special functions": of.special * share / (gpu.special * gpu.clock),
        "instructions": of.instructions / 32 * share / (issued * gpu.clock),
        "latency": of.rounds * ceil(most / held) * LATENCY / gpu.clock,
    }
    limit = max(limits, key=limits.get)
    return Taken(LAUNCH + limits[limit], limit if limits[limit] > LAUNCH else "launch")


def of_product(gpu: Gpu, product: recorded.Product) -> Taken:
    rows, columns, depth, item, out = product
    whole = [ceil(size / TILE) * TILE for size in (rows, columns)]
    operations = 2 * whole[0] * whole[1] * depth / gpu.product(item)
    memory = (item * depth * (rows + columns) + out * rows * columns) / gpu.copy
    return Taken(LAUNCH + max(operations, memory), "product" if operations > memory else "memory")


def of_step(gpu: Gpu, step: recorded.Step, kernels=KERNELS) -> Taken:
    if isinstance(step, recorded.Launch):
        return of_launch(gpu, step, kernels)
    if isinstance(step, recorded.Product):
        return of_product(gpu, step)
    return Taken(step.launches * LAUNCH + step.bytes / gpu.copy, "memory" if step.bytes else "launch")


def named(step: recorded.Step) -> str:
    if isinstance(step, recorded.Launch):
        return step.kernel.split("<")[0]
    return "matrix product" if isinstance(step, recorded.Product) else "torch operations"


def of_phase(gpu: Gpu, phase: recorded.Phase, kernels=KERNELS) -> dict:
    """Milliseconds, and of the kernel that takes most of them its name, share and limit."""
    shares: dict[tuple[str, str], float] = {}
    for step, count in phase.steps.items():
        taken = of_step(gpu, step, kernels)
        key = named(step), taken.limit
        shares[key] = shares.get(key, 0.0) + count * taken.seconds
    total = sum(shares.values())
    (name, limit), most = max(shares.items(), key=lambda item: item[1])
    return {"predicted_ms": 1e3 * total, "most": name, "share": most / total, "limit": limit}


def predictions(gpu: Gpu, traces: list[traced.Trace], kernels=KERNELS) -> list[dict]:
    """One for each case and phase, as the results of benchmarks are."""
    found = []
    for trace in traces:
        key = {"case": trace.case, "shape": list(trace.shape), "dtype": trace.dtype_name}
        key["contender"] = f"tilewise cuda {trace.variant}".strip()
        both = recorded.Phase(trace.forward.steps + trace.backward.steps, 0)
        for name, phase in (("forward", trace.forward), ("backward", trace.backward), ("both", both)):
            figures = of_phase(gpu, phase, kernels)
            found.append(key | {"phase": name} | {k: rounded(v) for k, v in figures.items()})
    return found


def rounded(value: float | str) -> float | str:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def too_fast(found: list[dict], gpu: Gpu, traffic: dict[tuple, dict], flops: dict[tuple, dict]) -> list[str]:
    """Predictions below what the case's own bytes or operations take: a formula of bench/kernels.py is wrong."""
    wrong = []
    for row in found:
        key = row["case"], tuple(row["shape"]), row["dtype"]
        if row["phase"] != "both" or key not in traffic:
            continue
        # Floats are multiplied as floats, or as three products in tf32.
        product = gpu.product(2) if row["dtype"] == "bfloat16" else max(gpu.product(4), gpu.tf32 / 3)
        least = 1e3 * max(traffic[key]["both"] / gpu.copy, flops[key]["both"] / product)
        if row["predicted_ms"] < least * 0.99:
            wrong.append(f"{key}: predicted {row['predicted_ms']:.3g} ms, its bytes and products take {least:.3g} ms")
    return wrong


def all_traces() -> list[traced.Trace]:
    return traced.traces(recorded.Recorder(traced.emulated.build()))


def main():
    traces = all_traces()
    for name, gpu in GPUS.items():
        save(FOLDER / f"{name.lower()}.json", name, predictions(gpu, traces))
    print(table("H100"))


if __name__ == "__main__":
    main()
