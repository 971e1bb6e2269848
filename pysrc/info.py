"""``python -m tilewise.info``: what was built, what was loaded, what serves each device, and why not the rest."""

import importlib.metadata
import importlib.util
import platform
import sys

import torch

from tilewise import loading
from tilewise.backend import NAMES, current, served, why_not
from tilewise.version import __version__


def _built() -> list[str]:
    info = loading.build_info()
    cuda = f"not built ({info['no_cuda_reason']})"
    if info["cuda_compiler"]:
        cuda = f"{', '.join(f'sm_{arch}' for arch in info['cuda_architectures'])}, by {info['cuda_compiler']}"
    return [
        f"with torch {info['torch']}, for torch >= {'.'.join(map(str, loading.OLDEST_TORCH))}",
        f"CPU: {', '.join(info['cpu_instruction_sets'])}, by {info['cxx_compiler']}",
        f"CUDA: {cuda}",
    ]


def _loaded() -> list[str]:
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
    libraries = [
        f"lib{name}: {f'no, {reason}' if reason else 'yes'}" for name, reason in loading.why_not_loaded.items()
    ]
    return [*libraries, f"Triton: {triton}"]


def _chosen() -> list[str]:
    devices = [f"{device} tensors: {server}" for device, server in served().items()]
    return [f"backend: {current()}", *devices, f"CPU instruction set: {loading.cpu_isa()}"]


def report() -> str:
    """The text that ``python -m tilewise.info`` prints."""
    refused = [f"{name}: {reason}" for name in NAMES if (reason := why_not(name))]
    sections = {"built": _built(), "loaded": _loaded(), "chosen": _chosen(), "not to be had": refused or ["nothing"]}
    lines = [f"tilewise {__version__}, torch {torch.__version__}, Python {platform.python_version()} on {sys.platform}"]
    for title, rows in sections.items():
        lines += [title, *(f"  {row}" for row in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
