"""Measured memory: what a call takes from torch's allocators."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def allocated_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Peak bytes that calling `function` adds to what torch holds on the device (its result included)."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    del result
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def saved_bytes(
    function: Callable[[], object],
    *,
    apart_from: Iterable[Tensor] = (),
    within: Iterable[torch.nn.Module] | None = None,
) -> int:
    """Bytes of the distinct memory that autograd keeps for the backward of what `function` computes.

    Args:
        function: is called once.
        apart_from: tensors that do not count, such as parameters.
        within: counts only what is kept while one of these modules runs.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    running, kept = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if (within is None or running) and storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = []
    for module in within or ():
        hooks.append(module.register_forward_pre_hook(lambda *_: running.append(1)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function()
    finally:
        for hook in hooks:
            hook.remove()
    del result
    return sum(kept.values())
