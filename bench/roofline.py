"""The ceilings of this machine, measured: copy bandwidth, matrix product, launch and exponential throughput."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from measure import clock_for, quartiles

EXP_REPEATS = 64


def median_ms(work: Callable[[], object], device: str, runs: int) -> float:
    clock = clock_for(device)
    work()
    times = []
    for _ in range(runs):
        clock.flush()
        start = clock.mark()
        work()
        end = clock.mark()
        clock.settle()
        times.append(clock.between(start, end))
    return quartiles(times)[1]


def copy_gbs(device: str, elements: int, runs: int) -> float:
    """Bytes read plus bytes written per second, into memory that is already there."""
    source = torch.randn(elements, device=device)
    out = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: out.copy_(source), device, runs) / 1e6


def gemm_gflops(device: str, size: int, dtype: torch.dtype, runs: int) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / median_ms(lambda: torch.mm(left, right, out=out), device, runs) / 1e6


def exp_giga(device: str, runs: int) -> float:
    """Float32 exponentials per nanosecond. The data stays in cache (CPU) or in registers (GPU)."""
    if device == "cuda":
        return exp_giga_cuda(runs)
    x = torch.randn(1 << 17)
    out = torch.empty_like(x)

    def work():
        for _ in range(EXP_REPEATS):
            torch.exp(x, out=out)

    return EXP_REPEATS * x.numel() / median_ms(work, device, runs) / 1e6


def exp_giga_cuda(runs: int) -> float:
    import triton

    from exp_kernel import exp_chain_kernel

    out = torch.empty(1 << 24, device="cuda")
    block = 1024
    grid = (triton.cdiv(out.numel(), block),)
    work = lambda: exp_chain_kernel[grid](out, REPEATS=EXP_REPEATS, BLOCK=block)  # noqa: E731
    return EXP_REPEATS * out.numel() / median_ms(work, "cuda", runs) / 1e6


def gemm_tf32_gflops(size: int, runs: int) -> float:
    """Float32 matrices multiplied in the matrix units' shorter format."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return gemm_gflops("cuda", size, torch.float32, runs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def launch_us(launches: int) -> float:
    """Wall-clock microseconds of one tiny operation among many: what PyTorch and the driver take to launch it."""
    x = torch.zeros(1, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(launches):
            x.zero_()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / launches * 1e6)
    return quartiles(times)[1]


def ceilings(device: str, quick: bool = False) -> dict[str, Callable[[], float]]:
    """Every ceiling by name, as what measures it."""
    if device == "cuda":
        found = {
            "copy_gbs": partial(copy_gbs, device, 1 << 29, 20),
            "gemm_bfloat16_gflops": partial(gemm_gflops, device, 8192, torch.bfloat16, 10),
            "gemm_float32_gflops": partial(gemm_gflops, device, 8192, torch.float32, 10),
            "gemm_tf32_gflops": partial(gemm_tf32_gflops, 8192, 10),
            "launch_us": partial(launch_us, 1000),
        }
    else:
        found = {
            "copy_gbs": partial(copy_gbs, device, 1 << (20 if quick else 26), 9),
            "gemm_float32_gflops": partial(gemm_gflops, device, 256 if quick else 2048, torch.float32, 5),
        }
    return found | {"exp_giga": partial(exp_giga, device, 9)}


def measure(device: str, quick: bool = False) -> dict[str, float]:
    """Every ceiling, by name. Takes a few seconds."""
    found = {}
    for name, ceiling in ceilings(device, quick).items():
        try:
            found[name] = ceiling()
        except ImportError:
            pass  # no Triton: one ceiling less, and the report does not show it
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    for name, value in measure(parser.parse_args().device).items():
        print(f"{name:24} {value:12.1f}")
