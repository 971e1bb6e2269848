"""What autocast casts: the tensors of public functions, before they are checked, as PyTorch casts those of its own.

Off, for float64 and for what is no floating tensor nothing is done: the checks that follow say what does not fit.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch.compiler import is_compiling

TYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def off(device: str):
    """A context in which nothing is cast."""
    return torch.autocast(device, enabled=False) if enabled(device) else contextlib.nullcontext()


def unaware(kernel):
    """A kernel of PyTorch's operators: it would see autocast again in every one of them, and round its statistics."""

    @functools.wraps(kernel)
    def uncast(*arguments, **options):
        with off(next(t for t in arguments if isinstance(t, Tensor)).device.type):
            return kernel(*arguments, **options)

    return uncast


def lower(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Factors of a product take autocast's type, like those of :func:`torch.nn.functional.linear`."""
    return _cast(tensors, lambda device, dtypes: torch.get_autocast_dtype(device))


def widen(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of a loss or a distance take the widest of their types, like those of :func:`torch.cat`."""
    return _cast(tensors, lambda device, dtypes: dtypes.pop() if len(dtypes) == 1 else torch.float32)


def _cast(tensors, choose):
    if not is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    given = [t for t in tensors if isinstance(t, Tensor)]
    if not given or not enabled(device := given[0].device.type):
        return tensors
    dtypes = {t.dtype for t in given}
    if not dtypes <= TYPES:
        return tensors
    dtype = choose(device, dtypes)
    return tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in tensors)
