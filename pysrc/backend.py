"""Which kernels serve ``torch.ops.tilewise``: C++, CUDA, Triton or the plain PyTorch reference."""

import importlib
import importlib.util
import os
import pkgutil
import threading
from collections.abc import Callable

import torch

from tilewise import loading
from tilewise.ops import register

NAMES = ("auto", "cuda", "triton", "cpu", "reference")

_switching = threading.RLock()
_chosen: list["backend"] = []  # that act, the one in use last
_current = "auto"
_served: dict[str, str] = {}  # dispatch key -> who serves it, or why nobody does


class backend:
    """Chooses the kernels that serve every tilewise operator, for the whole process.

    Acts at once; as a context manager it ends at the end of the block, like ``torch.set_grad_enabled``, may be entered
    again, and may end before one that was entered later. The environment variable ``TILEWISE_BACKEND`` sets it when
    tilewise is imported. Switching changes what the operators of all threads are: no other thread may be calling one
    meanwhile.

    Args:
        name: ``"auto"`` (the default): the C++ kernels for CPU tensors; for CUDA tensors the CUDA library when it is
            loaded, without it Triton when it is installed, else an error when an operator is called.
            ``"cuda"``, ``"triton"``: these kernels for CUDA tensors; CPU tensors keep the C++ kernels (with
            ``TRITON_INTERPRET=1`` Triton's interpreter serves them).
            ``"cpu"``: the C++ kernels for CPU tensors; CUDA tensors are refused.
            ``"reference"``: plain PyTorch for both.
            Operators composed of PyTorch's own (``linear_z_loss`` and its siblings) need no kernel: they serve every
            device under each of these but the reference, which has their dense form.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend cannot be had here; the message says why.

    Example:
        >>> import torch, tilewise
        >>> logits, target = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
        >>> with tilewise.backend("reference"):
        ...     expected = tilewise.cross_entropy(logits, target)
        >>> torch.testing.assert_close(tilewise.cross_entropy(logits, target), expected)
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"tilewise.backend: expected one of {', '.join(NAMES)}, got {name!r}")
        if reason := why_not(name):
            raise RuntimeError(f"tilewise.backend: {name!r} cannot be used: {reason}")
        self.name = name
        self.entered = 0  # blocks that it is in
        self._begin()

    def __enter__(self) -> "backend":
        if self.entered or self not in _chosen:
            self._begin()
        self.entered += 1
        return self

    def __exit__(self, *exception) -> None:
        with _switching:
            self.entered -= 1
            last = len(_chosen) - 1 - _chosen[::-1].index(self)
            later = [other for other in _chosen[last + 1 :] if other.entered]  # others end with the block they are in
            _chosen[last:] = later
            _switch(_chosen[-1].name if _chosen else "auto")

    def _begin(self) -> None:
        with _switching:
            _switch(self.name)
            _chosen.append(self)

    def __repr__(self) -> str:
        return f"tilewise.backend({self.name!r})"


def current() -> str:
    """The name of the backend in use."""
    return _current


def served() -> dict[str, str]:
    """Who serves the tensors of each device: ``{"CPU": ..., "CUDA": ...}``."""
    return dict(_served)


def why_not(name: str) -> str:
    """Why a backend cannot be had here; empty when it can."""
    if name == "triton" and not _interpreting():
        return _why_not_triton() or _why_no_gpu()
    if name == "triton":
        return _why_not_triton()
    if name == "cuda":
        return _why_not_cuda() or _why_no_gpu()
    return ""


def start() -> None:
    """Called once, when tilewise is imported."""
    _switch("auto")
    if name := os.environ.get("TILEWISE_BACKEND"):
        backend(name)


def _why_not_cuda() -> str:
    reason = loading.why_not_loaded["tilewise_cuda"]
    return f"the CUDA library is not loaded: {reason}" if reason else ""


def _why_not_triton() -> str:
    return "" if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


def _why_no_gpu() -> str:
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _implementations(package: str) -> dict[str, Callable]:
    """Operator name -> function, from the dictionary OPS of every module of a package."""
    path = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(path)]
    return {name: function for module in modules for name, function in getattr(module, "OPS", {}).items()}


def _composite(name: str) -> bool:
    """Whether an operator is composed of PyTorch's own, so that one implementation serves every device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"tilewise::{name}", "CompositeExplicitAutograd")


def _refusals(reason: str) -> dict[str, Callable]:
    """For every operator that needs a kernel a function that says why CUDA tensors cannot be served."""

    def refuse(name: str) -> Callable:
        def refused(*args, **kwargs):
            raise RuntimeError(f"tilewise.{name}: no kernel for CUDA tensors: {reason}")

        return refused

    return {name: refuse(name) for name in _implementations("tilewise.reference") if not _composite(name)}


def _plan(name: str) -> tuple[dict[str, str], dict[str, dict[str, Callable]]]:
    """Who serves each dispatch key, and the Python functions that this takes over the compiled kernels."""
    cpu = f"C++ ({loading.cpu_isa()})"
    if name == "reference":
        functions = _implementations("tilewise.reference")
        return {"CPU": "PyTorch reference", "CUDA": "PyTorch reference"}, {"CPU": functions, "CUDA": functions}
    if name == "cpu":
        reason = "tilewise.backend('cpu') is in use"
        return {"CPU": cpu, "CUDA": f"nothing: {reason}"}, {"CUDA": _refusals(reason)}
    if name == "triton":
        functions = _implementations("tilewise.triton_kernels")
        if _interpreting():
            return {"CPU": "Triton interpreter", "CUDA": "Triton interpreter"}, {"CPU": functions, "CUDA": functions}
        return {"CPU": cpu, "CUDA": "Triton"}, {"CUDA": functions}
    if name == "cuda" or not _why_not_cuda():
        return {"CPU": cpu, "CUDA": "CUDA C++"}, {}
    if not torch.backends.cuda.is_built():
        return {"CPU": cpu, "CUDA": f"nothing: torch {torch.__version__} is built without CUDA"}, {}
    if not _why_not_triton():
        return {"CPU": cpu, "CUDA": "Triton"}, {"CUDA": _implementations("tilewise.triton_kernels")}
    reason = f"{_why_not_cuda()}, and {_why_not_triton()}"
    return {"CPU": cpu, "CUDA": f"nothing: {reason}"}, {"CUDA": _refusals(reason)}


def _switch(name: str) -> None:
    global _current, _served
    served, kernels = _plan(name)
    register.serve(kernels)
    _current, _served = name, served
