"""The launches of every operator at benchmark sizes as a table, and what is wrong with them: `make trace`."""

import sys
from math import ceil
from re import match
from typing import NamedTuple

import emulated
from devices import GPUS
from kernels import kernel_of
from predict import resident
from recorded import Launch, Phase, Product, Recorder, Step
from traced import Trace, traces

H100 = GPUS["H100"]
MOST_SHARED = 227 << 10  # bytes that a block may ask for
MOST_IDLE = 0.5  # of the multiprocessors


class Idle(NamedTuple):
    """Why a launch may leave more of them idle: patterns of its case and kernel."""

    case: str
    kernel: str
    reason: str


ALLOWED = [
    Idle(".*", "row_reduction_kernel", "one block adds the numbers of all rows in one order, 8 bytes a row"),
    Idle("cross_entropy 16x", "merge_parts_kernel", "a warp has a row, of which it reads 32 numbers"),
    Idle("mala", "mala_scan_kernel", "of Z and U, each a part of S"),
    Idle("sinkhorn", "(prepare|finish)_kernel", "a block has a problem, of which it reads marginals and potentials"),
    Idle(
        "sparse_ot_router", "sparse_(guess|long_cut|lists)_kernel", "a block has a column: a router's are its experts"
    ),
    Idle("sparse_ot", "sparse_(begin|step|accept|finish)_kernel", "a block has a problem: sums one after the other"),
    Idle(
        "wta_crs_linear", "wta_crs_(sizes|weigh|place)_kernel", "a lane has few of the rows: more blocks end no sooner"
    ),
]


def idle(launch: Launch) -> float:
    """The share of the multiprocessors' time that is idle when every block takes as long."""
    most = ceil(launch.blocks / H100.multiprocessors)
    return 1 - launch.blocks / (most * H100.multiprocessors)


def launches_of(trace: Trace) -> list[Launch]:
    steps = [*trace.forward.steps, *trace.backward.steps]
    return [step for step in steps if isinstance(step, Launch)]


def exception_of(trace: Trace, launch: Launch, allowed: list[Idle]) -> Idle | None:
    return next((a for a in allowed if match(a.case, trace.label) and match(a.kernel, launch.kernel)), None)


def faults(found: list[Trace], allowed: list[Idle] = ALLOWED) -> list[str]:
    """Launches that leave most of the GPU idle or ask for too much shared memory, and exceptions without a launch."""
    wrong, used = [], set()
    for trace in found:
        for launch in launches_of(trace):
            what = f"{trace.label}: {launch.kernel}"
            if launch.shared > MOST_SHARED:
                wrong.append(f"{what} asks for {launch.shared} bytes of shared memory, more than {MOST_SHARED}")
            if idle(launch) <= MOST_IDLE:
                continue
            reason = exception_of(trace, launch, allowed)
            used.add(reason)
            if reason is None:
                wrong.append(f"{what} has {launch.blocks} blocks: {idle(launch):.0%} of the multiprocessors are idle")
    wrong += [f"no launch needs the exception of {a.kernel} in {a.case}" for a in allowed if a not in used]
    return list(dict.fromkeys(wrong))


# ---- the table

HEAD = "launches  kernel or product                                  grid   block  shared held   waves  idle"


def size(number: float) -> str:
    for unit in ("", "K", "M"):
        if number < 10000:
            return f"{number:.0f}{unit}"
        number /= 1024
    return f"{number:.1f}G"


def dimensions(of: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in of if n > 1) or "1"


def line(step: Step, count: int) -> str:
    if isinstance(step, Product):
        return f"{count:8}  product {step.rows} x {step.depth} x {step.columns}, {step.item} bytes"
    if not isinstance(step, Launch):
        return f"{count * step.launches:8}  torch: {step.what}, {size(step.bytes)}B"
    kernel = kernel_of(step)
    held = resident(H100, step, kernel.registers if kernel else 32)
    waves = step.blocks / (held * H100.multiprocessors)
    name, sizes = step.kernel[:44], f"{dimensions(step.grid):>10} {dimensions(step.block):>7} {size(step.shared):>7}"
    return f"{count:8}  {name:44} {sizes} {held:4} {waves:7.2f} {idle(step):5.0%}"


def lines_of(name: str, phase: Phase) -> list[str]:
    scratch = f", {size(phase.scratch)}B of scratch memory" if phase.scratch else ""
    return [f"  {name}{scratch}", *(line(step, count) for step, count in phase.steps.items())]


def table(found: list[Trace]) -> str:
    text = [
        "held: blocks that a multiprocessor of an H100 holds; waves of its 132; idle: their share without work",
        "",
    ]
    text.append(HEAD)
    for trace in found:
        text += ["", trace.label, *lines_of("forward", trace.forward), *lines_of("backward", trace.backward)]
    return "\n".join(text)


def exceptions(found: list[Trace]) -> str:
    """The launches that are allowed to leave most of the GPU idle, a line for each reason."""
    lines = []
    for allowed in ALLOWED:
        few = [
            launch.blocks
            for trace in found
            for launch in launches_of(trace)
            if idle(launch) > MOST_IDLE and exception_of(trace, launch, ALLOWED) == allowed
        ]
        blocks = " to ".join(str(n) for n in sorted({min(few, default=0), max(few, default=0)}))
        lines.append(f"{blocks:>8} blocks: {allowed.kernel}: {allowed.reason}")
    return "\n".join(["Launches that leave more than half of the multiprocessors idle:", *lines])


def main() -> int:
    found = traces(Recorder(emulated.build()))
    wrong = faults(found)
    print(table(found), exceptions(found), *wrong, sep="\n\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
