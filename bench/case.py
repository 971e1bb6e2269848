"""What a benchmark case is: inputs, contenders, the work it must do, and how right its answers have to be."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

PHASES = ("forward", "backward", "both")
SCALAR_ERROR = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-3}
GRADIENT_ERROR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2}
ROWS, LAYERS, PAIRS, ATTENTION = "row losses", "output layers", "pairwise losses", "attention"
TRANSPORT, SAMPLED = "optimal transport", "sampled products"

Reference = tuple[float, list[tuple[Tensor, Tensor]]]  # float64 loss; per leaf some row indices, gradient of those rows


def family(op: str) -> str:
    """What its module in bench/cases declares."""
    return importlib.import_module(f"cases.{op}").FAMILY


def forms_products(op: str) -> bool:
    """Losses of rows of logits, and transport, are bound by memory; what forms logits or similarities, by products."""
    return family(op) not in (ROWS, TRANSPORT)


@dataclass(frozen=True)
class Contender:
    """One implementation. `loss(*inputs)` gives a scalar; None stands for a plain copy of the first input."""

    name: str
    loss: Callable[..., Tensor] | None
    backend: str = "torch"
    ours: bool = False
    same: bool = True  # computes the case's function; otherwise it stands beside it, and has no error

    def selected(self):
        """The context in which our operators run on this contender's backend."""
        return importlib.import_module("tilewise").backend(self.backend) if self.ours else contextlib.nullcontext()


@dataclass(frozen=True)
class Case:
    """One operator at one size. Byte and operation counts are what any implementation has to spend."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    inputs: Callable[[], tuple[list[Tensor], list[Tensor]]]  # tensors to differentiate, constants
    reference: Callable[..., Reference]
    contenders: list[Contender]
    traffic: dict[str, int]
    flops: dict[str, int]
    runs: int
    seconds: float
    absent: dict[str, str] = field(default_factory=dict)  # contender -> why it does not take part

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return f"{' x '.join(map(str, self.shape))} {self.dtype_name}"


def why_not(module: str) -> str | None:
    """None when the module imports, else the reason in one line."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer may fail to import in any way it likes
        first = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first[0]}"
    return None


def peer(present: list[Contender], absent: dict[str, str], name: str, module: str, make: Callable[[], Callable]):
    """Add a third-party contender when its module imports, else record why not."""
    if reason := why_not(module):
        absent[name] = reason
    else:
        present.append(Contender(name, make(), "peer"))


def backends(device: str) -> dict[str, str | None]:
    """The tilewise backends that serve this device, each with the reason why it cannot be had, or None."""
    found: dict[str, str | None] = {}
    for name in ("cpu",) if device == "cpu" else ("cuda", "triton"):
        found[name] = why_not("tilewise")
        if found[name] is None:
            try:
                with importlib.import_module("tilewise").backend(name):
                    pass
            except RuntimeError as error:
                found[name] = str(error)
    return found


def common_contenders(variants: Callable[[], dict[str, Callable]], eager: Callable, device: str, compiled: bool):
    """Ours on each backend, torch eager, torch.compile. `variants` names the ways to call ours; "" is the plain one."""
    present, absent = [], {}
    for backend, reason in backends(device).items():
        ours = "tilewise" if device == "cpu" else f"tilewise {backend}"
        if reason:
            absent[ours] = reason
            continue
        for variant, loss in variants().items():
            present.append(Contender(f"{ours} {variant}".strip(), loss, backend, ours=True))
    present.append(Contender("torch eager", eager))
    if compiled:
        present.append(Contender("torch.compile", torch.compile(eager, dynamic=False)))
    else:
        absent["torch.compile"] = "left out of a quick run"
    return present, absent


def row_contenders(op: str, eager: Callable, device: str, *, inplace: bool, compiled: bool, **options):
    """The contenders every row loss shares: the common ones, ours in place where it can be, a plain copy."""

    def variants():
        loss = partial(getattr(importlib.import_module("tilewise"), op), **options)
        return {"": loss, "in place": partial(loss, inplace_backward=True)} if inplace else {"": loss}

    present, absent = common_contenders(variants, eager, device, compiled)
    present.append(Contender("plain copy", None))
    return present, absent


def row_inputs(rows: int, classes: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gaussian logits; in every eighth row the target is right with p near 0.99, where p - 1 cancels."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, device=device, dtype=dtype)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    confident = torch.arange(0, rows, 8, device=device)
    logits[confident, target[confident]] = math.log(classes) + 5.0
    return [logits], [target]


def spread(size: int, wanted: int, device: torch.device) -> Tensor:
    """Up to `wanted` indices below `size`, evenly apart."""
    return torch.linspace(0, size - 1, min(size, wanted), device=device).round().long()


def row_reference(row_loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, checked: int = 64):
    """Mean loss over all rows and the gradient of up to `checked` evenly spread rows, both in float64."""
    rows, classes = logits.shape
    chunk = max(1, 2**24 // classes)
    total = sum(
        row_loss(block.double(), labels).sum().item()
        for block, labels in zip(logits.detach().split(chunk), target.split(chunk), strict=True)
    )
    index = spread(rows, checked, logits.device)
    sample = logits.detach()[index].double().requires_grad_()
    (gradient,) = torch.autograd.grad(row_loss(sample, target[index]).sum() / rows, sample)
    return total / rows, [(index, gradient)]


def row_traffic(rows: int, classes: int, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads the logits once; backward reads them again and writes the gradient."""
    matrix = rows * classes * dtype.itemsize
    return {"forward": matrix, "backward": 2 * matrix, "both": 3 * matrix}
