"""The router of a mixture of experts: 20 steps, against the same in plain torch; beside them 20 iterations of our
sinkhorn on the same matrix, and top-2 routing."""

from __future__ import annotations

import importlib
from functools import partial

import torch

from case import TRANSPORT, Case, Contender, common_contenders
from transport import reference_of

FAMILY = TRANSPORT
STEPS, RATE = 20, 1e-2
SIZES = {  # tokens, experts, capacity, timed runs, seconds at most
    "quick": [(200, 8, 30, 3, 1.0)],
    "cpu": [(16384, 64, 320, 11, 20.0)],
    "cuda": [(65536, 64, 1280, 30, 10.0)],
}


def inputs(tokens, experts, device):
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(tokens, experts, generator=generator, device=device)], []


def eager(capacity, logits):
    """Mean of the weights that are given."""
    probabilities = torch.softmax(logits, -1)
    costs, mass = -probabilities.detach(), logits.shape[0] / logits.shape[1]
    alpha = torch.zeros_like(costs[:, 0], requires_grad=True)
    solver = torch.optim.Adam([alpha], lr=RATE)
    ranks = torch.arange(1, capacity + 1, device=costs.device)[:, None]

    def entries():
        scores, indices = (alpha.detach()[:, None] - costs).topk(capacity, 0)
        levels = (scores.cumsum(0) - mass) / ranks
        support = (scores > levels).sum(0, keepdim=True)
        return (scores - levels.gather(0, support - 1)).clamp(min=0), indices

    for _ in range(STEPS):
        values, indices = entries()
        alpha.grad = torch.zeros_like(alpha).scatter_add(0, indices.flatten(), values.flatten()) - 1
        solver.step()
    values, indices = entries()
    return (probabilities.gather(0, indices) * (values > 0)).mean()


def ours(capacity):
    return {
        "": lambda logits: importlib.import_module("tilewise").sparse_ot_router(logits, capacity).weights.mean(),
    }


def sinkhorn(logits):
    tilewise = importlib.import_module("tilewise")
    return tilewise.sinkhorn(-torch.softmax(logits, -1), epsilon=0.1, max_iter=STEPS, tol=0.0).value


def top_two(logits):
    return torch.softmax(logits, -1).topk(2, -1).values.mean()


def reference(capacity, logits):
    """Of a token that no expert takes the gradient is 0, and has no relative error."""
    value, [(index, gradient)] = reference_of(partial(eager, capacity), logits)
    taken = gradient.abs().sum(1) > 0
    return value, [(index[taken], gradient[taken])]


def cases(device: str, quick: bool = False):
    for tokens, experts, capacity, runs, seconds in SIZES["quick" if quick else device]:
        present, absent = common_contenders(partial(ours, capacity), partial(eager, capacity), device, compiled=False)
        absent.pop("torch.compile", None)  # a loop of topk, which it does not change
        present.append(Contender("tilewise sinkhorn", sinkhorn, same=False))
        present.append(Contender("torch top-2", top_two, same=False))
        matrix = tokens * experts * 4
        yield Case(
            op="sparse_ot_router",
            shape=(tokens, experts, capacity),
            dtype=torch.float32,
            device=device,
            inputs=partial(inputs, tokens, experts, device),
            reference=partial(reference, capacity),
            contenders=present,
            absent=absent,
            traffic={"forward": (STEPS + 1) * matrix, "backward": 3 * matrix, "both": (STEPS + 4) * matrix},
            flops={"forward": 0, "backward": 0, "both": 0},
            runs=runs,
            seconds=seconds,
        )
