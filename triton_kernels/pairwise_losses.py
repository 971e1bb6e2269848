"""Pairwise losses as programs over one row of similarities: the twin of csrc/pairwise/losses.h, with the formulas."""

import triton
import triton.language as tl

LOSSES = (
    "softmax",
    "decoupled_softmax",
    "sigmoid",
    "multi_similarity",
    "binomial_deviance",
    "lifted_structure",
    "contrastive",
    "triplet",
    "log_sum_exp",
    "positive_sum",
    "least_positive",
    "most_negative",
    "window_log_sum_exp",
)


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
def log_one_plus(shift, total):
    """log(1 + sum e^x), of a total relative to shift = max(0, max x)."""
    return tl.where(shift > 0, shift + tl.log(tl.exp(-shift) + total), softplus(tl.log(total)))


@triton.jit
def kept_pairs(z, positive, negative, least, most, epsilon, p1, p2, LOSS: tl.constexpr, MINES: tl.constexpr):
    """What mining leaves of the pairs of a multi-similarity loss; of other losses, all."""
    if LOSS == "multi_similarity" and MINES:
        positive = positive & (z - epsilon < most)
        negative = negative & (z + epsilon > least)
    if LOSS == "window_log_sum_exp":
        positive = positive & (z < p1) & (p2 > 0)
        negative = negative & (z > -p1) & (p2 < 0)
    return positive, negative


@triton.jit
def exponents(z, least, most, p0, p1, p2, LOSS: tl.constexpr):
    """x of the terms f(x) of positives and of negatives, and what is taken off before exp."""
    pull_shift = 0.0
    push_shift = 0.0
    if LOSS == "multi_similarity" or LOSS == "binomial_deviance":
        pull = -p0 * (z - p2)
        push = p1 * (z - p2)
        pull_shift = tl.maximum(-p0 * (least - p2), 0.0)
        push_shift = tl.maximum(p1 * (most - p2), 0.0)
    elif LOSS == "lifted_structure":
        pull = least - z
        push = z - most
    elif LOSS == "contrastive":
        pull = p0 - z
        push = z - p1
    else:
        pull = -z
        push = z
    return pull, push, pull_shift, push_shift


@triton.jit
def terms(z, positive, negative, least, most, top, p0, p1, p2, LOSS: tl.constexpr):
    """The terms that a row sums over its positives and over its negatives."""
    pull, push, pull_shift, push_shift = exponents(z, least, most, p0, p1, p2, LOSS)
    if LOSS == "softmax" or LOSS == "log_sum_exp":
        of_positive = tl.exp(z - top)
        of_negative = of_positive
    elif LOSS == "window_log_sum_exp":
        of_negative = tl.exp(p0 * z - top)
        of_positive = of_negative
    elif LOSS == "decoupled_softmax" or LOSS == "positive_sum":
        of_positive = z
        of_negative = tl.exp(z - most)
    elif LOSS == "sigmoid" or LOSS == "binomial_deviance":
        of_positive = softplus(pull)
        of_negative = softplus(push)
    elif LOSS == "contrastive":
        of_positive = tl.maximum(pull, 0.0)
        of_negative = tl.maximum(push, 0.0)
    else:
        of_positive = tl.exp(pull - pull_shift)
        of_negative = tl.exp(push - push_shift)
    return tl.where(positive, of_positive, 0.0), tl.where(negative, of_negative, 0.0)


@triton.jit
def weights(
    z, cols, positive, negative, least, most, top, n_positive, n_negative, of_positive, of_negative, loss,
    first_positive, first_negative, p0, p1, p2, LOSS: tl.constexpr
):  # fmt: skip
    """dL/dz of a tile."""
    pull, push, pull_shift, push_shift = exponents(z, least, most, p0, p1, p2, LOSS)
    if LOSS == "softmax":
        # The two sums apart: a positive that takes nearly all leaves to the negatives what 1 would swallow.
        e = tl.exp(z - top)
        inverse = 1.0 / (of_positive + of_negative)
        on_negative = e * inverse
        on_positive = ((n_positive * e - of_positive) - of_negative) * (inverse / n_positive)
    elif LOSS == "decoupled_softmax":
        # of_negative: the log of the negatives' sum, relative to most; of_positive: the sum of sigmoids
        gap = (most - z) + of_negative
        on_positive = -sigmoid(gap) / n_positive
        on_negative = of_positive / n_positive * tl.exp(-gap)
    elif LOSS == "sigmoid":
        on_positive = -sigmoid(pull)
        on_negative = sigmoid(push)
    elif LOSS == "multi_similarity":
        on_positive = -tl.exp(pull - pull_shift) / (tl.exp(-pull_shift) + of_positive)
        on_negative = tl.exp(push - push_shift) / (tl.exp(-push_shift) + of_negative)
    elif LOSS == "binomial_deviance":
        on_positive = -p0 * sigmoid(pull) / n_positive
        on_negative = p1 * sigmoid(push) / n_negative
    elif LOSS == "lifted_structure":
        on_positive = tl.where(loss > 0, -tl.exp(pull) / of_positive, 0.0)
        on_negative = tl.where(loss > 0, tl.exp(push) / of_negative, 0.0)
    elif LOSS == "log_sum_exp":
        on_negative = tl.exp(z - top) / (of_positive + of_negative)
        on_positive = on_negative
    elif LOSS == "positive_sum":
        on_positive = z * 0.0 + 1.0
        on_negative = z * 0.0
    elif LOSS == "window_log_sum_exp":
        on_negative = p0 * tl.exp(p0 * z - top) / (of_positive + of_negative)
        on_positive = on_negative
    elif LOSS == "least_positive":
        on_positive = tl.where(cols == first_positive, 1.0, 0.0)
        on_negative = z * 0.0
    elif LOSS == "most_negative":
        on_positive = z * 0.0
        on_negative = tl.where(cols == first_negative, 1.0, 0.0)
    elif LOSS == "contrastive":
        on_positive = tl.where(pull > 0, -1.0 / n_positive, 0.0)
        on_negative = tl.where(push > 0, 1.0 / n_negative, 0.0)
    else:
        weight = tl.where(loss > 0, 1.0, 0.0)
        on_positive = tl.where(cols == first_positive, -weight, 0.0)
        on_negative = tl.where(cols == first_negative, weight, 0.0)
    return tl.where(positive, on_positive, tl.where(negative, on_negative, 0.0))
