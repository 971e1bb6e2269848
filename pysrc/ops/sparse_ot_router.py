"""sparse_ot_router: which tokens each expert of a mixture takes, by sparse transport."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import register, rows, transport

OP = "sparse_ot_router"
_solve = register.operator("sparse_ot")


class Routing(NamedTuple):
    """What :func:`tilewise.sparse_ot_router` returns: the tokens of each expert.

    Attributes:
        indices: (..., experts, capacity) int64, tokens in ascending order; 0 in a place that is not used.
        weights: (..., experts, capacity) their probabilities, with a gradient; 0 in a place that is not used.
        load: (..., experts) int64, how many places are used.
    """

    indices: Tensor
    weights: Tensor
    load: Tensor


def sparse_ot_router(
    logits: Tensor, capacity: int, *, gamma: float = 1.0, steps: int = 20, lr: float = 1e-2
) -> Routing:
    """Gives tokens to the experts of a mixture: every expert gets the same mass, from at most `capacity` tokens.

    Sparse transport (:func:`tilewise.sparse_ot`) with the costs -softmax(logits), the marginals 1 of every token and
    tokens/experts of every expert and k = capacity; its semi-dual is climbed from 0 by `steps` steps of Adam. The plan
    decides which tokens an expert takes, the probabilities weigh what it gives back. A token may go to several experts
    or, where capacity is short, to none.

    From "Sparsity-Constrained Optimal Transport" (Liu, Puigcerver, Blondel, 2023), section 6.

    Args:
        logits: (..., tokens, experts), float64 (on a CPU), float32, bfloat16 or float16 (these two are computed in
            float32).
        capacity: in [1, tokens], places of each expert.
        gamma: > 0.
        steps: of Adam, at least 1.
        lr: > 0, the rate of Adam.

    Returns:
        A :class:`~tilewise.Routing`: indices, weights (differentiable in the logits through the softmax), load.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.
        RuntimeError: on a CPU: a NaN in the logits.

    Example:
        >>> import torch, tilewise
        >>> routing = tilewise.sparse_ot_router(torch.randn(64, 4), capacity=20)
        >>> routing.indices.shape, routing.load
        (torch.Size([4, 20]), tensor([20, 20, 20, 20]))
    """
    check_arguments(OP, logits, capacity, gamma, steps, lr)
    *batch, tokens, experts = logits.shape
    if capacity > tokens:
        raise ValueError(f"tilewise.{OP}: expected capacity to be at most {tokens}, the tokens, got {capacity}")
    probabilities = torch.softmax(logits.to(statistics_dtype(logits)), -1).mT.reshape(-1, experts, tokens)
    costs = probabilities.detach().clone(memory_format=torch.contiguous_format).neg_()
    a = costs.new_ones(costs.shape[0], tokens)
    b = costs.new_full(costs.shape[:2], tokens / experts)
    values, indices, *_ = _solve(costs, a, b, k=capacity, gamma=gamma, method="adam", max_iter=steps, tol=0.0, lr=lr)
    used = values > 0
    weights = torch.where(used, probabilities.gather(2, indices), 0).to(logits.dtype)
    shape = (*batch, experts, capacity)
    return Routing(indices.reshape(shape), weights.reshape(shape), used.sum(2).reshape(shape[:-1]))


def check_arguments(op: str, logits: Tensor, capacity: int, gamma: float, steps: int, lr: float) -> None:
    transport.check_tensor(op, "logits", logits, "tokens, experts", 2)
    rows.check_integer(op, "capacity", capacity)
    rows.check_integer(op, "steps", steps)
    rows.check_positive(op, "gamma", gamma, statistics_dtype(logits))
    rows.check_positive(op, "lr", lr, statistics_dtype(logits))
