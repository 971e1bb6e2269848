"""How many blocks of a launch a multiprocessor holds: by its threads, and by the registers and the shared memory that
the machine code of the CUDA library takes. Needs no GPU."""

import functools
import re
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import sass
from multiprocessors import PARTS, RESERVED, Part, resident

from tilewise import loading


@dataclass(frozen=True)
class Launch:
    kernel: str  # a readable name, or a pattern of several
    grid: tuple[int, ...]  # any, for what a multiprocessor holds
    block: tuple[int, ...]
    shared_bytes: int  # asked for at the launch

    @property
    def warps(self) -> int:
        return prod(self.block) // 32


@dataclass(frozen=True)
class Usage:
    registers: int  # of a thread
    shared_bytes: int  # static, of a block
    local_bytes: int  # of a thread: spilled


@functools.cache
def usages(arch: str) -> dict[str, Usage]:
    """Of the kernels of the CUDA library, by readable names; none where it is not built for `arch`."""
    if not sass.is_built(arch):
        return {}
    command = sass.cuobjdump("-res-usage", str(loading.library_path("tilewise_cuda")))
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    own = "".join(part for part in report.split("Fatbin elf code") if f"arch = sm_{arch}\n" in part)
    return usages_of(own, RESERVED if int(arch) >= 90 else 0)


def usages_of(report: str, reserved: int) -> dict[str, Usage]:
    """Of the shared memory that a kernel is reported to have, `reserved` bytes are not its own."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    names, *figures = zip(*re.findall(pattern, report), strict=True)
    found = zip(*[map(int, column) for column in figures], strict=True)
    return {
        name: Usage(registers, max(shared - reserved, 0), stack + local)
        for name, (registers, stack, shared, local) in zip(sass.readable(names), found, strict=True)
    }


def fits(launch: Launch, usage: Usage, part: Part) -> bool:
    return launch.shared_bytes + usage.shared_bytes <= part.block_shared


def resident_blocks(launch: Launch, usage: Usage, part: Part) -> int:
    """On a multiprocessor at a time; 0 where a block does not fit."""
    return resident(part, 32 * launch.warps, usage.registers, launch.shared_bytes + usage.shared_bytes)


def usages_like(pattern: str, arch: str) -> list[Usage]:
    return [usage for name, usage in usages(arch).items() if fnmatchcase(name, pattern)]


def resident_warps(launch: Launch, arch: str) -> int:
    """On a multiprocessor of compute capability `arch`, of that kernel of the launch's name that has the fewest; 0
    without one."""
    part = PARTS[arch]
    each = [resident_blocks(launch, usage, part) for usage in usages_like(launch.kernel, part.code)]
    return launch.warps * min(each, default=0)
