"""What machine code says of a kernel without a GPU: its loops, and in each what it loads, computes and waits for.

The CUDA library is disassembled once per architecture and kept under build/sass by the library's content."""

import functools
import hashlib
import heapq
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tilewise import loading

CACHE = Path(__file__).resolve().parents[2] / "build" / "sass"
COMPILER = "nvcc 13.0"  # whose figures the tables of budgets and launches have
STEP = 16  # bytes of an instruction
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+) +)?([A-Z][\w.]*) *(.*?) *;", re.MULTILINE)
TENSOR = re.compile(r"(H|I|D|B|Q|O|HG|IG|QG|BG|UTC[A-Z]*)MMA\b")
DOUBLE = re.compile(r"D(ADD|FMA|MUL|SETP|MNMX|MMA)\b|.*\.F64\b")
LOCAL = re.compile(r"(LDL|STL)\b")
GLOBAL = re.compile(r"(LDG|LDGSTS|STG)\b")
REGISTER = re.compile(r"\bR(\d+)")
STRANGE = (LOCAL, DOUBLE, TENSOR)


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate without which it does nothing, or ""
    opcode: str  # with its modifiers
    operands: str

    @property
    def calls(self) -> bool:
        """Calls a subroutine. A call under a predicate is a jump on sm_80: nothing returns from it."""
        return self.opcode.startswith("CALL") and not self.guard

    @property
    def target(self) -> int | None:
        """Where a branch goes. Of BRA.DIV nowhere: it leaves for what a warp does that has diverged at a shuffle."""
        if not self.opcode.startswith(("BRA", "CALL")) or self.opcode == "BRA.DIV" or self.calls:
            return None
        place = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(place[1], 16) if place else None

    @property
    def ends(self) -> bool:
        """Nothing falls through it to the next one. Other branches take a predicate as an operand."""
        if self.guard or not self.opcode.startswith(("EXIT", "RET", "BRX", "BRA")):
            return False
        return self.opcode not in ("BRA.DIV", "BRA.CONV") and not re.search(r"P\d", self.operands)


class Loop(NamedTuple):
    first: int  # its header's address
    depth: int  # 0: inside no other
    innermost: bool
    own: list[Instruction]  # all but those of loops inside it
    shortest: list[Instruction]  # of these, on the way round that has the fewest: no rare case, no option


class Figures(NamedTuple):
    """Of one way round a loop."""

    instructions: int
    memory: str  # global loads and stores by their bits: `4 LDG.128, 4 STG.128`
    in_flight: int  # the most loads that are waited for at a time
    special: int  # exponentials, reciprocals, .. (MUFU)
    strange: set[str]  # opcodes that a hot loop has only where it is meant to: memory of a thread, doubles, calls, ..


def instructions_of(text: str) -> list[Instruction]:
    return [Instruction(int(place, 16), guard, *rest) for place, guard, *rest in LINE.findall(text)]


def missing() -> str:
    """Why the CUDA library cannot be read; empty when it can."""
    if reason := loading.build_info()["no_cuda_reason"]:
        return f"the CUDA library is not built: {reason}"
    absent = {"Triton, which brings cuobjdump,": find_spec("triton"), "c++filt": shutil.which("c++filt")}
    return next((f"{what} is not installed" for what, there in absent.items() if not there), "")


def another_compiler() -> str:
    """Why the figures of the tables are not the library's; empty when they are."""
    compiler = loading.build_info()["cuda_compiler"]
    return "" if compiler.startswith(COMPILER) else f"the figures are those of {COMPILER}, not of {compiler}"


def is_built(arch: str) -> bool:
    return arch in loading.build_info()["cuda_architectures"]


def cuobjdump(*arguments: str) -> list[str]:
    from triton import knobs

    return [knobs.nvidia.cuobjdump.path, *arguments]


@functools.cache
def library_hash() -> str:
    return hashlib.sha256(loading.library_path("tilewise_cuda").read_bytes()).hexdigest()[:16]


@functools.cache
def kernels(arch: str) -> dict[str, list[Instruction]]:
    """Of the built CUDA library, by readable names; none where it is not built for `arch`."""
    if not is_built(arch):
        return {}
    kept = CACHE / library_hash() / f"sm_{arch}.txt"
    if not kept.exists():
        for old in CACHE.glob("*"):
            if old != kept.parent:
                shutil.rmtree(old, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_text(disassembled(loading.library_path("tilewise_cuda"), arch))
        unfinished.rename(kept)
    return kernels_of(kept.read_text())


def disassembled(path: Path, arch: str) -> str:
    """A library or a cubin as text: a line for each function and each instruction, without the encodings."""
    command = cuobjdump("-sass", "-arch", f"sm_{arch}", str(path))
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if " ;" in line:
                lines.append(line.partition(" ;")[0].rstrip() + " ;\n")
            elif "Function : " in line:
                lines.append(line)
    if process.returncode:
        raise RuntimeError(f"cuobjdump failed on {path}")
    return "".join(lines)


def kernels_of(text: str) -> dict[str, list[Instruction]]:
    names, _, codes = zip(*[part.partition("\n") for part in text.split("Function : ")[1:]], strict=True)
    return dict(zip(readable(names), map(instructions_of, codes), strict=True))


def readable(names: Iterable[str]) -> list[str]:
    """`row_gradient_kernel<float, AffineGradient, ..>` of mangled names."""
    command = ["c++filt", *(name.strip() for name in names)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    unneeded = re.compile(r"tilewise::|\(anonymous namespace\)::|^void |\(.*")
    return [unneeded.sub("", line).replace("> >", ">>") for line in lines]


# ---- loops


def blocks_of(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """The basic blocks and which follow each."""
    places = {instruction.address for instruction in code}
    starts = {code[0].address} | {i.target for i in code if i.target in places}
    starts |= {i.address + STEP for i in code if i.target is not None or i.ends}
    blocks = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    index = {block[0].address: i for i, block in enumerate(blocks)}
    following = []
    for i, block in enumerate(blocks):
        last = block[-1]
        after = [] if last.ends or i + 1 == len(blocks) else [i + 1]
        following.append(after + ([index[last.target]] if last.target in index else []))
    return blocks, following


def dominators(following: list[list[int]]) -> dict[int, int]:
    """Of each block that is reached from the first, the nearest one that every way to it passes."""
    order, seen, stack = [], {0}, [(0, iter(following[0]))]
    while stack:
        block, rest = stack[-1]
        step = next((n for n in rest if n not in seen), None)
        if step is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(following[step])))
    rank = {block: i for i, block in enumerate(order)}
    before = {block: [] for block in order}
    for block in order:
        for after in following[block]:
            before[after].append(block)
    nearest, changed = {0: 0}, True
    while changed:
        changed = False
        for block in order[-2::-1]:
            found = None
            for other in before[block]:
                if other not in nearest:
                    continue
                if found is None:
                    found = other
                while found != other:
                    if rank[found] < rank[other]:
                        found = nearest[found]
                    else:
                        other = nearest[other]
            if nearest.get(block) != found:
                nearest[block], changed = found, True
    return nearest


def loops_of(code: list[Instruction]) -> list[Loop]:
    """The natural loops; blocks that the compiler moved out of their way belong to them."""
    blocks, following = blocks_of(code)
    nearest = dominators(following)
    before = {block: [] for block in nearest}
    for block in nearest:
        for after in following[block]:
            before[after].append(block)
    bodies: dict[int, set[int]] = {}
    for block in nearest:
        for header in following[block]:
            above = block
            while above not in (header, 0):
                above = nearest[above]
            if above != header:
                continue
            body, stack = bodies.setdefault(header, {header}), [block]
            while stack:
                at = stack.pop()
                if at not in body:
                    body.add(at)
                    stack += before[at]
    loops = []
    for header, body in bodies.items():
        inner = set().union(*(other for at, other in bodies.items() if at != header and at in body))
        depth = sum(header in other for at, other in bodies.items() if at != header)
        own, shortest = (
            [i for block in way if block not in inner for i in blocks[block]]
            for way in (sorted(body), shortest_way(header, body, inner, blocks, following))
        )
        loops.append(Loop(blocks[header][0].address, depth, not inner, own, shortest))
    return sorted(loops)


def shortest_way(header: int, body: set[int], inner: set[int], blocks: list, following: list) -> list[int]:
    """The blocks from the header back to it with the fewest instructions; those of loops inside count for nothing."""
    heap, seen = [(0, [header])], set()
    while heap:
        length, way = heapq.heappop(heap)
        if way[-1] in seen:
            continue
        seen.add(way[-1])
        if header in following[way[-1]]:
            return way
        for after in following[way[-1]]:
            if after in body:
                heapq.heappush(heap, (length + (0 if after in inner else len(blocks[after])), [*way, after]))
    raise AssertionError("a loop has a way round")


# ---- figures


def kind_of(opcode: str) -> str:
    """`LDG.128` of LDG.E.128.CONSTANT: of global memory the bits, of all others the opcode."""
    if not GLOBAL.match(opcode):
        return opcode
    bits = re.search(r"\.(256|128|64|[US]?16|[US]?8)\b", opcode)
    return f"{opcode.partition('.')[0]}.{bits[1].lstrip('US') if bits else 32}"


def memory_of(code: list[Instruction]) -> str:
    kinds = Counter(kind_of(i.opcode) for i in code if GLOBAL.match(i.opcode))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def loads_in_flight(code: list[Instruction]) -> int:
    """The most global loads whose result nobody has asked for, in the order of the code and going round once."""
    waiting, most = [], 0
    for instruction in code * 2:
        named = set(map(int, REGISTER.findall(instruction.operands)))
        waiting = [results for results in waiting if not named & results]
        if instruction.opcode.startswith("LDG.") and (result := re.match(r"R(\d+)", instruction.operands)):
            registers = int(kind_of(instruction.opcode)[4:]) // 32 or 1
            waiting.append(set(range(int(result[1]), int(result[1]) + registers)))
            most = max(most, len(waiting))
    return most


def count(code: list[Instruction], pattern: str | re.Pattern) -> int:
    return sum(re.match(pattern, kind_of(instruction.opcode)) is not None for instruction in code)


def figures_of(code: list[Instruction]) -> Figures:
    strange = {i.opcode.split(".")[0] for i in code if i.calls or any(p.match(i.opcode) for p in STRANGE)}
    return Figures(len(code), memory_of(code), loads_in_flight(code), count(code, "MUFU"), strange)
