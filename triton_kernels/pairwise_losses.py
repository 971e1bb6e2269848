"""The losses of the pairwise engine (pairwise_fold.py says what a program is), as in csrc/pairwise/losses.h."""

import triton
import triton.language as tl

from .pairwise_fold import INFINITY, First, Max, Sum, by_kind, extremes, fold


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + e^x); log(1 + u) = 2 artanh(w) with w = u / (2 + u) <= 1/3, whose series to w^13 leaves 1e-8."""
    u = tl.exp(-tl.abs(x))
    w = u / (2.0 + u)
    s = w * w
    p = s * (1.0 / 13.0) + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    return tl.maximum(x, 0.0) + 2.0 * (w + w * s * p)


@triton.jit
def log1p(x):
    """Of x >= 0."""
    return softplus(tl.log(x))


@triton.jit
def log_one_plus(shift, total):
    """log(e^0 + sum of e^(x - shift)) + shift with shift = max(0, max x)"""
    return tl.where(shift > 0, shift + tl.log(tl.exp(-shift) + total), log1p(total))


class MeanByKind:
    """L = mean_P f + mean_N f of f(z, relation); term gives f and its derivative"""

    @fold(Sum, Sum, Sum, Sum)
    def first(self, z, relation, row):
        return by_kind(relation, self.term(self, z, relation)[0], 0.0) + by_kind(relation, 1.0, 0.0)

    @triton.jit
    def finish(self, row):
        positive, negative, positives, negatives = row
        loss = positive / tl.maximum(positives, 1.0) + negative / tl.maximum(negatives, 1.0)
        return positives + negatives > 0, loss

    @triton.jit
    def weight(self, z, relation, row):
        _, _, positives, negatives, _ = row
        share = tl.where(relation > 0, 1.0 / tl.maximum(positives, 1.0), 1.0 / tl.maximum(negatives, 1.0))
        return share * self.term(self, z, relation)[1]


class LogSums:
    """L = f(lse_P x + lse_N x) of exponents x(z, relation), of rows with pairs of both kinds; term gives x, outer f,
    with their derivatives"""

    @fold(Max, Max)
    def first(self, z, relation, row):
        return by_kind(relation, self.term(self, z, relation)[0], -INFINITY)

    @fold(Sum, Sum)
    def second(self, z, relation, row):
        x, _ = self.term(self, z, relation)
        return by_kind(relation, tl.exp(x - tl.where(relation > 0, row[0], row[1])), 0.0)

    @triton.jit
    def finish(self, row):
        positive_top, negative_top, positive, negative = row
        loss, _ = self.outer(self, (positive_top + tl.log(positive)) + (negative_top + tl.log(negative)))
        return (positive_top > -INFINITY) & (negative_top > -INFINITY), loss

    @triton.jit
    def weight(self, z, relation, row):
        positive_top, negative_top, positive, negative, _ = row
        _, derivative = self.outer(self, (positive_top + tl.log(positive)) + (negative_top + tl.log(negative)))
        x, slope = self.term(self, z, relation)
        e = tl.exp(x - tl.where(relation > 0, positive_top, negative_top))
        return tl.where(relation > 0, derivative / positive, derivative / negative) * e * slope


class Softmax:
    """L = lse_{P+N} z - mean_P z: SupCon, InfoNCE (one positive), NT-Xent"""

    name, parameters = "softmax", 0

    @fold(Max, Sum)
    def first(self, z, relation, row):
        return tl.where(relation != 0, z, -INFINITY), tl.where(relation > 0, 1.0, 0.0)

    @fold(Sum, Sum, Sum)
    def second(self, z, relation, row):
        top, _ = row
        positive, negative = by_kind(relation, tl.exp(z - top), 0.0)
        return positive, negative, tl.where(relation > 0, z - top, 0.0)

    @triton.jit
    def finish(self, row):
        # Apart: a positive that takes nearly all leaves to the negatives what 1 would swallow.
        _, positives, positive, negative, below = row
        return positives > 0, log1p((positive - 1.0) + negative) - below / tl.maximum(positives, 1.0)

    @triton.jit
    def weight(self, z, relation, row):
        """p, less 1 / #P at positives: 0 - negative of one positive."""
        top, positives, positive, negative, _, _ = row
        inverse = 1.0 / (positive + negative)
        e = tl.exp(z - top)
        return tl.where(relation > 0, ((positives * e - positive) - negative) * (inverse / positives), e * inverse)


class DecoupledSoftmax:
    """L = mean_P softplus(lse_N z - z_p): the positives are no part of the denominator"""

    name, parameters = "decoupled_softmax", 0

    @fold(Max, Sum)
    def first(self, z, relation, row):
        return tl.where(relation < 0, z, -INFINITY), tl.where(relation > 0, 1.0, 0.0)

    @fold(Sum)
    def second(self, z, relation, row):
        top, _ = row
        return (tl.where(relation < 0, tl.exp(z - top), 0.0),)

    @fold(Sum, Sum)
    def third(self, z, relation, row):
        top, _, sum = row
        gap = (top - z) + tl.log(sum)
        return tl.where(relation > 0, softplus(gap), 0.0), tl.where(relation > 0, sigmoid(gap), 0.0)

    @triton.jit
    def finish(self, row):
        _, positives, _, pull, _ = row
        return positives > 0, pull / tl.maximum(positives, 1.0)

    @triton.jit
    def weight(self, z, relation, row):
        top, positives, sum, _, pushes, _ = row
        share = 1.0 / positives
        gap = (top - z) + tl.log(sum)
        return tl.where(relation > 0, -sigmoid(gap) * share, pushes * share / sum * tl.exp(z - top))


class Sigmoid:
    """L = sum_P softplus(-z) + sum_N softplus(z): SigLIP"""

    name, parameters = "sigmoid", 0

    @fold(Sum)
    def first(self, z, relation, row):
        return (tl.where(relation != 0, softplus(tl.where(relation > 0, -z, z)), 0.0),)

    @triton.jit
    def finish(self, row):
        return True, row[0]

    @triton.jit
    def weight(self, z, relation, row):
        probability = sigmoid(tl.where(relation > 0, -z, z))
        return tl.where(relation > 0, -probability, probability)


@triton.jit
def kept(self, z, relation, row):
    """Which pairs are kept."""
    _, _, _, epsilon = self.parameters
    mines = epsilon != INFINITY
    margin = tl.where(mines, epsilon, 0.0)
    above = tl.where(mines, row[0], -INFINITY)
    below = tl.where(mines, row[1], INFINITY)
    return ((relation > 0) & (z - margin < below)) | ((relation < 0) & (z + margin > above))


@triton.jit
def shifts(self, row):
    """The highest exponents of positives and of negatives, or 0."""
    alpha, beta, base, _ = self.parameters
    return tl.maximum(-alpha * (row[0] - base), 0.0), tl.maximum(beta * (row[1] - base), 0.0)


@triton.jit
def exponential(self, z, relation, row):
    alpha, beta, base, _ = self.parameters
    positive_shift, negative_shift = shifts(self, row)
    return tl.exp(tl.where(relation > 0, -alpha * (z - base) - positive_shift, beta * (z - base) - negative_shift))


class MultiSimilarity:
    """L = (1/alpha) log(1 + sum_P' e^(-alpha (z - base))) + (1/beta) log(1 + sum_N' e^(beta (z - base)))

    Mining keeps N' = {n: z_n + epsilon > min_P z} and P' = {p: z_p - epsilon < max_N z}; a row without either has no
    loss. epsilon = inf keeps all, and a row of one kind has the loss of that kind.
    """

    name, parameters = "multi_similarity", 4
    first = extremes

    @fold(Sum, Sum, Sum, Sum)
    def second(self, z, relation, row):
        keeps = kept(self, z, relation, row)
        e = tl.where(keeps, exponential(self, z, relation, row), 0.0)
        return by_kind(relation, e, 0.0) + by_kind(relation, tl.where(keeps, 1.0, 0.0), 0.0)

    @triton.jit
    def finish(self, row):
        alpha, beta, _, epsilon = self.parameters
        _, _, positive, negative, positives, negatives = row
        positive_shift, negative_shift = shifts(self, row)
        loss = log_one_plus(positive_shift, positive) / alpha + log_one_plus(negative_shift, negative) / beta
        most, least = tl.maximum(positives, negatives), tl.minimum(positives, negatives)
        return tl.where(epsilon != INFINITY, least, most) > 0, loss

    @triton.jit
    def weight(self, z, relation, row):
        _, _, positive, negative, _, _, _ = row
        positive_shift, negative_shift = shifts(self, row)
        factor = tl.where(
            relation > 0, -1.0 / (tl.exp(-positive_shift) + positive), 1.0 / (tl.exp(-negative_shift) + negative)
        )
        return tl.where(kept(self, z, relation, row), factor * exponential(self, z, relation, row), 0.0)


class BinomialDeviance(MeanByKind):
    """L = mean_P softplus(-alpha (z - base)) + mean_N softplus(beta (z - base))"""

    name, parameters = "binomial_deviance", 3

    @triton.jit
    def term(self, z, relation):
        alpha, beta, base = self.parameters
        slope = tl.where(relation > 0, -alpha, beta)
        return softplus(slope * (z - base)), slope * sigmoid(slope * (z - base))


class LiftedStructure(LogSums):
    """L = max(0, log sum_P e^(positive_margin - z) + log sum_N e^(z - negative_margin))"""

    name, parameters = "lifted_structure", 2

    @triton.jit
    def term(self, z, relation):
        return tl.where(relation > 0, -z, z), tl.where(relation > 0, -1.0, 1.0)

    @triton.jit
    def outer(self, sum):
        positive_margin, negative_margin = self.parameters
        loss = sum + (positive_margin - negative_margin)
        return tl.where(loss < 0, 0.0, loss), tl.where(loss > 0, 1.0, 0.0)


class Contrastive(MeanByKind):
    """L = mean_P max(0, positive_margin - z) + mean_N max(0, z - negative_margin)"""

    name, parameters = "contrastive", 2

    @triton.jit
    def term(self, z, relation):
        positive_margin, negative_margin = self.parameters
        gap = tl.where(relation > 0, positive_margin - z, z - negative_margin)
        return tl.where(gap < 0, 0.0, gap), tl.where(gap > 0, tl.where(relation > 0, -1.0, 1.0), 0.0)


class Triplet:
    """L = max(0, max_N z - min_P z + margin): the hardest positive and negative; ties: lowest column"""

    name, parameters = "triplet", 1
    first = extremes

    @fold(First, First)
    def second(self, z, relation, row):
        least, most = row
        return (relation > 0) & (z == least), (relation < 0) & (z == most)

    @triton.jit
    def finish(self, row):
        least, most, _, _ = row
        loss = most - least + self.parameters[0]
        return (least < INFINITY) & (most > -INFINITY), tl.where(loss < 0, 0.0, loss)

    @triton.jit
    def write_two(self, row):
        _, _, positive, negative, loss = row
        weight = tl.where(loss > 0, 1.0, 0.0)
        return positive, -weight, negative, weight


class Circle(LogSums):
    """L = softplus(lse_P x + lse_N x), x_p = a (1 - margin - z) with a = gamma max(0, 1 + margin - z) and
    x_n = a (z - margin) with a = gamma max(0, z + margin); the gradient takes a for a constant"""

    name, parameters = "circle", 2

    @triton.jit
    def term(self, z, relation):
        margin, gamma = self.parameters
        a = gamma * tl.maximum(tl.where(relation > 0, 1.0 + margin - z, z + margin), 0.0)
        return a * tl.where(relation > 0, 1.0 - margin - z, z - margin), tl.where(relation > 0, -a, a)

    @triton.jit
    def outer(self, sum):
        return softplus(sum), sigmoid(sum)


LOSSES = (
    Softmax, DecoupledSoftmax, Sigmoid, MultiSimilarity, BinomialDeviance, LiftedStructure, Contrastive, Triplet, Circle
)  # fmt: skip
