"""A fuzzer of every operator and public function: no call may crash, hang, read garbage or fail in an unclear way.

    python tests/fuzz.py [--calls 20000] [--seed 0] [--op mala] [--only 123]
    python tests/fuzz.py --sweep

The small launches of bench/sanitize.py are recorded: they give valid arguments to each operator of torch.ops.tilewise
(those of backward passes included) and to each public function. A fuzzed call is one of them with one to three
arguments made hostile. A sweep is not random: each tensor of each function in turn without its memory, on meta, in
another layout, and with a 0 in each of its dimensions. Calls run in a child process; when it dies or a call takes too
long, the call is written down and another child goes on behind it.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import inspect
import math
import os
import random
import re
import resource
import select
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tilewise

ROOT = Path(__file__).resolve().parent.parent
CALL_SECONDS = 60.0
INTEGERS = (0, -1, 1, 2, 3, 7, 2**31, -(2**31), 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, -1.0, 0.5, 1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300, 1e-45)
BRINGS_WORK = (("linear_", "weight"), ("matmul", "b"), ("info_nce", "key"))  # arguments with a size of their own
ENDLESS = ("max_iter", "steps", "n_iter")
WORDS = ("", "none", "mean", "sum", "median", "sqeuclidean", "euclidean", "crs", "wta", "softmax", "dual", "\0")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool,
          torch.complex64)  # fmt: skip
# What a refusal may be; anything else is an accident on the way.
CLEAR = (RuntimeError, ValueError, TypeError, NotImplementedError)
ACCIDENT = re.compile(
    r"API call failed|INTERNAL ASSERT|unknown exception|bad_alloc|std::|'NoneType'|not NoneType|but got NoneType"
)


class Recorded:
    """Stands in for a function and keeps the arguments of its first calls."""

    def __init__(self, function, most: int = 12):
        self.function, self.most, self.calls = function, most, []

    def keep(self, args: tuple, kwargs: dict) -> None:
        if len(self.calls) < self.most:
            self.calls.append((detached(args), detached(kwargs)))

    def __call__(self, *args, **kwargs):
        self.keep(args, kwargs)
        return self.function(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.function, name)


class Listening(TorchDispatchMode):
    """Keeps the arguments of the operators that tilewise calls itself, those of backward passes among them."""

    def __init__(self, recorded: dict[str, Recorded]):
        super().__init__()
        self.recorded = recorded

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        space, _, name = operator._schema.name.partition("::")
        if space == "tilewise":
            self.recorded[name].keep(args, kwargs or {})
        return operator(*args, **(kwargs or {}))


def detached(values):
    if isinstance(values, dict):
        return {name: detached(value) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(map(detached, values))
    return values.detach().clone() if isinstance(values, torch.Tensor) else values


def functions() -> dict[str, tuple[object, str]]:
    """Name -> where each operator ("op") and each public function ("tilewise.op") is found."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tilewise::")]
    operators = {name.removeprefix("tilewise::"): torch.ops.tilewise for name in names}
    public = {name: tilewise for name in tilewise.__all__ if inspect.isfunction(getattr(tilewise, name))}
    return {name: (home, name) for name, home in operators.items()} | {
        f"tilewise.{name}": (home, name) for name, home in public.items()
    }


@functools.cache
def names_of(function: str) -> list[str]:
    home, name = functions()[function]
    if home is tilewise:
        return list(inspect.signature(getattr(home, name)).parameters)
    return [argument.name for argument in getattr(home, name).default._schema.arguments]


def corpus(only: str | None = None) -> dict[str, list[tuple[tuple, dict]]]:
    """Valid calls of every function, or of one."""
    sys.path.insert(0, str(ROOT / "bench"))
    import sanitize

    found = functions()
    recorded = {function: Recorded(getattr(*where)) for function, where in found.items()}
    torch.manual_seed(0)
    for function, where in found.items():
        setattr(*where, recorded[function])
    with Listening(recorded):
        sanitize.small_launches("cpu")
    for function, where in found.items():
        setattr(*where, recorded[function].function)
    if missing := [function for function, recorder in recorded.items() if not recorder.calls]:
        raise SystemExit(f"bench/sanitize.py calls no {', '.join(missing)}")
    return {name: recorder.calls for name, recorder in recorded.items() if only in (None, name)}


def other_layout(tensor: torch.Tensor, choice: random.Random) -> torch.Tensor:
    """The same numbers at other strides."""
    if tensor.dim() == 0:
        return torch.stack([tensor, tensor])[1]
    kind = choice.randrange(4)
    if kind == 0 and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == 1:
        return torch.stack([tensor, tensor], -1)[..., 1]
    if kind == 2:
        return torch.cat([tensor[:1], tensor])[1:] if len(tensor) else tensor
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def hostile_tensor(tensor: torch.Tensor, others: list[torch.Tensor], choice: random.Random) -> tuple[str, object]:
    """A name and a tensor, or something that is none, to stand in the place of `tensor`."""
    kinds = ["layout", "meta", "freed", "dtype", "zero", "empty", "longer", "shorter", "more", "fewer", "expanded",
             "vast", "fill", "alias", "none"]  # fmt: skip
    kind = choice.choice(kinds)
    dim = choice.randrange(tensor.dim()) if tensor.dim() else 0
    if kind == "layout":
        return kind, other_layout(tensor, choice)
    if kind == "meta":
        return kind, tensor.to("meta")
    if kind == "freed":
        return kind, freed(tensor)
    if kind == "dtype":
        return kind, tensor.to(choice.choice(DTYPES))
    if kind == "none":
        return kind, None
    if kind == "alias" and others:
        return kind, choice.choice(others)
    if kind == "fill":
        value = choice.choice(FLOATS if tensor.is_floating_point() else INTEGERS)
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        part = tensor.view(-1)
        if tensor.numel() and choice.random() < 0.5:
            part = part[choice.randrange(tensor.numel()) :][:1]
        part.copy_(torch.tensor(value))
        return f"{kind} {value}", tensor
    if kind == "more":
        return kind, tensor[None]
    if tensor.dim() == 0:
        return "vector", tensor.reshape(1)
    if kind == "fewer":
        return kind, tensor.select(dim, 0) if tensor.shape[dim] else tensor[None]
    if kind in ("zero", "empty"):
        return kind, tensor.narrow(dim, 0, 0)
    if kind == "longer":
        return kind, torch.cat([tensor, tensor], dim)
    if kind == "shorter":
        return kind, tensor.narrow(dim, 0, max(0, tensor.shape[dim] - 1))
    size = list(tensor.shape)
    one = tensor.narrow(dim, 0, min(1, size[dim]))
    if kind == "vast" and size[dim]:
        size[dim] = choice.choice((2**31, 2**33, 2**40))
    return kind, one.expand(size) if one.shape[dim] == 1 else tensor


def hostile(value, others: list[torch.Tensor], choice: random.Random) -> tuple[str, object]:
    if isinstance(value, torch.Tensor):
        return hostile_tensor(value, others, choice)
    if isinstance(value, bool):
        return "flip", not value
    if isinstance(value, list):
        return "list", choice.choice([[], value[:-1], [*value, 1.0], [choice.choice(FLOATS) for _ in value]])
    if value is None:
        return "given", choice.choice([*others, *FLOATS, *INTEGERS]) if others else 1
    if not isinstance(value, int | float | str):
        return "same", value
    pool = INTEGERS if isinstance(value, int) else WORDS if isinstance(value, str) else FLOATS
    other = choice.choice(pool)
    return repr(other), other


@dataclass
class Call:
    """One fuzzed call; the seed and its number make it again."""

    op: str
    args: list
    kwargs: dict
    origin: tuple[tuple, dict]
    changes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.op}: {', '.join(self.changes)}"

    def layout_only(self) -> bool:
        return all(change.endswith("=layout") for change in self.changes)

    def run(self):
        return getattr(*functions()[self.op])(*self.args, **self.kwargs)


def make_call(calls: dict, seed: int, number: int) -> Call:
    choice = random.Random(f"{seed}/{number}")
    op = sorted(calls)[number % len(calls)]
    origin = choice.choice(calls[op])
    call = Call(op, list(detached(origin[0])), detached(origin[1]), origin)
    places = [*range(len(call.args)), *call.kwargs]
    names = names_of(op)
    for place in choice.sample(places, min(len(places), choice.choice((1, 1, 1, 2, 3)))):
        holder = call.args if isinstance(place, int) else call.kwargs
        others = tensors_in((call.args, call.kwargs))
        name = names[place] if isinstance(place, int) else place
        change, holder[place] = hostile(holder[place], others, choice)
        is_work = place == 0 or any(name == of and part in op for part, of in BRINGS_WORK)
        if change == "vast" and is_work:  # which may take as long as it takes
            origin_of = call.origin[0] if isinstance(place, int) else call.origin[1]
            change, holder[place] = "same", origin_of[place]
        if name in ENDLESS and isinstance(holder[place], int):
            change = holder[place] = min(holder[place], 7)  # a solver may take what it is given
        call.changes.append(f"{name}={change}")
    return call


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def sweep(calls: dict) -> list[Call]:
    """One change at a time to the tensors of a function, in a call of each set of tensors that it was recorded with."""
    swept = []
    for op, recorded in sorted(calls.items()):
        names, seen = names_of(op), set()
        for origin in recorded:
            given = {**dict(enumerate(origin[0])), **origin[1]}
            tensors = {place: value for place, value in given.items() if isinstance(value, torch.Tensor)}
            if frozenset(tensors) in seen:
                continue
            seen.add(frozenset(tensors))
            for place, tensor in tensors.items():
                changes = {"freed": freed(tensor), "meta": tensor.to("meta")}
                changes |= {f"layout {seed}": other_layout(tensor, random.Random(seed)) for seed in range(3)}
                changes |= {f"no {dim}": tensor.narrow(dim, 0, 0) for dim in range(tensor.dim())}
                for change, value in changes.items():
                    call = Call(op, list(detached(origin[0])), detached(origin[1]), origin)
                    (call.args if isinstance(place, int) else call.kwargs)[place] = value
                    name = names[place] if isinstance(place, int) else place
                    call.changes.append(f"{name}={change.partition(' ')[0]}")
                    swept.append(call)
    return swept


def tensors_in(value) -> list[torch.Tensor]:
    """Those of tuples, dictionaries and results, which are dataclasses."""
    leaves = tree_leaves(value)
    leaves += [t for leaf in leaves if dataclasses.is_dataclass(leaf) for t in vars(leaf).values()]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def fault_of(call: Call) -> str | None:
    """What is wrong with how a call went, or None."""
    results = []
    for fill in (True, False):  # what nobody writes, or reads too far, differs
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(fill)
        torch.manual_seed(0)
        try:
            results.append(tensors_in(call.run()))
        except CLEAR as error:
            named = str(error).startswith("tilewise.") or "can't allocate memory" in str(error)
            named |= all(t.is_meta for t in tensors_in((call.args, call.kwargs)))  # torch says which have no shapes
            strange = call.op.startswith("tilewise.") and not named
            return f"unclear: {type(error).__name__}: {error}" if strange or ACCIDENT.search(str(error)) else None
        except Exception as error:
            return f"unclear: {type(error).__name__}: {error}"
        if call.op.endswith("_"):
            return None  # it wrote over an argument: a second run is another call
    tensors = tensors_in((call.args, call.kwargs))
    if any(t.is_meta for t in tensors):
        return "a meta tensor beside CPU ones was taken" if any(not t.is_meta for t in results[0]) else None
    for first, second in zip(*results, strict=True):
        if not torch.equal(first.nan_to_num(7.5), second.nan_to_num(7.5)):
            return "two calls differ: memory that was not written is read or returned"
    if call.layout_only():
        torch.manual_seed(0)
        expected = tensors_in(getattr(*functions()[call.op])(*call.origin[0], **call.origin[1]))
        for first, second in zip(results[0], expected, strict=True):
            if not torch.allclose(first.double(), second.double(), rtol=1e-3, atol=1e-5, equal_nan=True):
                return "another layout gives other numbers"
    return None


@dataclass
class Tally:
    operators: set[str] = field(default_factory=set)
    calls: int = 0
    faults: list[str] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)

    def add(self, kind: str, number: int, what: str) -> None:
        self.kinds[kind] += 1
        self.faults.append(f"{kind}: call {number}, {what}")
        print(self.faults[-1], flush=True)

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.kinds[kind]} {kind}" for kind in ("crash", "hang", "fault"))
        return f"{len(self.operators)} operators, {self.calls} calls: {kinds}"


def run_calls(make: Callable[[int], Call], options: argparse.Namespace, start: int, out: int) -> None:
    """In a child: tells of each call before and after it."""
    if options.memory:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (options.memory << 30),) * 2)
    with open(out, "w", buffering=1) as tell:
        for number in range(start, options.calls):
            call = make(number)
            print(f"call {number} {call}", file=tell)
            fault = fault_of(call)
            print(f"fault {' '.join(fault.split())}" if fault else "done", file=tell)
        print("end", file=tell)


def watch(make: Callable[[int], Call], options: argparse.Namespace, tally: Tally, start: int) -> int | None:
    """Forks a child that begins with call `start`; the number to go on with, or None at the end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        run_calls(make, options, start, write)
        os._exit(0)
    os.close(write)
    number, what, buffer = start, "the first call", b""
    while True:
        if not select.select([read], [], [], CALL_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            kind, detail = "hang", f"{CALL_SECONDS:.0f} s"
            break
        part = os.read(read, 1 << 16)
        if not part:
            kind, detail = "crash", "the process died"
            break
        *lines, buffer = (buffer + part).split(b"\n")
        for line in (line.decode() for line in lines):
            if line.startswith("call "):
                _, text, what = line.split(" ", 2)
                number = int(text)
                tally.calls += 1
                tally.operators.add(what.partition(":")[0])
            elif line.startswith("fault "):
                tally.add("fault", number, f"{what}: {line.removeprefix('fault ')}")
        if lines and lines[-1] == b"end":
            kind = ""
            break
    os.close(read)
    os.waitpid(child, 0)
    if not kind:
        return None
    tally.add(kind, number, f"{what}: {detail}")
    return number + 1


def fuzz(options: argparse.Namespace) -> Tally:
    """A child inherits the recorded calls: it starts at once. One thread, for OpenMP's do not survive a fork."""
    torch.set_num_threads(1)
    calls, tally, start = corpus(options.op), Tally(), 0
    make = functools.partial(make_call, calls, options.seed)
    if options.sweep:
        swept = sweep(calls)
        make, options.calls = swept.__getitem__, len(swept)
    while start is not None and start < options.calls:
        start = watch(make, options, tally, start)
    return tally


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=4, help="GiB that a call may take; 0: all (for sanitizers)")
    parser.add_argument("--sweep", action="store_true", help="each tensor in turn, without chance")
    parser.add_argument("--op", help="only this operator")
    parser.add_argument("--only", type=int, help="only the call of this number, in this process")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.only is not None:
        call = make_call(corpus(options.op), options.seed, options.only)
        print(call, call.args, call.kwargs, fault_of(call), sep="\n")
        return 0
    tally = fuzz(options)
    print(tally)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
