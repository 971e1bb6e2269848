"""Pair weightings for :func:`tilewise.pair_weighted_loss`: how an anchor's loss depends on its similarities.

P and N are an anchor's positive and negative pairs, #P and #N their numbers, s similarities. See "Multi-Similarity Loss
with General Pair Weighting for Deep Metric Learning" (Wang et al., 2019), which writes them all as weights of pairs.
"""

import math
from dataclasses import astuple, dataclass

from tilewise.ops import rows


@dataclass(frozen=True)
class _Weighting:
    def __post_init__(self):
        for name, value in vars(self).items():
            if name == "epsilon" and value is None:
                continue
            check = rows.check_positive if name in ("alpha", "beta", "gamma") else rows.check_number
            check(f"weighting.{type(self).__name__}", name, value)

    @property
    def parameters(self) -> tuple[float, ...]:
        return tuple(math.inf if value is None else float(value) for value in astuple(self))


@dataclass(frozen=True)
class MultiSimilarity(_Weighting):
    """The loss of :func:`tilewise.multi_similarity_loss`; epsilon None keeps all pairs."""

    alpha: float = 2.0
    beta: float = 50.0
    base: float = 0.5
    epsilon: float | None = 0.1
    loss = "multi_similarity"


@dataclass(frozen=True)
class BinomialDeviance(_Weighting):
    """mean_P log(1 + e^(-alpha (s - base))) + mean_N log(1 + e^(beta (s - base))) (Yi et al., 2014)."""

    alpha: float = 2.0
    beta: float = 50.0
    base: float = 0.5
    loss = "binomial_deviance"


@dataclass(frozen=True)
class LiftedStructure(_Weighting):
    """max(0, log sum_P e^(positive_margin - s) + log sum_N e^(s - negative_margin)) (Oh Song et al., 2016; Hermans et
    al., 2017); anchors with pairs of both kinds."""

    positive_margin: float = 1.0
    negative_margin: float = 0.5
    loss = "lifted_structure"


@dataclass(frozen=True)
class Contrastive(_Weighting):
    """mean_P max(0, positive_margin - s) + mean_N max(0, s - negative_margin) (Hadsell et al., 2006)."""

    positive_margin: float = 1.0
    negative_margin: float = 0.5
    loss = "contrastive"


@dataclass(frozen=True)
class Triplet(_Weighting):
    """max(0, max_N s - min_P s + margin): the hardest pairs of each anchor that has both (Hermans et al., 2017)."""

    margin: float = 0.1
    loss = "triplet"


@dataclass(frozen=True)
class Circle(_Weighting):
    """log(1 + sum_P e^(a_p (1 - margin - s)) sum_N e^(a_n (s - margin))) with a_p = gamma max(0, 1 + margin - s) and
    a_n = gamma max(0, s + margin) (Sun et al., 2020); anchors with pairs of both kinds. The gradient takes a_p and a_n
    for constants, as the paper and pytorch-metric-learning do."""

    margin: float = 0.4
    gamma: float = 80.0
    loss = "circle"
