"""Modules of sparse transport: a router for mixtures of experts, and a small mixture that uses it."""

import math

import torch
from torch import Tensor, nn

from tilewise.ops import rows
from tilewise.ops.sparse_ot_router import Routing, sparse_ot_router


class SparseOTRouter(nn.Module):
    """A linear layer of logits and :func:`tilewise.sparse_ot_router`: which tokens each expert takes.

    From "Sparsity-Constrained Optimal Transport" (Liu, Puigcerver, Blondel, 2023), section 6.

    Args:
        in_features: d.
        num_experts: E.
        capacity_factor: > 0; an expert has ceil(capacity_factor tokens / E) places, at most one per token.
        gamma, steps, lr: as in :func:`tilewise.sparse_ot_router`.

    Example:
        >>> import torch, tilewise
        >>> router = tilewise.nn.SparseOTRouter(16, 4, capacity_factor=1.25)
        >>> router(torch.randn(64, 16)).indices.shape
        torch.Size([4, 20])
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        capacity_factor: float = 1.0,
        gamma: float = 1.0,
        steps: int = 20,
        lr: float = 1e-2,
    ):
        super().__init__()
        self.gate = nn.Linear(in_features, num_experts, bias=False)
        self.capacity_factor = rows.check_positive("nn.SparseOTRouter", "capacity_factor", capacity_factor)
        self.options = {"gamma": gamma, "steps": steps, "lr": lr}

    def capacity(self, tokens: int) -> int:
        return min(tokens, math.ceil(self.capacity_factor * tokens / self.gate.out_features))

    def forward(self, x: Tensor) -> Routing:
        """x is (..., tokens, d); the sets of tokens are routed each on its own."""
        return sparse_ot_router(self.gate(x), self.capacity(x.shape[-2]), **self.options)

    def extra_repr(self) -> str:
        return f"capacity_factor={self.capacity_factor}"


class MixtureOfExperts(nn.Module):
    """Gives tokens to experts, (C, d) -> (C, d') each, and adds what they give back, weighed by the router.

    A token that no expert takes gives 0: put the mixture beside a residual connection.

    Args:
        router: a module from (tokens, d) to a :class:`~tilewise.Routing`, such as :class:`SparseOTRouter`.
        experts: as many modules as the router has experts.

    Example:
        >>> import torch, tilewise
        >>> experts = [torch.nn.Linear(16, 16) for _ in range(4)]
        >>> mixture = tilewise.nn.MixtureOfExperts(tilewise.nn.SparseOTRouter(16, 4), experts)
        >>> mixture(torch.randn(2, 32, 16)).shape
        torch.Size([2, 32, 16])
    """

    def __init__(self, router: nn.Module, experts: list[nn.Module]):
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """x is (..., d), all of it one set of tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        if len(self.experts) != len(routing.indices):
            raise ValueError(
                f"tilewise.nn.MixtureOfExperts: expected the router to have {len(self.experts)} experts, "
                f"got {len(routing.indices)}"
            )
        pairs = zip(self.experts, routing.indices, strict=True)
        given = torch.stack([expert(tokens[taken]) for expert, taken in pairs])
        weighed = (given * routing.weights[..., None].to(given.dtype)).flatten(0, 1)
        out = given.new_zeros(len(tokens), given.shape[-1]).index_add(0, routing.indices.flatten(), weighed)
        return out.reshape(*x.shape[:-1], given.shape[-1])
