"""Problems of entropic transport for tests on every backend, and how near their solutions have to be."""

import torch
from contract import DEVICE, NATIVE_CPU
from torch import Tensor

WIDE = torch.float64 if NATIVE_CPU else torch.float32
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11} if NATIVE_CPU else {"rtol": 2e-4, "atol": 2e-5}
SIZES = {"small": (5, 7, 9), "one": (1, 1, 1), "a row": (2, 1, 40), "medium": (2, 70, 90), "largest small": (4, 64, 64)}
OPTIONS = {
    "balanced": {},
    "unbalanced": {"rho_a": 0.7, "rho_b": 0.7},
    "one side": {"rho_a": None, "rho_b": 0.3},
    "other side": {"rho_a": 0.3, "rho_b": None},
}


def problem(name="small", dtype=WIDE, zeros=True):
    """cost, a, b, epsilon: the last differs over the batch, and some weights are 0."""
    batch, n, m = SIZES[name]
    torch.manual_seed(0)
    cost = torch.rand(batch, n, m)
    a, b = (torch.rand(batch, size).to(dtype) + 0.1 for size in (n, m))
    if zeros and min(n, m) > 4:
        a[:, 1], b[:, -2:] = 0, 0
    a, b = (w / w.sum(1, keepdim=True) for w in (a, b))
    return [t.to(DEVICE, dtype) for t in (cost, a, b, 0.05 * 2 ** (torch.arange(batch) % 3))]


def wide(value):
    """Of what the CPU's reference computes in float64."""
    return value.detach().cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_solved(found, expected, tolerance=TOLERANCE):
    *numbers, n_iter = found
    *exact, exact_n_iter = expected
    for name, value, truth in zip(("f", "g", "value", "error"), numbers, exact, strict=True):
        torch.testing.assert_close(wide(value), truth, **tolerance, msg=lambda m, of=name: f"{of}: {m}")
    assert (n_iter.cpu() - exact_n_iter).abs().max() <= (0 if NATIVE_CPU else 1)
