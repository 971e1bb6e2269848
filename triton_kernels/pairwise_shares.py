"""What one part of the columns adds to a row's loss, for losses over columns that travel from rank to rank: programs
(pairwise_fold.py) that are not losses, as in csrc/pairwise/shares.h."""

import triton
import triton.language as tl

from .pairwise_fold import INFINITY, First, Max, Min, Sum, fold


@triton.jit
def log_sum(self, row):
    """L = lse of a highest exponent and a sum relative to it, -inf without any"""
    return True, row[0] + tl.log(row[1])


class LogSumExp:
    """L = lse_{P+N} z: of Softmax"""

    name, parameters = "log_sum_exp", 0
    finish = log_sum

    @fold(Max)
    def first(self, z, relation, row):
        return (tl.where(relation != 0, z, -INFINITY),)

    @fold(Sum)
    def second(self, z, relation, row):
        return (tl.where(relation != 0, tl.exp(z - row[0]), 0.0),)

    @triton.jit
    def weight(self, z, relation, row):
        return tl.exp(z - row[0]) / row[1]


class PositiveSum:
    """L = sum_P z: of Softmax"""

    name, parameters = "positive_sum", 0

    @fold(Sum)
    def first(self, z, relation, row):
        return (tl.where(relation > 0, z, 0.0),)

    @triton.jit
    def finish(self, row):
        return True, row[0]

    @triton.jit
    def weight(self, z, relation, row):
        return tl.where(relation > 0, 1.0, 0.0)


@triton.jit
def extreme(self, row):
    return True, row[0]


@triton.jit
def first_of_equals(self, row):
    return row[1], 1.0, -1, 0.0


class LeastPositive:
    """L = min_P z, inf without positives: of MultiSimilarity, which mines by it"""

    name, parameters = "least_positive", 0
    finish, write_two = extreme, first_of_equals

    @fold(Min)
    def first(self, z, relation, row):
        return (tl.where(relation > 0, z, INFINITY),)

    @fold(First)
    def second(self, z, relation, row):
        return ((relation > 0) & (z == row[0]),)


class MostNegative:
    """L = max_N z, -inf without negatives"""

    name, parameters = "most_negative", 0
    finish, write_two = extreme, first_of_equals

    @fold(Max)
    def first(self, z, relation, row):
        return (tl.where(relation < 0, z, -INFINITY),)

    @fold(First)
    def second(self, z, relation, row):
        return ((relation < 0) & (z == row[0]),)


@triton.jit
def in_window(self, z, relation):
    _, limit, side = self.parameters
    return tl.where(side > 0, (relation > 0) & (z < limit), (relation < 0) & (z > -limit))


class WindowLogSumExp:
    """L = lse slope z over the positives with z < limit (side > 0) or the negatives with z > -limit (side < 0): what
    MultiSimilarity keeps, with the extreme of the other kind taken off z"""

    name, parameters = "window_log_sum_exp", 3
    finish = log_sum

    @fold(Max)
    def first(self, z, relation, row):
        return (tl.where(in_window(self, z, relation), self.parameters[0] * z, -INFINITY),)

    @fold(Sum)
    def second(self, z, relation, row):
        return (tl.where(in_window(self, z, relation), tl.exp(self.parameters[0] * z - row[0]), 0.0),)

    @triton.jit
    def weight(self, z, relation, row):
        return tl.where(
            in_window(self, z, relation), self.parameters[0] * tl.exp(self.parameters[0] * z - row[0]) / row[1], 0.0
        )


SHARES = LogSumExp, PositiveSum, LeastPositive, MostNegative, WindowLogSumExp
