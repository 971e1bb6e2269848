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


@triton.jit
def mean_by_kind(row, p):
    """L = mean_P f + mean_N f: from the sums of f and the numbers of pairs."""
    positive, negative, positives, negatives = row
    loss = positive / tl.maximum(positives, 1.0) + negative / tl.maximum(negatives, 1.0)
    return positives + negatives > 0, loss


@triton.jit
def share_of_kind(relation, row):
    _, _, positives, negatives, _ = row
    return tl.where(relation > 0, 1.0 / tl.maximum(positives, 1.0), 1.0 / tl.maximum(negatives, 1.0))


@triton.jit
def exponential(x, relation, row):
    """e^x, relative to the highest of its kind: the row's first two totals."""
    return tl.exp(x - tl.where(relation > 0, row[0], row[1]))


@triton.jit
def log_sums(row):
    """Whether there are pairs of both kinds, and lse_P x + lse_N x: from the highest x and the sums of exponentials."""
    both = (row[0] > -INFINITY) & (row[1] > -INFINITY)
    return both, (row[0] + tl.log(row[2])) + (row[1] + tl.log(row[3]))


@triton.jit
def share_of_log_sum(x, relation, row):
    """The derivative of lse_P x + lse_N x in x."""
    return exponential(x, relation, row) * tl.where(relation > 0, 1.0 / row[2], 1.0 / row[3])


class Softmax:
    """L = lse_{P+N} z - mean_P z: SupCon, InfoNCE (one positive), NT-Xent"""

    name, parameters = "softmax", 0

    @fold(Max, Sum)
    def first(z, relation, row, p):
        return tl.where(relation != 0, z, -INFINITY), tl.where(relation > 0, 1.0, 0.0)

    @fold(Sum, Sum, Sum)
    def second(z, relation, row, p):
        top, _ = row
        positive, negative = by_kind(relation, tl.exp(z - top), 0.0)
        return positive, negative, tl.where(relation > 0, z - top, 0.0)

    @triton.jit
    def finish(row, p):
        # Apart: a positive that takes nearly all leaves to the negatives what 1 would swallow.
        _, positives, positive, negative, below = row
        return positives > 0, log1p((positive - 1.0) + negative) - below / tl.maximum(positives, 1.0)

    @triton.jit
    def weight(z, relation, row, p):
        """p, less 1 / #P at positives: 0 - negative of one positive."""
        top, positives, positive, negative, _, _ = row
        inverse = 1.0 / (positive + negative)
        e = tl.exp(z - top)
        return tl.where(relation > 0, ((positives * e - positive) - negative) * (inverse / positives), e * inverse)


class DecoupledSoftmax:
    """L = mean_P softplus(lse_N z - z_p): the positives are no part of the denominator"""

    name, parameters = "decoupled_softmax", 0

    @fold(Max, Sum)
    def first(z, relation, row, p):
        return tl.where(relation < 0, z, -INFINITY), tl.where(relation > 0, 1.0, 0.0)

    @fold(Sum)
    def second(z, relation, row, p):
        top, _ = row
        return (tl.where(relation < 0, tl.exp(z - top), 0.0),)

    @fold(Sum, Sum)
    def third(z, relation, row, p):
        top, _, sum = row
        gap = (top - z) + tl.log(sum)
        return tl.where(relation > 0, softplus(gap), 0.0), tl.where(relation > 0, sigmoid(gap), 0.0)

    @triton.jit
    def finish(row, p):
        _, positives, _, pull, _ = row
        return positives > 0, pull / tl.maximum(positives, 1.0)

    @triton.jit
    def weight(z, relation, row, p):
        top, positives, sum, _, pushes, _ = row
        share = 1.0 / positives
        gap = (top - z) + tl.log(sum)
        return tl.where(relation > 0, -sigmoid(gap) * share, pushes * share / sum * tl.exp(z - top))


class Sigmoid:
    """L = sum_P softplus(-z) + sum_N softplus(z): SigLIP"""

    name, parameters = "sigmoid", 0

    @fold(Sum)
    def first(z, relation, row, p):
        return (tl.where(relation != 0, softplus(tl.where(relation > 0, -z, z)), 0.0),)

    @triton.jit
    def finish(row, p):
        return True, row[0]

    @triton.jit
    def weight(z, relation, row, p):
        probability = sigmoid(tl.where(relation > 0, -z, z))
        return tl.where(relation > 0, -probability, probability)


@triton.jit
def mined(z, relation, row, p):
    """Which pairs are kept."""
    _, _, _, epsilon = p
    mines = epsilon != INFINITY
    margin = tl.where(mines, epsilon, 0.0)
    above = tl.where(mines, row[0], -INFINITY)
    below = tl.where(mines, row[1], INFINITY)
    return ((relation > 0) & (z - margin < below)) | ((relation < 0) & (z + margin > above))


@triton.jit
def shifts(row, p):
    """The highest exponents of positives and of negatives, or 0."""
    alpha, beta, base, _ = p
    return tl.maximum(-alpha * (row[0] - base), 0.0), tl.maximum(beta * (row[1] - base), 0.0)


@triton.jit
def shifted_exponential(z, relation, row, p):
    alpha, beta, base, _ = p
    positive_shift, negative_shift = shifts(row, p)
    return tl.exp(tl.where(relation > 0, -alpha * (z - base) - positive_shift, beta * (z - base) - negative_shift))


class MultiSimilarity:
    """L = (1/alpha) log(1 + sum_P' e^(-alpha (z - base))) + (1/beta) log(1 + sum_N' e^(beta (z - base)))

    Mining keeps N' = {n: z_n + epsilon > min_P z} and P' = {p: z_p - epsilon < max_N z}; a row without either has no
    loss. epsilon = inf keeps all, and a row of one kind has the loss of that kind.
    """

    name, parameters = "multi_similarity", 4
    first = extremes

    @fold(Sum, Sum, Sum, Sum)
    def second(z, relation, row, p):
        kept = mined(z, relation, row, p)
        e = tl.where(kept, shifted_exponential(z, relation, row, p), 0.0)
        return by_kind(relation, e, 0.0) + by_kind(relation, tl.where(kept, 1.0, 0.0), 0.0)

    @triton.jit
    def finish(row, p):
        alpha, beta, _, epsilon = p
        _, _, positive, negative, positives, negatives = row
        positive_shift, negative_shift = shifts(row, p)
        loss = log_one_plus(positive_shift, positive) / alpha + log_one_plus(negative_shift, negative) / beta
        most, least = tl.maximum(positives, negatives), tl.minimum(positives, negatives)
        return tl.where(epsilon != INFINITY, least, most) > 0, loss

    @triton.jit
    def weight(z, relation, row, p):
        _, _, positive, negative, _, _, _ = row
        positive_shift, negative_shift = shifts(row, p)
        factor = tl.where(
            relation > 0, -1.0 / (tl.exp(-positive_shift) + positive), 1.0 / (tl.exp(-negative_shift) + negative)
        )
        return tl.where(mined(z, relation, row, p), factor * shifted_exponential(z, relation, row, p), 0.0)


@triton.jit
def deviance_exponent(z, relation, p):
    alpha, beta, base = p
    return tl.where(relation > 0, -alpha * (z - base), beta * (z - base))


class BinomialDeviance:
    """L = mean_P softplus(-alpha (z - base)) + mean_N softplus(beta (z - base))"""

    name, parameters = "binomial_deviance", 3
    finish = mean_by_kind

    @fold(Sum, Sum, Sum, Sum)
    def first(z, relation, row, p):
        return by_kind(relation, softplus(deviance_exponent(z, relation, p)), 0.0) + by_kind(relation, 1.0, 0.0)

    @triton.jit
    def weight(z, relation, row, p):
        alpha, beta, _ = p
        slope = tl.where(relation > 0, -alpha, beta) * sigmoid(deviance_exponent(z, relation, p))
        return share_of_kind(relation, row) * slope


class LiftedStructure:
    """L = max(0, log sum_P e^(positive_margin - z) + log sum_N e^(z - negative_margin))"""

    name, parameters = "lifted_structure", 2

    @fold(Max, Max)
    def first(z, relation, row, p):
        return by_kind(relation, tl.where(relation > 0, -z, z), -INFINITY)

    @fold(Sum, Sum)
    def second(z, relation, row, p):
        return by_kind(relation, exponential(tl.where(relation > 0, -z, z), relation, row), 0.0)

    @triton.jit
    def finish(row, p):
        positive_margin, negative_margin = p
        both, total = log_sums(row)
        loss = total + (positive_margin - negative_margin)
        return both, tl.where(loss < 0, 0.0, loss)

    @triton.jit
    def weight(z, relation, row, p):
        share = share_of_log_sum(tl.where(relation > 0, -z, z), relation, row)
        return tl.where(row[4] > 0, tl.where(relation > 0, -share, share), 0.0)


@triton.jit
def hinge_gap(z, relation, p):
    positive_margin, negative_margin = p
    return tl.where(relation > 0, positive_margin - z, z - negative_margin)


class Contrastive:
    """L = mean_P max(0, positive_margin - z) + mean_N max(0, z - negative_margin)"""

    name, parameters = "contrastive", 2
    finish = mean_by_kind

    @fold(Sum, Sum, Sum, Sum)
    def first(z, relation, row, p):
        return by_kind(relation, tl.maximum(hinge_gap(z, relation, p), 0.0), 0.0) + by_kind(relation, 1.0, 0.0)

    @triton.jit
    def weight(z, relation, row, p):
        slope = tl.where(hinge_gap(z, relation, p) > 0, tl.where(relation > 0, -1.0, 1.0), 0.0)
        return share_of_kind(relation, row) * slope


class Triplet:
    """L = max(0, max_N z - min_P z + margin): the hardest positive and negative; ties: lowest column"""

    name, parameters = "triplet", 1
    first = extremes

    @fold(First, First)
    def second(z, relation, row, p):
        least, most = row
        return (relation > 0) & (z == least), (relation < 0) & (z == most)

    @triton.jit
    def finish(row, p):
        least, most, _, _ = row
        loss = most - least + p[0]
        return (least < INFINITY) & (most > -INFINITY), tl.where(loss < 0, 0.0, loss)

    @triton.jit
    def write_two(row, p):
        _, _, positive, negative, loss = row
        weight = tl.where(loss > 0, 1.0, 0.0)
        return positive, -weight, negative, weight


LOSSES = Softmax, DecoupledSoftmax, Sigmoid, MultiSimilarity, BinomialDeviance, LiftedStructure, Contrastive, Triplet
