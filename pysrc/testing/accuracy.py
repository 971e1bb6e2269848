"""The accuracy contract: errors against float64, at most 1.5 times those of PyTorch's own operations in the type."""

import torch
from torch import Tensor


def relative_error(result: Tensor, truth: Tensor) -> float:
    """||result - truth|| / ||truth|| in float64; infinities equal themselves, NaN in one alone is an infinite error."""
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    if result.shape != truth.shape:
        raise ValueError(f"relative_error: expected shape {tuple(truth.shape)}, got {tuple(result.shape)}")
    same = (result == truth) | (result.isnan() & truth.isnan())
    difference = torch.where(same, 0, result - truth)
    if not difference.isfinite().all():
        return float("inf")
    scale = truth[truth.isfinite()].norm()
    return float(difference.norm() / scale) if scale > 0 else float(difference.norm())


def floor(dtype: torch.dtype) -> float:
    """The error that rounding alone explains: one rounding of the result to 16 bits, a few in float32 and float64."""
    eps = torch.finfo(dtype).eps
    return eps / 2 if dtype in (torch.bfloat16, torch.float16) else 8 * eps


def assert_accurate(
    result: Tensor, truth: Tensor, eager: Tensor, dtype: torch.dtype, what: str = "result", *, slack: float = 0.0
) -> None:
    """error(result) <= 1.5 error(eager) + floor(dtype) + slack, errors against the float64 truth.

    Raises:
        AssertionError: naming both errors.
    """
    ours, theirs = relative_error(result, truth), relative_error(eager, truth)
    bound = 1.5 * (theirs if theirs < float("inf") else 0.0) + floor(dtype) + slack
    if not ours <= bound:
        raise AssertionError(f"{what}: error {ours:.3e} above {bound:.3e} (PyTorch in {dtype}: {theirs:.3e})")
