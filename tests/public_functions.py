"""A small call of every public function: what a test of all of them runs through."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from contract import DEVICE
from torch import Tensor

import tilewise


@dataclass(frozen=True)
class Call:
    """A function of floating tensors of these shapes; the other arguments are its own."""

    function: Callable[..., Tensor | tuple]
    shapes: tuple[tuple[int, ...], ...]
    cast: str = "given"  # what autocast does to the tensors: "given", "lower" or "widen"
    constants: int = 0  # the last so many tensors need no gradient
    weights: tuple[int, ...] = ()  # positive, of sum 1: float32 in every mix, for 16 bits cannot hold the sum
    fixed_size: bool = True  # False: how much comes out depends on the values, so that nothing can be compiled whole

    def tensors(self, dtypes) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = len(self.shapes) - self.constants
        made = []
        for i, (shape, dtype) in enumerate(zip(self.shapes, dtypes, strict=False)):
            t = torch.randn(shape, device=DEVICE)
            t = torch.softmax(t, -1) if i in self.weights else t.to(dtype)
            made.append(t.requires_grad_(i < leaves))
        return made


LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1], device=DEVICE)
PAIRS = "lower" if DEVICE == "cuda" else "widen"  # on a CPU embeddings are compared in float32 anyway


def entropic(result):
    return result.value, result.plan(), result.apply(result.g), result.transpose_apply(result.f)


def sparse(result):
    return result.value, result.values, result.indices


def pairs(function, shapes=((8, 6), (8, 6)), **options) -> Call:
    return Call(function, shapes, PAIRS, **options)


def references(function, *arguments, **options) -> Call:
    return pairs(lambda x, y: function(x, LABELS, *arguments, ref_embeddings=y, ref_labels=LABELS), **options)


def layer(function, cast="given", **options) -> Call:
    return Call(lambda x, w, b: function(x, w, LABELS, bias=b, **options), ((8, 6), (5, 6), (5,)), cast)


POINTS = ((7, 3), (6, 3))
CALLS = {
    "batch_hard_mine": references(tilewise.batch_hard_mine, constants=2, fixed_size=False),
    "clip_loss": pairs(tilewise.clip_loss, ((8, 6), (8, 6), ())),
    "cross_entropy": Call(lambda x, w: tilewise.cross_entropy(x, LABELS, w), ((8, 5), (5,)), constants=1),
    "info_nce": pairs(lambda q, k, t: tilewise.info_nce(q, k, temperature=t.float().exp()), ((8, 6), (8, 6), ())),
    "linear_cross_entropy": Call(
        lambda x, w, b, c: tilewise.linear_cross_entropy(x, w, LABELS, linear_bias=b, weight=c),
        ((8, 6), (5, 6), (5,), (5,)),
        "lower",
        constants=1,
        weights=(3,),
    ),
    "linear_spherical_softmax_loss": layer(tilewise.linear_spherical_softmax_loss),
    "linear_taylor_softmax_loss": layer(tilewise.linear_taylor_softmax_loss),
    "linear_z_loss": layer(tilewise.linear_z_loss, a=1.0, b=0.0),
    "mala": Call(tilewise.mala, ((2, 4, 9, 6), (2, 2, 9, 6), (2, 2, 9, 5)), "lower"),
    "monge_gap": Call(lambda x, y: tilewise.monge_gap(x, y, epsilon=0.5), ((7, 3), (7, 3)), "widen"),
    "multi_similarity_loss": references(tilewise.multi_similarity_loss),
    "multi_similarity_mine": references(tilewise.multi_similarity_mine, constants=2, fixed_size=False),
    "nt_xent": pairs(tilewise.nt_xent),
    "pair_weighted_loss": references(tilewise.pair_weighted_loss, tilewise.weighting.Contrastive()),
    "semihard_mine": references(tilewise.semihard_mine, constants=2, fixed_size=False),
    "siglip_loss": pairs(tilewise.siglip_loss, ((8, 6), (8, 6), (), ())),
    "simplex_topk": Call(lambda x: tilewise.simplex_topk(x, 3), ((4, 7),)),
    "sinkhorn": Call(
        lambda c, a, b: entropic(tilewise.sinkhorn(c, a, b, epsilon=0.5)), ((7, 6), (7,), (6,)), weights=(1, 2)
    ),
    "sinkhorn_divergence": Call(
        lambda x, y, a: tilewise.sinkhorn_divergence(x, y, a, epsilon=0.5), (*POINTS, (7,)), "widen", weights=(2,)
    ),
    "sinkhorn_knopp": Call(tilewise.sinkhorn_knopp, ((8, 5),), constants=1),
    "sinkhorn_points": Call(
        lambda x, y, a: entropic(tilewise.sinkhorn_points(x, y, a, epsilon=0.5)),
        (*POINTS, (7,)),
        "widen",
        weights=(2,),
    ),
    "sparse_ot": Call(lambda c, a, b: sparse(tilewise.sparse_ot(c, a, b, k=3)), ((7, 6), (7,), (6,)), weights=(1, 2)),
    "sparse_ot_points": Call(lambda x, y: sparse(tilewise.sparse_ot_points(x, y, k=3)), POINTS, "widen"),
    "sparse_ot_router": Call(lambda x: tuple(tilewise.sparse_ot_router(x, 4)), ((8, 3),)),
    "spherical_softmax_loss": Call(lambda x: tilewise.spherical_softmax_loss(x, LABELS), ((8, 5),)),
    "supcon": references(tilewise.supcon),
    "taylor_softmax_loss": Call(lambda x: tilewise.taylor_softmax_loss(x, LABELS), ((8, 5),)),
    "wta_crs_linear": Call(
        lambda x, w, b, n: tilewise.wta_crs_linear(x, w, b, k=4, norms=n, seed=1),
        ((2, 8, 6), (5, 6), (5,), (16,)),
        "lower",
        constants=1,
        weights=(3,),
    ),
    "wta_crs_matmul": Call(lambda a, b: tilewise.wta_crs_matmul(a, b, k=4, seed=1), ((3, 5, 9), (3, 9, 2)), "lower"),
    "wta_crs_sample": Call(
        lambda x, n: tuple(tilewise.wta_crs_sample(x, k=4, norms=n, seed=1)),
        ((16, 6), (16,)),
        "lower",
        constants=2,
        weights=(1,),
    ),
    "z_loss": Call(lambda x: tilewise.z_loss(x, LABELS, a=1.0, b=0.0), ((8, 5),)),
}


def names() -> list[str]:
    """Of the public functions, whether they have a call here or not."""
    return [name for name in tilewise.__all__ if inspect.isfunction(getattr(tilewise, name))]


def values_and_gradients(outputs: Tensor | tuple, tensors: list[Tensor]) -> tuple[list[Tensor], tuple]:
    """What came out, and the gradients of a weighted sum of all of it."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = [t for t in tensors if t.requires_grad]
    differentiable = [t for t in outputs if t.requires_grad]
    if not leaves or not differentiable:
        return [t.detach() for t in outputs], ()
    total = sum((t * torch.linspace(1, 2, t.numel(), device=t.device).reshape(t.shape)).sum() for t in differentiable)
    return [t.detach() for t in outputs], torch.autograd.grad(total, leaves, allow_unused=True)
