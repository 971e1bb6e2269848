"""What an iteration of a transport problem with a falling epsilon does; csrc/sinkhorn/sinkhorn.h (Schedule) says why.

A stage is epsilon, how far updates go (1/2 averaged, 1 exact, more relaxed), how far those before went, and how far the
next relaxed one would go.
"""

import triton
import triton.language as tl

RELAXED = 1.8


@triton.jit
def stage_after(
    now, step, before, relaxed, error, t, epsilon, max_iter, tol, scaling, SYMMETRIC: tl.constexpr
):  # fmt: skip
    """The stage that follows that of iteration t, and whether the problem stops before it."""
    last = now == epsilon
    own = 1.0 if SYMMETRIC else tl.where(before > 1, 2 * (2 - before), 1.0)
    settled = (step >= 1) & (own * error <= tl.where(last, tol, tl.maximum(tol, 0.005)))
    closed = True if SYMMETRIC else before == 1
    stops = last & (step >= 1) & closed & (error <= tol)
    left = tl.maximum(max_iter // 2 - t - 1, 0)
    late = now * tl.exp2(tl.log2(scaling) * left) > epsilon
    falls = (now != epsilon) & (settled | late)
    exact = settled | ((error < 0.5) == 0)
    following = tl.where(falls, 0.5, tl.where(exact, 1.0, relaxed))
    following = tl.where(t + 2 == max_iter, 1.0, following)
    further = tl.where(exact, relaxed, 2 - 1 / (1 / (2 - relaxed) + 0.1))
    further = tl.where(falls, 1.8, further)
    return tl.where(falls, tl.maximum(now * scaling, epsilon), now), following, step, further, stops


@triton.jit
def moved(potential, updated, step):
    """From a potential toward its update."""
    return tl.where(step == 1, updated, potential + step * (updated - potential))


def first_stages(start, epsilon, max_iter):
    """(2, 4, B): of the first iteration, and room for those of every second."""
    stages = epsilon.new_empty(2, 4, len(epsilon))
    stages[:, 0] = start.maximum(epsilon)
    stages[:, 1] = 1.0 if max_iter == 1 else 0.5
    stages[:, 2] = 0.5
    stages[:, 3] = RELAXED
    return stages
