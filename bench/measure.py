"""Time, memory and error of contenders, all treated alike.

One run is: restore the inputs, drop the old gradient, flush the cache (untimed); then forward, then backward (timed).
Contenders take turns within each round, and each round starts with another one, so drift of the machine hits all alike.
The gradient comes from torch.autograd.grad: its allocation is timed, as in training, but nothing is accumulated.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from case import GRADIENT_ERROR, PHASES, SCALAR_ERROR, Case, Contender, Reference, forms_products

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FLUSH_BYTES = 1 << 29  # several times any L2; writing it also keeps the queue busy while the host launches a run


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, by linear interpolation between the ordered values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


class HostClock:
    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def flush(self): ...

    def settle(self): ...


class DeviceClock:
    """CUDA events, so that only time on the device counts."""

    def __init__(self):
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def flush(self):
        self.scratch.zero_()

    def settle(self):
        torch.cuda.synchronize()


def clock_for(device: str) -> HostClock | DeviceClock:
    return DeviceClock() if device == "cuda" else HostClock()


@dataclass
class Problem:
    """The inputs of one case, made once and shared by its contenders."""

    case: Case
    clock: HostClock | DeviceClock

    def __post_init__(self):
        self.leaves, self.constants = self.case.inputs()
        self.sources = [leaf.clone() for leaf in self.leaves]
        self.copied = self.leaves[0].clone()  # touched: a plain copy is the floor, page faults are not part of it
        for leaf in self.leaves:
            leaf.requires_grad_()

    def restore(self):
        """An implementation may have written its gradient over its input."""
        with torch.no_grad():
            for leaf, source in zip(self.leaves, self.sources, strict=True):
                leaf.copy_(source)

    def answer(self, contender: Contender) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = contender.loss(*self.leaves, *self.constants)
        return loss.detach(), torch.autograd.grad(loss, self.leaves)

    def timed(self, contender: Contender) -> dict[str, float]:
        """Milliseconds of each phase of one run; a plain copy only has the phase "both"."""
        self.restore()
        clock = self.clock
        with contender.selected():
            clock.flush()
            start = clock.mark()
            if contender.loss is None:
                with torch.no_grad():
                    self.copied.copy_(self.leaves[0])
                end = clock.mark()
                clock.settle()
                return {"both": clock.between(start, end)}
            loss = contender.loss(*self.leaves, *self.constants)
            middle = clock.mark()
            gradients = torch.autograd.grad(loss, self.leaves)
            end = clock.mark()
            clock.settle()
            del gradients
        parts = clock.between(start, middle), clock.between(middle, end), clock.between(start, end)
        return dict(zip(PHASES, parts, strict=True))


def interleave(
    problem: Problem,
    contenders: Sequence[Contender],
    runs: int,
    seconds: float,
    tick: Callable[[int], None],
    least: int = 3,
):
    """Times per contender and phase after at most `runs` rounds, or `seconds` once the `least` rounds are done."""
    times = {contender.name: {} for contender in contenders}
    start = time.perf_counter()
    for done in range(runs):
        if done >= least and time.perf_counter() - start > seconds:
            break
        first = done % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            for phase, elapsed in problem.timed(contender).items():
                times[contender.name].setdefault(phase, []).append(elapsed)
        tick(done + 1)
    return times


@dataclass(frozen=True)
class Error:
    """Relative errors against float64: of the loss, and of the worst row of the gradients."""

    loss: float
    gradient: float

    def within(self, dtype: torch.dtype) -> bool:
        return self.loss <= SCALAR_ERROR[dtype] and self.gradient <= GRADIENT_ERROR[dtype]  # NaN is not


def error(problem: Problem, contender: Contender, reference: Reference) -> Error:
    """Run once and compare; this is also the first warm-up."""
    expected, samples = reference
    problem.restore()
    with contender.selected():
        loss, gradients = problem.answer(contender)
        off = [
            (gradient[index].double() - rows).norm(dim=-1) / rows.norm(dim=-1)
            for gradient, (index, rows) in zip(gradients, samples, strict=True)
        ]
        return Error(abs(loss.double().item() - expected) / abs(expected), torch.cat(off).max().item())


def peak_extra_bytes(problem: Problem, contender: Contender) -> int | None:
    """Highest memory of one forward and backward beyond what was held before it; without the gradients of a layer.

    A loss over rows may avoid the gradient's allocation by writing in place, so there it counts; the gradients of an
    output layer have to be returned by everyone.

    On a GPU the caching allocator tells. On Linux it is the kernel's high-water mark of resident memory, which also
    sees scratch that never went through torch; None where the system keeps no such mark.
    """
    problem.restore()
    gc.collect()
    with contender.selected():
        if problem.case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            problem.answer(contender)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            peak = resident_peak(lambda: problem.answer(contender))
    returned = sum(leaf.nbytes for leaf in problem.leaves) if forms_products(problem.case.op) else 0
    return None if peak is None else max(0, peak - returned)


def resident_peak(work: Callable[[], object]) -> int | None:
    if not CLEAR_REFS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # or freed blocks that are still resident would hide what `work` takes
    try:
        CLEAR_REFS.write_text("5")  # sets the high-water mark to the present size
    except OSError:
        return None
    before = resident("VmRSS")
    work()
    return max(0, resident("VmHWM") - before)


def resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
