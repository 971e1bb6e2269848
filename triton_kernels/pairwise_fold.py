"""What the programs of the pairwise engine are made of: the twin of csrc/pairwise/fold.h.

A program is a loss, or a share of one, over one row of similarities: a class with its name, the number of its
parameters, and device functions of a tile of pairs or of the row. `self` is what the kernel is given: a Program.

    first, second, third           folds: @fold(Op...) gives a tuple of one value per Op, of (self, z, relation, row)
    finish(self, row)              whether the row has the pairs that the loss needs, and the loss
    weight(self, z, relation, row) dL/dz of positives and negatives; or
    write_two(self, row)           two columns and their dL/dz, in turn; 0 of all others

    z           scale s + bias
    relation    1 for positives, -1 for negatives, 0 for what is neither, which adds nothing to a fold
    row         the totals of the folds before, in order; where gradients are written also the loss
"""

from typing import NamedTuple

import triton
import triton.language as tl

# First: the lowest column of a mask, the number of columns where there is none.
Sum, Max, Min, First = (tl.constexpr(op) for op in ("sum", "max", "min", "first"))
INFINITY = tl.constexpr(float("inf"))


class Fold(NamedTuple):
    count: tl.constexpr
    ops: tuple
    function: triton.JITFunction


class Program(NamedTuple):
    parameters: tuple[float, ...]
    count: tl.constexpr
    folds: tuple[Fold, ...]
    finish: triton.JITFunction
    weight: triton.JITFunction | None
    write_two: triton.JITFunction | None
    term: triton.JITFunction | None
    outer: triton.JITFunction | None


def fold(*ops):
    return lambda function: Fold(tl.constexpr(len(ops)), ops, triton.jit(function))


def with_parameters(program: type, parameters: list[float]) -> Program:
    folds = tuple(getattr(program, name) for name in ("first", "second", "third") if hasattr(program, name))
    others = (getattr(program, name, None) for name in Program._fields[3:])
    return Program(tuple(map(float, parameters)), tl.constexpr(len(folds)), folds, *others)


@fold(Min, Max)
def extremes(self, z, relation, row):
    """The hardest pairs: min_P z, inf without positives, and max_N z, -inf without negatives."""
    return tl.where(relation > 0, z, INFINITY), tl.where(relation < 0, z, -INFINITY)


@triton.jit
def by_kind(relation, value, none):
    """The value at positives, and at negatives."""
    return tl.where(relation > 0, value, none), tl.where(relation < 0, value, none)
