"""Budgets of the hot loops in the CUDA library's machine code: the figures of sass_budgets.txt, which a change that
makes a loop worse exceeds. `make resources` prints what there is, with --write into that file."""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import sass

TABLE = Path(__file__).with_suffix(".txt")
ARCHITECTURES = ("80", "90", "100")  # its columns
ROOM = 1.03
LIMITS = re.compile(r"^ +([\d.]+) +([\d.]+) +([\d.]+)  (\S.*)$", re.MULTILINE)


class Budget(NamedTuple):
    why: str
    loop: str  # which loops, several together: how many instructions of which kinds they have, at least or from-to
    elements: int | str  # that a thread does in an iteration, or the kind of instruction that does one
    element: str  # what it is
    limits: dict[str, tuple[float, ...]]  # instructions per element of the kernels of a name, by architecture
    memory: str | None  # pattern of an iteration's global loads and stores
    in_flight: int  # loads, at least
    special: float  # exponentials, reciprocals, .. per element
    every: bool  # all branches count, which different threads take; else the shortest way round
    allows: set[str]  # of what is strange in a hot loop


class Measured(NamedTuple):
    instructions: float
    memory: list[str]
    in_flight: int
    special: float
    strange: set[str]


def budget_of(block: str) -> Budget:
    given = dict(re.findall(r"^([a-z ]+): (.*)$", block, re.MULTILINE))
    elements, _, element = given["per"].partition(" ")
    memory = given.get("memory")
    return Budget(
        given["why"],
        given["loop"],
        int(elements) if elements.isdecimal() else elements,
        element,
        {name: tuple(map(float, figures)) for *figures, name in LIMITS.findall(block)},
        "" if memory == "none" else memory,
        int(given.get("in flight", 0)),
        float(given.get("special", 0)),
        given.get("branches") == "all",
        set(given.get("allows", "").split()),
    )


def budgets() -> list[Budget]:
    return [budget_of(block) for block in TABLE.read_text().split("\n\n") if "\nwhy: " in f"\n{block}"]


def is_meant(loop: sass.Loop, wanted: str) -> bool:
    for term in wanted.removeprefix("innermost, ").split(", "):
        least, most, kind = re.fullmatch(r"(\d+)(?:-(\d+))? (\S+)", term).groups()
        if not int(least) <= sass.count(loop.own, kind) <= int(most or 10**9):
            return False
    return loop.innermost or not wanted.startswith("innermost")


def measured(budget: Budget, code: list[sass.Instruction]) -> Measured | None:
    """None where the kernel has no such loop."""
    if budget.loop == "whole":
        ways = [code]
    else:
        loops = [loop for loop in sass.loops_of(code) if is_meant(loop, budget.loop)]
        ways = [loop.own if budget.every else loop.shortest for loop in loops]
    if not ways:
        return None
    each, elements = [sass.figures_of(way) for way in ways], budget.elements
    if isinstance(elements, str):
        elements = sum(sass.count(way, elements) for way in ways)
    return Measured(
        sum(figures.instructions for figures in each) / max(elements, 1),
        sorted({figures.memory for figures in each}),
        min(figures.in_flight for figures in each),
        sum(figures.special for figures in each) / max(elements, 1),
        set().union(*(figures.strange for figures in each)),
    )


def faults(budget: Budget, limit: float, found: Measured | None) -> list[str]:
    """In what a kernel exceeds its budget."""
    if found is None:
        return [f"no loop with {budget.loop}"]
    said = []
    if found.instructions > limit * ROOM:
        said.append(f"{found.instructions:.2f} instructions per {budget.element}, not {limit:.2f}")
    for memory in found.memory:
        if budget.memory is not None and not re.fullmatch(budget.memory, memory):
            said.append(f"global memory: {memory or 'none'} in an iteration, not {budget.memory or 'none'}")
    if found.in_flight < budget.in_flight:
        said.append(f"{found.in_flight} loads in flight, not {budget.in_flight}")
    if found.special > budget.special * ROOM:
        said.append(f"{found.special:.2f} special functions per {budget.element}, not {budget.special:g}")
    if strange := found.strange - budget.allows:
        said.append(f"{', '.join(sorted(strange))} in a hot loop")
    return said


def kernels_of(pattern: str, arch: str) -> dict[str, list[sass.Instruction]]:
    return {name: code for name, code in sass.kernels(arch).items() if fnmatchcase(name, pattern)}
