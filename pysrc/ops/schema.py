"""What an operator's schema and shapes demand of its tensors, as the compiled kernels check it."""

import functools
import re

import torch
from torch import Tensor


@functools.cache
def schema_of(op: str) -> list[torch._C.Argument]:
    return getattr(torch.ops.tilewise, op).default._schema.arguments


@functools.cache
def _required(op: str) -> set[str]:
    """The tensors that may not be None."""
    return {argument.name for argument in schema_of(op) if str(argument.type) == "Tensor"}


def checked_tensors(op: str, arguments: tuple, options: dict) -> dict[str, Tensor]:
    """The tensors of a call by their names: those that the schema demands are there, on one device."""
    given = dict(zip((argument.name for argument in schema_of(op)), arguments, strict=False)) | options
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if missing := _required(op) - tensors.keys():
        raise RuntimeError(f"tilewise.{op}: expected {min(missing)} to be a tensor, got None")
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != like.device:
            raise RuntimeError(f"tilewise.{op}: expected {name} on {like.device} like {first}, got {tensor.device}")
    return tensors


@functools.cache
def _parsed(shapes: str) -> dict[str, tuple[bool, tuple[tuple[str, int], ...]]]:
    """Name -> whether it is int64, and its sizes as letters with what is added to them."""
    parsed = {}
    for tensor in filter(None, shapes.split(", ")):
        name, *sizes = tensor.split(" ")
        terms = (re.fullmatch(r"(\w)(?:\+(\d))?", size).groups() for size in sizes)
        parsed[name.removeprefix("#")] = name[0] == "#", tuple((letter, int(more or 0)) for letter, more in terms)
    return parsed


def check_shapes(op: str, tensors: dict[str, Tensor], shapes: str) -> None:
    """Tensors that are there have memory, and the type and the sizes that `shapes` tells."""
    sizes: dict[str, int] = {}

    def size_of(letter: str, more: int, got: int) -> int:
        if letter.isdigit():
            return int(letter)
        return max(sizes.setdefault(letter, got - more) + more, 1 if letter.isupper() else 0)

    for name, (integer, letters) in _parsed(shapes).items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if integer != (tensor.dtype == torch.int64) or not (integer or tensor.is_floating_point()):
            raise RuntimeError(
                f"tilewise.{op}: expected {name} to be {'int64' if integer else 'floating'}, got {tensor.dtype}"
            )
        shape = tuple(tensor.shape)
        expected = "(" + ", ".join(f"{letter}+{more}" if more else letter for letter, more in letters) + ")"
        if len(shape) != len(letters):
            raise RuntimeError(f"tilewise.{op}: expected {name} to have shape {expected}, got {shape}")
        wanted = tuple(size_of(*term, got) for term, got in zip(letters, shape, strict=True))
        if shape != wanted:
            raise RuntimeError(f"tilewise.{op}: expected {name} to have shape {wanted}, got {shape}")
        if tensor.numel() > 0 and tensor.device.type != "meta" and tensor.data_ptr() == 0:
            raise RuntimeError(f"tilewise.{op}: expected {name} to have memory, but its storage was freed")
