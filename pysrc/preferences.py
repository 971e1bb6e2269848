"""Which calls `auto` gives to Triton where the CUDA library has a kernel for them, too, and why."""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch


class Preference(NamedTuple):
    ops: tuple[str, ...]  # each with a module of its name
    applies: Callable[[tuple, dict], bool]  # to all inputs and options of a call
    calls: str
    why: str


def _narrow_and_not_causal(inputs: tuple, options: dict) -> bool:
    return inputs[0].dtype in (torch.bfloat16, torch.float16) and not options["causal"]


TRITON_FIRST = (
    Preference(
        ops=("mala", "mala_backward"),
        applies=_narrow_and_not_causal,
        calls="mala of 16-bit tensors that is not causal",
        why="its products run on tensor cores, the library's do not: 4 times as fast on an H100 is predicted, not "
        "measured. Causal ones would keep the sums of every 16 tokens.",
    ),
)


def choosers(key: str = "CUDA", package: str = "tilewise.triton_kernels") -> dict[str, Callable]:
    """For each operator of the table a function that calls the kernel that is preferred; Triton's are imported when
    they are first needed."""
    return {op: _chooser(op, key, preference, package) for preference in TRITON_FIRST for op in preference.ops}


@functools.cache
def _compiled(op: str, key: str):
    """The library's kernel, looked up before another is put over it."""
    return torch.library.get_kernel(f"tilewise::{op}", key)


def _chooser(op: str, key: str, preference: Preference, package: str) -> Callable:
    compiled, keys = _compiled(op, key), torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def choose(*inputs, **options):
        if preference.applies(inputs, options):
            return importlib.import_module(f"{package}.{op}").OPS[op](*inputs, **options)
        return compiled.call_boxed(keys, *inputs, **options)

    return choose
