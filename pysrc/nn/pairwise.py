"""Modules of the pairwise losses and of the multi-similarity miner."""

import torch
from torch import Tensor

from tilewise.nn.losses import LossModule
from tilewise.ops import rows
from tilewise.ops.clip_loss import clip_loss
from tilewise.ops.contrastive import info_nce, nt_xent, siglip_loss, supcon
from tilewise.ops.mining import multi_similarity_mine
from tilewise.ops.multi_similarity_loss import multi_similarity_loss
from tilewise.ops.pair_weighted_loss import pair_weighted_loss
from tilewise.ops.pairwise import check_pair_reduction, check_references, prepared

Pairs = tuple[Tensor, ...]


class MultiSimilarityLoss(LossModule):
    """:func:`tilewise.multi_similarity_loss`; drop-in for pytorch-metric-learning's MultiSimilarityLoss and its miner.

    Args:
        alpha, beta, base: of the function.
        **options: epsilon, normalize and reduction of the function. Without an ``indices_tuple`` the loss mines by
            epsilon; pytorch-metric-learning's takes all pairs then, as does epsilon None.
    """

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, **options):
        super().__init__(alpha=alpha, beta=beta, base=base, **options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Pairs | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """indices_tuple: what a pytorch-metric-learning miner returned, four index vectors of pairs or three of
        triplets: the loss is then that of these pairs, with memory for their embeddings."""
        if indices_tuple is None:
            return multi_similarity_loss(
                embeddings, labels, ref_embeddings=ref_emb, ref_labels=ref_labels, **self.options
            )
        op = "nn.MultiSimilarityLoss"
        x, y, *_ = check_references(op, embeddings, labels, ref_emb, ref_labels)
        if len(indices_tuple) not in (3, 4):
            raise ValueError(f"tilewise.{op}: expected indices_tuple of 3 or 4 tensors, got {len(indices_tuple)}")
        reduction = self.options.get("reduction", "mean")
        check_pair_reduction(op, reduction)
        alpha, beta = (rows.check_positive(op, name, self.options[name]) for name in ("alpha", "beta"))
        base = rows.check_number(op, "base", self.options["base"])
        x, y = prepared(x, y, self.options.get("normalize", True))
        anchor_p, positive, *rest = indices_tuple
        anchor_n, negative = rest if len(rest) == 2 else (anchor_p, rest[0])
        anchor_p, positive = _distinct(anchor_p, positive, len(y))
        anchor_n, negative = _distinct(anchor_n, negative, len(y))
        pulled = _log_one_plus_sums(-alpha * ((x[anchor_p] * y[positive]).sum(1) - base), anchor_p, len(x))
        pushed = _log_one_plus_sums(beta * ((x[anchor_n] * y[negative]).sum(1) - base), anchor_n, len(x))
        losses = pulled / alpha + pushed / beta
        if reduction == "none":
            return losses
        if reduction == "mean_active":
            return losses.sum() / max(1, torch.cat([anchor_p, anchor_n]).unique().numel())
        return losses.sum() / (max(1, len(x)) if reduction == "mean" else 1)


def _distinct(anchor: Tensor, other: Tensor, others: int) -> Pairs:
    """Each pair once: triplets, or several miners together, name them many times."""
    pair = torch.unique(anchor * others + other)
    return pair // others, pair % others


def _log_one_plus_sums(x: Tensor, anchor: Tensor, anchors: int) -> Tensor:
    """log(1 + sum of e^x over the pairs of each anchor)."""
    with torch.no_grad():
        most = x.new_zeros(anchors).scatter_reduce(0, anchor, x, "amax")
    sums = torch.zeros_like(most).index_add(0, anchor, torch.exp(x - most[anchor]))
    return most + torch.log1p(torch.expm1(-most) + sums)


class MultiSimilarityMiner(LossModule):
    """:func:`tilewise.multi_similarity_mine`; drop-in for pytorch-metric-learning's MultiSimilarityMiner.

    Args:
        **options: epsilon and normalize of the function.
    """

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Pairs:
        return multi_similarity_mine(embeddings, labels, ref_embeddings=ref_emb, ref_labels=ref_labels, **self.options)


class SupConLoss(LossModule):
    """:func:`tilewise.supcon` with fixed options."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        return supcon(embeddings, labels, ref_embeddings=ref_embeddings, ref_labels=ref_labels, **self.options)


class PairWeightedLoss(LossModule):
    """:func:`tilewise.pair_weighted_loss` with a fixed weighting and options."""

    def __init__(self, weighting, **options):
        super().__init__(weighting=weighting, **options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        return pair_weighted_loss(
            embeddings, labels, ref_embeddings=ref_embeddings, ref_labels=ref_labels, **self.options
        )


class InfoNCELoss(LossModule):
    """:func:`tilewise.info_nce` with fixed options."""

    def forward(
        self, query: Tensor, key: Tensor, guide_query: Tensor | None = None, guide_key: Tensor | None = None
    ) -> Tensor:
        return info_nce(query, key, guide_query=guide_query, guide_key=guide_key, **self.options)


class NTXentLoss(LossModule):
    """:func:`tilewise.nt_xent` with fixed options."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, **self.options)


class ClipLoss(LossModule):
    """:func:`tilewise.clip_loss` with fixed options; the scale comes with the features, as in open_clip."""

    def forward(self, image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
        return clip_loss(image, text, logit_scale, **self.options)


class SigLipLoss(LossModule):
    """:func:`tilewise.siglip_loss` with fixed options; scale and bias come with the features, as in open_clip."""

    def forward(
        self, image: Tensor, text: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor = 0.0
    ) -> Tensor:
        return siglip_loss(image, text, logit_scale, logit_bias, **self.options)
