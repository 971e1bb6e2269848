"""Prints what the machine code of the CUDA library says of its kernels: `make resources`. With --write, which is
`make resources WRITE=1`, the figures of its loops become the budgets of sass_budgets.txt. With a part of a kernel's
name, `make resources KERNEL=half_step`, it prints the loops of such kernels, to write a budget from."""

import sys
from collections import Counter
from fnmatch import fnmatchcase

import launches
import occupancy
import sass
import sass_budgets
from multiprocessors import PARTS
from sass_budgets import ARCHITECTURES, LIMITS, TABLE, Budget


def print_occupancy() -> None:
    print("Registers of a thread by code, warps of a multiprocessor (and blocks) by GPU: the worst of each name\n")
    heads = "".join(f"{'sm_' + arch:>9}" for arch in PARTS)
    print(f"{'kernel':60} {'threads':>7} {'shared':>7} {'registers':>11}{heads}")
    for launch, _ in launches.CASES:
        of_name = [occupancy.usages_like(launch.kernel, arch) for arch in ARCHITECTURES]
        registers = [max((usage.registers for usage in usages), default=0) for usages in of_name]
        warps = [occupancy.resident_warps(launch, arch) for arch in PARTS]
        shape = f"{32 * launch.warps:7} {launch.shared_bytes:7} {'/'.join(map(str, registers)):>11}"
        print(f"{launch.kernel:60} {shape}" + "".join(f"{count:4} ({count // launch.warps:2})" for count in warps))


def worst(budget: Budget, pattern: str, arch: str) -> sass_budgets.Measured | None:
    found = [sass_budgets.measured(budget, code) for code in sass_budgets.kernels_of(pattern, arch).values()]
    return max(filter(None, found), default=None, key=lambda measured: measured.instructions)


def print_loops() -> None:
    print("\nInstructions per element of hot loops; on sm_90 loads in flight, special functions, global memory\n")
    heads = "".join(f"{'sm_' + arch:>8}" for arch in ARCHITECTURES)
    print(f"{'kernel':60} {heads}  {'element':13} flight special  loads and stores")
    for budget in sass_budgets.budgets():
        for pattern in budget.limits:
            found = [worst(budget, pattern, arch) for arch in ARCHITECTURES]
            line = "".join(f"{one.instructions:8.2f}" if one else f"{'none':>8}" for one in found)
            if one := found[ARCHITECTURES.index("90")]:
                memory = " or ".join(moved or "none" for moved in one.memory)
                line += f"  {budget.element:13} {one.in_flight:6} {one.special:7.2f}  {memory}"
            print(f"{pattern:60} {line}")


def print_uncovered() -> None:
    patterns = {pattern for budget in sass_budgets.budgets() for pattern in budget.limits}
    names = sorted(sass.kernels(ARCHITECTURES[-1]))
    without = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    print("\nWithout a budget:", *without, sep="\n")


def print_kernel(part: str) -> None:
    for arch in filter(sass.is_built, ARCHITECTURES):
        for name, code in sass.kernels(arch).items():
            if part not in name:
                continue
            print(f"\nsm_{arch} {name}: {len(code)} instructions")
            for loop in sass.loops_of(code):
                figures = sass.figures_of(loop.shortest)
                kinds = Counter(sass.kind_of(instruction.opcode).partition(".")[0] for instruction in loop.own)
                mixed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
                print(
                    f"{'  ' * loop.depth}  at {loop.first:#x} {figures.instructions} to {len(loop.own)} instructions; "
                    f"{sass.memory_of(loop.own) or 'no global memory'}, {figures.in_flight} in flight; {mixed}"
                )


def write() -> None:
    blocks = TABLE.read_text().split("\n\n")
    for i, block in enumerate(blocks):
        if "\nwhy: " not in f"\n{block}":
            continue
        budget = sass_budgets.budget_of(block)

        def line(match, budget=budget):
            found = [worst(budget, match[4], arch) for arch in ARCHITECTURES]
            figures = [
                one.instructions if one else float(before)
                for one, before in zip(found, match.groups()[:3], strict=True)
            ]
            return "".join(f"{figure:8.2f}" for figure in figures) + f"  {match[4]}"

        blocks[i] = LIMITS.sub(line, block)
    TABLE.write_text("\n\n".join(blocks))


if __name__ == "__main__":
    if reason := sass.missing():
        sys.exit(reason)
    options, parts = ([a for a in sys.argv[1:] if a.startswith("--") == is_option] for is_option in (True, False))
    if "--write" in options:
        write()
    for part in parts:
        print_kernel(part)
    if not parts:
        print_occupancy()
        print_loops()
        print_uncovered()
