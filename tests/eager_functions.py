"""Every differentiable public function beside what it is composed of in PyTorch: scalars of float64 tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise
from tilewise.reference import linear_z_loss as layer
from tilewise.reference import z_loss as family
from tilewise.reference.mala import attend

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1])
INDEX = torch.arange(8)


@dataclass(frozen=True)
class Case:
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...] = ()  # positive, of sum 1
    refused: tuple[str, ...] = ()  # transforms that have an error, of the operator in it

    def tensors(self) -> list[Tensor]:
        torch.manual_seed(0)
        made = [torch.randn(shape, dtype=torch.float64) for shape in self.shapes]
        return [torch.softmax(t, -1) if i in self.weights else t for i, t in enumerate(made)]


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def among_positives(s: Tensor) -> Tensor:
    """-mean over positives of log softmax, for references with LABELS."""
    positive = (LABELS[:, None] == LABELS).to(s.dtype)
    return -((torch.log_softmax(s, 1) * positive).sum(1) / positive.sum(1)).mean()


def ntxent(x: Tensor, y: Tensor) -> Tensor:
    s = cosines(z := torch.cat([x, y]), z) / 0.5
    s = s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(s, torch.cat([INDEX + 8, INDEX]))


def clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    s = scale * x @ y.T
    return (F.cross_entropy(s, INDEX) + F.cross_entropy(s.T, INDEX)) / 2


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -F.logsigmoid(sign * (scale * x @ y.T + bias)).sum(1).mean()


def multi_similarity(x: Tensor, y: Tensor) -> Tensor:
    s, positive = cosines(x, y), LABELS[:, None] == LABELS
    pull = torch.exp(-2.0 * (s - 0.5)).masked_fill(~positive, 0).sum(1).log1p() / 2.0
    return (pull + torch.exp(50.0 * (s - 0.5)).masked_fill(positive, 0).sum(1).log1p() / 50.0).mean()


def hinge(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return (torch.relu(0.8 - s) * positive + torch.relu(s - 0.3) * negative).sum(1)


def hinges(x: Tensor, y: Tensor) -> Tensor:
    positive = LABELS[:, None] == LABELS
    return hinge(cosines(x, y), positive, ~positive).mean()


def hinge_means(x: Tensor, y: Tensor) -> Tensor:
    s, positive = cosines(x, y), (LABELS[:, None] == LABELS).to(x.dtype)
    pull = (torch.relu(1.0 - s) * positive).sum(1) / positive.sum(1)
    return (pull + (torch.relu(s - 0.5) * (1 - positive)).sum(1) / (1 - positive).sum(1)).mean()


def projected(x: Tensor) -> Tensor:
    values, where = x.sort(-1, descending=True)
    values, where = values[..., :3], where[..., :3]
    levels = (values.cumsum(-1) - 1) / torch.arange(1, 4)
    level = levels.gather(-1, (values > levels).sum(-1, keepdim=True) - 1)
    return torch.zeros_like(x).scatter(-1, where, torch.relu(values - level))


def weighed(x: Tensor) -> Tensor:
    """A scalar in which every entry counts otherwise."""
    return (x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).sum()


def transport(cost: Tensor, a: Tensor, b: Tensor, epsilon: float = 0.5) -> tuple[Tensor, Tensor]:
    """Value and plan after many iterations, through which PyTorch differentiates."""
    g = torch.zeros_like(b)
    for _ in range(300):
        f = -epsilon * torch.logsumexp((g - cost) / epsilon + b.log(), 1)
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon + a.log()[:, None], 0)
    plan = a[:, None] * b * torch.exp((f[:, None] + g - cost) / epsilon)
    # Without penalties a gradient in the marginals is known up to a constant: here of mean 0.
    centred = [p.detach() - p.detach().mean() for p in (f, g)]
    kl = (plan * ((f[:, None] + g - cost) / epsilon)).sum()
    value = (plan * cost).sum() + epsilon * kl
    held = value.detach() + (plan.detach() * (cost - cost.detach())).sum()
    return held + sum((p * (w - w.detach())).sum() for p, w in zip(centred, (a, b), strict=True)), plan


def squares(x: Tensor, y: Tensor) -> Tensor:
    return ((x[:, None] - y) ** 2).sum(-1)


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def divergence(x: Tensor, y: Tensor) -> Tensor:
    cross, of_x, of_y = (
        transport(squares(p, q), uniform(len(p)), uniform(len(q)), 2.0)[0] for p, q in ((x, y), (x, x), (y, y))
    )
    return cross - (of_x + of_y) / 2


def gap(x: Tensor, y: Tensor) -> Tensor:
    value = transport(squares(x, y), uniform(len(x)), uniform(len(y)), 2.0)[0]
    return ((x - y) ** 2).sum(1).mean() - (value - 2.0 * 2 * torch.tensor(float(len(x)), dtype=x.dtype).log())


def sparse_value(cost: Tensor) -> Tensor:
    """The envelope: the plan is a constant of it."""
    plan = tilewise.sparse_ot(cost.detach(), k=3).plan().detach()
    return (plan * cost).sum()


def routed(x: Tensor) -> Tensor:
    routing = tilewise.sparse_ot_router(x.detach(), 4)
    weights = torch.softmax(x, -1).T.gather(1, routing.indices)
    return weighed(torch.where(routing.weights > 0, weights, 0))


def sampled_product(a: Tensor, b: Tensor) -> Tensor:
    norms = [torch.ops.tilewise.wta_crs_norms(t.detach()) for t in (a.mT, b)]
    where, scales = torch.ops.tilewise.wta_crs_sample(*norms, torch.tensor([1]), k=4)
    left = torch.stack([m[:, i.long()] for m, i in zip(a, where, strict=True)]) * scales.to(a.dtype)[:, None]
    return weighed(left @ torch.stack([m[i.long()] for m, i in zip(b, where, strict=True)]))


def sampled_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The weight's gradient from the rows of the sample alone."""
    sample = tilewise.wta_crs_sample(x.detach(), k=6, seed=1)
    y, moved = F.linear(x, weight.detach(), bias), weight - weight.detach()
    estimate = sample.scales.to(x.dtype)[:, None] * (sample.rows @ moved.T)
    return weighed(y.index_add(0, sample.indices.long(), estimate))


def references(function, **options):
    return lambda x, y: function(x, LABELS, ref_embeddings=y, ref_labels=LABELS, **options)


def linear(function, **options):
    return lambda x, w, b: function(x, w, LABELS, bias=b, **options)


PAIRS, POINTS, LAYER = ((8, 6), (8, 6)), ((7, 3), (6, 3)), ((8, 6), (5, 6), (5,))
CASES = {
    "clip_loss": Case(tilewise.clip_loss, clip, (*PAIRS, ())),
    "cross_entropy": Case(
        lambda x: tilewise.cross_entropy(x, LABELS, label_smoothing=0.1),
        lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1),
        ((8, 5),),
    ),
    "cross_entropy rows": Case(
        lambda x: weighed(tilewise.cross_entropy(x, LABELS, reduction="none", logit_scale=2.0)),
        lambda x: weighed(F.cross_entropy(2 * x, LABELS, reduction="none")),
        ((8, 5),),
    ),
    "info_nce": Case(
        lambda q, k, t: tilewise.info_nce(q, k, temperature=t.exp()),
        lambda q, k, t: F.cross_entropy(cosines(q, k) / t.exp(), INDEX),
        (*PAIRS, ()),
    ),
    "linear_cross_entropy": Case(
        lambda x, w, b: tilewise.linear_cross_entropy(x, w, LABELS, linear_bias=b),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), LABELS),
        LAYER,
    ),
    "linear_spherical_softmax_loss": Case(
        linear(tilewise.linear_spherical_softmax_loss), linear(layer.linear_spherical_softmax_loss), LAYER
    ),
    "linear_taylor_softmax_loss": Case(
        linear(tilewise.linear_taylor_softmax_loss), linear(layer.linear_taylor_softmax_loss), LAYER
    ),
    "linear_z_loss": Case(
        linear(tilewise.linear_z_loss, a=1.0, b=0.5), linear(layer.linear_z_loss, a=1.0, b=0.5), LAYER
    ),
    "mala": Case(
        lambda q, k, v: weighed(tilewise.mala(q, k, v, causal=True, scale=0.3)),
        lambda q, k, v: weighed(attend(q, k, v, causal=True, scale=0.3, eps=1e-6)[0]),
        ((2, 4, 9, 6), (2, 2, 9, 6), (2, 2, 9, 5)),
        refused=("jvp",),
    ),
    "monge_gap": Case(lambda x, y: tilewise.monge_gap(x, y, epsilon=2.0, tol=1e-12), gap, ((7, 3), (7, 3))),
    "multi_similarity_loss": Case(
        references(tilewise.multi_similarity_loss, epsilon=None), multi_similarity, PAIRS
    ),
    "nt_xent": Case(tilewise.nt_xent, ntxent, PAIRS),
    "pair_weighted_loss": Case(
        references(tilewise.pair_weighted_loss, weighting=tilewise.weighting.Contrastive()), hinge_means, PAIRS
    ),
    "pair_weighted_loss of a function": Case(
        references(tilewise.pair_weighted_loss, weighting=hinge), hinges, PAIRS
    ),
    "siglip_loss": Case(tilewise.siglip_loss, siglip, (*PAIRS, (), ())),
    "simplex_topk": Case(lambda x: weighed(tilewise.simplex_topk(x, 3)), lambda x: weighed(projected(x)), ((4, 7),)),
    "sinkhorn": Case(
        lambda c, a, b: tilewise.sinkhorn(c, a, b, epsilon=0.5, tol=1e-13).value,
        lambda c, a, b: transport(c, a, b)[0],
        ((7, 6), (7,), (6,)),
        weights=(1, 2),
    ),
    "sinkhorn plan": Case(
        lambda c: weighed(tilewise.sinkhorn(c, epsilon=0.5, tol=1e-13).plan()),
        lambda c: weighed(transport(c, uniform(7), uniform(6))[1]),
        ((7, 6),),
        refused=("jvp",),
    ),
    "sinkhorn unrolled": Case(
        lambda c: weighed(tilewise.sinkhorn(c, epsilon=0.5, max_iter=300, gradient="unrolled").plan()),
        lambda c: weighed(transport(c, uniform(7), uniform(6))[1]),
        ((7, 6),),
        refused=("jvp",),
    ),
    "sinkhorn_divergence": Case(
        lambda x, y: tilewise.sinkhorn_divergence(x, y, epsilon=2.0, tol=1e-12), divergence, POINTS
    ),
    "sinkhorn_points": Case(
        lambda x, y, a, b: tilewise.sinkhorn_points(x, y, a, b, epsilon=0.5, tol=1e-13).value,
        lambda x, y, a, b: transport(squares(x, y), a, b)[0],
        (*POINTS, (7,), (6,)),
        weights=(2, 3),
    ),
    "sinkhorn_points apply": Case(
        lambda x, y: weighed(tilewise.sinkhorn_points(x, y, epsilon=0.5, tol=1e-13).barycentric_map(y)),
        lambda x, y: weighed(transport(squares(x, y), uniform(7), uniform(6))[1] @ y * 7),
        POINTS,
        refused=("jvp",),
    ),
    "sparse_ot": Case(
        lambda c: tilewise.sparse_ot(c, k=3).value, sparse_value, ((7, 6),), refused=("jvp",)
    ),
    "sparse_ot_points": Case(
        lambda x, y: tilewise.sparse_ot_points(x, y, k=3).value,
        lambda x, y: sparse_value(squares(x, y)),
        POINTS,
        refused=("jvp",),
    ),
    "sparse_ot_router": Case(lambda x: weighed(tilewise.sparse_ot_router(x, 4).weights), routed, ((8, 3),)),
    "spherical_softmax_loss": Case(
        lambda x: tilewise.spherical_softmax_loss(x, LABELS),
        lambda x: family.spherical_softmax_loss(x, LABELS),
        ((8, 5),),
    ),
    "supcon": Case(references(tilewise.supcon), lambda x, y: among_positives(cosines(x, y) / 0.1), PAIRS),
    "taylor_softmax_loss": Case(
        lambda x: tilewise.taylor_softmax_loss(x, LABELS), lambda x: family.taylor_softmax_loss(x, LABELS), ((8, 5),)
    ),
    "wta_crs_linear": Case(
        lambda x, w, b: weighed(tilewise.wta_crs_linear(x, w, b, k=6, seed=1)),
        sampled_layer,
        ((16, 6), (5, 6), (5,)),
    ),
    "wta_crs_matmul": Case(
        lambda a, b: weighed(tilewise.wta_crs_matmul(a, b, k=4, seed=1)), sampled_product, ((3, 5, 9), (3, 9, 2))
    ),
    "z_loss": Case(
        lambda x: tilewise.z_loss(x, LABELS, a=1.0, b=0.5), lambda x: family.z_loss(x, LABELS, a=1.0, b=0.5), ((8, 5),)
    ),
}  # fmt: skip
