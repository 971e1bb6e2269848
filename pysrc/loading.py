"""Loads the compiled libraries, which register ``torch.ops.tilewise``, and records what was loaded and what was not."""

import ctypes
import functools
import json
import os
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "lib"
OLDEST_TORCH = (2, 11)

# Library name -> why it is not loaded; empty when it is.
why_not_loaded: dict[str, str] = {}


@functools.cache
def build_info() -> dict:
    """What the build wrote down: torch, compilers, instruction sets, CUDA architectures or why there are none."""
    return json.loads((FOLDER / "build_info.json").read_text())


def library_path(name: str) -> Path:
    return FOLDER / f"lib{name}.so"


def _text_of(function: str) -> str | None:
    """What a function of the CPU library without arguments says."""
    call = getattr(ctypes.CDLL(str(library_path("tilewise_cpu"))), function)
    call.restype = ctypes.c_char_p
    text = call()
    return text and text.decode()


def cpu_isas() -> list[str]:
    """The instruction sets with kernels that this processor has, the best one last."""
    return _text_of("tilewise_cpu_isas").split(", ")


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run with: the best, or the one that TILEWISE_CPU_ISA names."""
    if isa := _text_of("tilewise_cpu_isa"):
        return isa
    raise ImportError(
        f"tilewise: expected TILEWISE_CPU_ISA to be one of {', '.join(cpu_isas())} on this processor, "
        f"got {os.environ['TILEWISE_CPU_ISA']!r}"
    )


def load_libraries() -> None:
    """Loads the CPU library, which must be there, and the CUDA library when this torch can use it."""
    if torch.__version__ < OLDEST_TORCH:
        raise ImportError(f"tilewise needs torch >= 2.11, found {torch.__version__}.")
    path = library_path("tilewise_cpu")
    if not path.exists():
        raise ImportError(
            f"tilewise has not been compiled: {path} is missing; run pip install --no-build-isolation . in its source."
        )
    torch.ops.load_library(path)
    why_not_loaded["tilewise_cpu"] = ""
    why_not_loaded["tilewise_cuda"] = _load_cuda()


def _load_cuda() -> str:
    if reason := build_info()["no_cuda_reason"]:
        return f"not built ({reason})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.ops.load_library(library_path("tilewise_cuda"))
    except OSError as error:
        warnings.warn(f"tilewise: the CUDA library could not be loaded: {error}", stacklevel=2)
        return f"it could not be loaded ({error})"
    return ""
