"""Launches of the .cu files at any size, recorded instead of run (recording.h), and what a trace is made of."""

import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from ctypes import POINTER, c_char_p, c_int64, c_uint32, c_uint64, c_void_p
from math import prod
from typing import NamedTuple

import emulated

SOMEWHERE = 4096  # a pointer that is not null


class Sizes(NamedTuple):
    """What a launch works on; its kernel reads of them what it has."""

    batch: int = 1
    rows: int = 1
    columns: int = 1
    width: int = 0  # features, or values of a row
    item: int = 4  # bytes of an element
    steps: int = 1  # iterations, or parts that a sum has
    k: int = 0
    gradient: bool = False
    causal: bool = False

    @property
    def cells(self) -> int:
        return self.batch * self.rows * self.columns


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    sizes: Sizes

    @property
    def blocks(self) -> int:
        return prod(self.grid)

    @property
    def threads(self) -> int:
        return prod(self.block)


class Product(NamedTuple):
    """A matrix product by the BLAS: (rows, depth) by (depth, columns)."""

    rows: int
    columns: int
    depth: int
    item: int  # bytes of a factor's element
    out: int  # bytes that the result moves for each of its elements


class Torch(NamedTuple):
    """Operations of torch around the launches."""

    what: str
    bytes: int
    launches: int = 1


Step = Launch | Product | Torch


class Phase(NamedTuple):
    steps: Counter[Step]  # how often each comes, in the order of their first
    scratch: int  # bytes

    @classmethod
    def of(cls, steps: Iterable[Step], scratch: int = 0) -> "Phase":
        return cls(Counter(steps), scratch)


class _Launch(ctypes.Structure):
    """Mirrors `Launch` of recording.h."""

    _fields_ = [("kernel", c_void_p), ("grid", c_uint32 * 3), ("block", c_uint32 * 3), ("shared_bytes", c_uint64)]


def short(symbol: str) -> str:
    """The kernel's name and template arguments of a demangled function, without namespaces and parameters."""
    plain = re.sub(r"tilewise::|\(anonymous namespace\)::|\[.*?\]", "", symbol).removeprefix("void ").strip()
    name = re.match(r"\w+", plain).group()
    rest, depth = plain[len(name) :], 0
    if not rest.startswith("<"):
        return name
    for end, letter in enumerate(rest):
        depth += (letter == "<") - (letter == ">")
        if depth == 0:
            return name + rest[: end + 1]
    raise ValueError(symbol)


class Recorder:
    """Calls launch functions of the emulator's library and lists what they launch."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.end_recording.argtypes = [POINTER(POINTER(_Launch)), POINTER(c_int64)]
        library.end_recording.restype = c_int64
        library.row_reduction.argtypes, library.row_reduction.restype = [c_int64], c_char_p
        for name, count in (("pair_rows", 2), ("pair_gradient_rows", 3), ("logit_rows", 3), ("logit_classes", 3)):
            function = getattr(library, name)
            function.argtypes, function.restype = [c_int64] * count, c_int64
        listed = subprocess.run(["nm", "-C", library._name], capture_output=True, text=True, check=True).stdout
        symbols = [(int(line[:16], 16), line[19:]) for line in listed.splitlines() if line[:16].strip()]
        own = next(address for address, name in symbols if name == "begin_recording")
        base = ctypes.cast(library.begin_recording, c_void_p).value - own
        self.names = {base + address: short(name) for address, name in symbols if re.search(r"\w_kernel\b", name)}
        self.scratch = 0  # bytes that the last call takes

    def __call__(self, function: str, *arguments, sizes: Sizes) -> list[Launch]:
        self.library.begin_recording()
        emulated.checked(getattr(self.library, function)(*arguments))
        launches, scratch = POINTER(_Launch)(), c_int64()
        count = self.library.end_recording(ctypes.byref(launches), ctypes.byref(scratch))
        self.scratch = scratch.value
        return [
            Launch(self.names[at.kernel], tuple(at.grid), tuple(at.block), at.shared_bytes, sizes)
            for at in launches[:count]
        ]
