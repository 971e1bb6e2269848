"""Argument checks shared by the row operators. Each message: tilewise.<op>: expected <argument> ..., got ..."""

import math

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling

from tilewise.formulas.rows import statistics_dtype

PLAIN = (Tensor, torch.nn.Parameter)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("none", "mean", "sum")


def check_logits(op: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"tilewise.{op}: expected logits to be a tensor, got {type(logits).__name__}")
    if logits.dim() != 2:
        raise ValueError(f"tilewise.{op}: expected logits to be 2-D, got shape {tuple(logits.shape)}")
    if logits.shape[1] == 0:
        raise ValueError(f"tilewise.{op}: expected logits to have at least one class, got shape {tuple(logits.shape)}")
    check_floating(op, "logits", logits)


def check_memory(op: str, name: str, tensor: Tensor) -> None:
    """Not one whose storage was freed, as sharded and offloaded parameters are between their uses."""
    if is_compiling() or type(tensor) not in PLAIN or is_functorch_wrapped_tensor(tensor):
        return
    if tensor.layout != torch.strided or tensor.data_ptr() != 0 or tensor.numel() == 0:
        return
    if tensor.untyped_storage().nbytes() == 0:
        raise ValueError(f"tilewise.{op}: expected {name} to have memory, but its storage was freed")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    allowed = FLOATING[1:] if tensor.is_cuda else FLOATING
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"tilewise.{op}: expected {tensor.device.type} {name} to be {names}, got {tensor.dtype}")
    check_memory(op, name, tensor)


def check_matrix(op: str, name: str, matrix: Tensor) -> None:
    """A floating tensor of two dimensions, any sizes, on any device."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"tilewise.{op}: expected {name} to be a tensor, got {type(matrix).__name__}")
    if matrix.dim() != 2:
        raise ValueError(f"tilewise.{op}: expected {name} to be 2-D, got shape {tuple(matrix.shape)}")
    if matrix.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"tilewise.{op}: expected {name} to be {names}, got {matrix.dtype}")
    check_memory(op, name, matrix)


def check_vector(op: str, name: str, vector: Tensor | None, size: int, logits: Tensor) -> Tensor | None:
    """A constant (size,) vector on the device of logits, in the type of statistics."""
    if vector is None:
        return None
    if not isinstance(vector, Tensor):
        raise TypeError(f"tilewise.{op}: expected {name} to be a tensor or None, got {type(vector).__name__}")
    if vector.shape != (size,):
        raise ValueError(f"tilewise.{op}: expected {name} to have shape ({size},), got {tuple(vector.shape)}")
    check_device(op, name, vector, logits)
    check_constant(op, name, vector)
    return vector.to(statistics_dtype(logits)).contiguous()


def check_device(op: str, name: str, tensor: Tensor, like: Tensor, like_name: str = "logits") -> None:
    if tensor.device != like.device:
        raise ValueError(f"tilewise.{op}: expected {name} on {like.device} like {like_name}, got {tensor.device}")
    check_memory(op, name, tensor)


def check_constant(op: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"tilewise.{op}: expected {name} not to require a gradient (none is computed); detach it")


def check_class_index(op: str, target: Tensor, rows: Tensor, rows_name: str = "logits") -> Tensor:
    """Class indices (N,), one for each of the rows, as contiguous int64."""
    if not isinstance(target, Tensor):
        raise TypeError(f"tilewise.{op}: expected target to be a tensor, got {type(target).__name__}")
    if target.dtype not in INTEGER:
        raise TypeError(f"tilewise.{op}: expected target to hold integer class indices, got {target.dtype}")
    if target.dim() != 1 or target.shape[0] != rows.shape[0]:
        raise ValueError(f"tilewise.{op}: expected target to have shape ({rows.shape[0]},), got {tuple(target.shape)}")
    check_device(op, "target", target, rows, rows_name)
    if target.dtype == torch.int64 and target.is_contiguous():
        return target
    return target.to(torch.int64).contiguous()


def check_probabilities(op: str, target: Tensor, shape: tuple[int, int], ignore_index: int, like: Tensor) -> Tensor:
    """Class probabilities (N, V) in the dtype of `like` (an input on the logits' device) or that of statistics."""
    if target.dtype not in FLOATING:
        raise TypeError(f"tilewise.{op}: expected target probabilities in a 16 to 64 bit type, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(
            f"tilewise.{op}: expected target probabilities to have shape {tuple(shape)} like logits, "
            f"got {tuple(target.shape)}"
        )
    if ignore_index >= 0:
        raise ValueError(f"tilewise.{op}: ignore_index does not apply to target probabilities, got {ignore_index}")
    check_device(op, "target", target, like)
    check_constant(op, "target", target)
    return target if target.dtype == like.dtype else target.to(statistics_dtype(like))


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"tilewise.{op}: expected reduction to be 'none', 'mean' or 'sum', got {reduction!r}")


def check_number(op: str, name: str, value: float, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    if isinstance(value, Tensor) or not -math.inf < value < math.inf or not low <= value <= high:
        bounds = f" in [{low:g}, {high:g}]" if low > -math.inf or high < math.inf else ""
        raise ValueError(f"tilewise.{op}: expected {name} to be a finite number{bounds}, got {value!r}")
    return float(value)


def check_integer(op: str, name: str, value: int, *, low: int = 1, high: int | None = None, of: str = "") -> int:
    """An integer of at least `low` and, if there is one, at most `high`, which is what `of` says."""
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
    if not fits:
        bounds = f"of at least {low}" if high is None else f"in [{low}, {high}], {of}"
        raise ValueError(f"tilewise.{op}: expected {name} to be an integer {bounds}, got {value!r}")
    return value


def check_positive(op: str, name: str, value: float, dtype: torch.dtype | None = None) -> float:
    """A finite number above 0; with a dtype, one that is so in it."""
    if isinstance(value, Tensor) or not 0 < value < math.inf:
        raise ValueError(f"tilewise.{op}: expected {name} to be a finite number above 0, got {value!r}")
    if dtype is not None and not torch.finfo(dtype).tiny <= value <= torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"tilewise.{op}: expected {name} to be a finite number above 0, a normal one in {kind}, got {value!r}"
        )
    return float(value)
