"""sparse_ot: the value and its gradient, against L-BFGS of torch.optim and POT, each until rows are off by TOL."""

from __future__ import annotations

import contextlib
import importlib
import io
from functools import partial

import torch

from case import TRANSPORT, Case, common_contenders, peer
from transport import reference_of

FAMILY = TRANSPORT
GAMMA, TOL = 1.0, 1e-6
STOP = 1e-16  # of POT, a decrease of the value: the largest power of ten that leaves rows no further off than TOL
SIZES = {  # rows, columns, k, timed runs, seconds at most once three runs are done
    "quick": [(30, 20, 10, 3, 1.0)],
    "cpu": [(256, 256, 8, 11, 30.0)],
    "cuda": [(4096, 4096, 64, 7, 30.0)],
}


def inputs(rows, columns, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.rand(n, 2, generator=generator, device=device, dtype=dtype) for n in (rows, columns))
    return [torch.cdist(x, y) ** 2], []


def largest(cost, alpha, k):
    """The entries of every column at alpha and where they are, for uniform marginals."""
    scores, indices = (alpha[:, None] - cost).topk(k, 0)
    levels = (scores.cumsum(0) - GAMMA / cost.shape[1]) / torch.arange(1, k + 1, device=cost.device)[:, None]
    support = (scores > levels).sum(0, keepdim=True)
    tau = levels.gather(0, support - 1)
    return (scores - tau).clamp(min=0) / GAMMA, indices, tau[0]


def dual(cost, alpha, k):
    mass, indices, tau = largest(cost, alpha, k)
    value = alpha.mean() - tau.mean() - 0.5 * GAMMA * mass.square().sum()
    return value, torch.zeros_like(cost).scatter(0, indices, mass)


def value_at(cost, alpha, k):
    """With constant potentials: by the envelope its gradient in the costs is the plan."""
    value, plan = dual(cost.detach(), alpha, k)
    return value + ((cost - cost.detach()) * plan).sum()


def eager(k, cost, tol=TOL, max_iter=500):
    alpha, fixed = torch.zeros_like(cost[:, 0], requires_grad=True), cost.detach()
    solver = torch.optim.LBFGS(
        [alpha],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=tol / len(cost),
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        value, plan = dual(fixed, alpha.detach(), k)
        alpha.grad = plan.sum(1) - 1 / len(cost)
        return -value

    solver.step(closure)
    return value_at(cost, alpha.detach(), k)


def ours(k):
    options = {"k": k, "gamma": GAMMA, "tol": TOL}
    return {"": lambda cost: importlib.import_module("tilewise").sparse_ot(cost, **options).value}


def pot(k):
    smooth = importlib.import_module("ot").smooth

    def loss(cost):
        even = [torch.full((n,), 1 / n, dtype=cost.dtype).numpy() for n in cost.shape]
        options = {"reg_type": "sparsity_constrained", "max_nz": k, "log": True, "stopThr": STOP}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            _, log = smooth.smooth_ot_semi_dual(*even, cost.detach().numpy(), GAMMA, **options)
        return value_at(cost, torch.from_numpy(log["alpha"]), k)

    return loss


def reference(k, cost):
    return reference_of(lambda wide: eager(k, wide, tol=1e-10, max_iter=5000), cost)


def cases(device: str, quick: bool = False):
    for rows, columns, k, runs, seconds in SIZES["quick" if quick else device]:
        dtype = torch.float64 if device == "cpu" else torch.float32
        present, absent = common_contenders(partial(ours, k), partial(eager, k), device, compiled=False)
        absent.pop("torch.compile", None)  # a search of as many steps as it takes
        if device == "cpu":
            peer(present, absent, "POT", "ot", partial(pot, k))
        matrix = rows * columns * dtype.itemsize
        yield Case(
            op="sparse_ot",
            shape=(rows, columns, k),
            dtype=dtype,
            device=device,
            inputs=partial(inputs, rows, columns, dtype, device),
            reference=partial(reference, k),
            contenders=present,
            absent=absent,
            traffic={"forward": matrix, "backward": matrix, "both": 2 * matrix},
            flops={"forward": 0, "backward": 0, "both": 0},
            runs=runs,
            seconds=seconds,
        )
