"""Limited-memory BFGS for a batch of problems on one device, without waiting for it: every problem has its own line
search and its own end. `csrc/sparse_ot/lbfgs.h` is the same for one problem."""

from collections.abc import Callable

import torch
from torch import Tensor

HISTORY = 10
DECREASE, CURVATURE = 1e-4, 0.9  # of the weak Wolfe conditions
SEARCHES = 30  # evaluations of one line search
PATIENCE = 20  # accepted steps without progress


class Asked:
    """Whether any problem goes on. A GPU answers about the time of the question before, so that it has work to do while
    the host waits; while a CUDA graph is captured it cannot be asked, and all steps are taken."""

    def __init__(self, like: Tensor):
        self.can = not like.is_meta and not (like.is_cuda and torch.cuda.is_current_stream_capturing())
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def any(self, going: Tensor) -> bool:
        if not self.can:
            return True
        if not going.is_cuda:
            return bool(going.any())
        answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        answer.copy_(going.any(), non_blocking=True)
        before, self._before = self._before, (answer, torch.cuda.current_stream(going.device).record_event())
        if before is None:
            return True
        before[1].synchronize()
        return bool(before[0])


def minimise(
    function: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], x: Tensor, *, max_iter: int, tol: float
) -> tuple[Tensor, Tensor]:
    """Where a function of (B, size) is least, and how often it was evaluated, (B,).

    function(x) is (value (B,) float64, gradient (B, size), error (B,)): a problem ends where its error is at most tol,
    after max_iter evaluations, or where no step helps. The line search is that of Lewis and Overton ("Nonsmooth
    optimization via quasi-Newton methods", 2013), which a kink does not mislead: it halves an interval from `low`,
    where the slope is still steep, to `high`, where the value has not decreased.
    """
    batch, size = x.shape
    value, gradient, error = function(x)
    n_iter = torch.ones(batch, dtype=torch.int64, device=x.device)
    going = error > tol
    steps = x.new_zeros(HISTORY, batch, size)
    changes, inverses = torch.zeros_like(steps), x.new_zeros(HISTORY, batch, dtype=torch.float64)
    unit = torch.finfo(x.dtype).eps

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u.double() * v.double()).sum(1)

    def first_step(gradient: Tensor) -> Tensor:
        return 1 / dot(gradient, gradient).clamp(min=1e-30).sqrt()

    direction, step = -gradient, first_step(gradient)
    slope = dot(direction, gradient)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    searched, stalled = torch.zeros_like(n_iter), torch.zeros_like(n_iter)
    least = error.clone()
    asked = Asked(going)
    for evaluation in range(1, max_iter):
        if evaluation % 10 == 0 and not asked.any(going):
            break
        trial = x + (step[:, None] * direction).to(x.dtype)
        value_there, gradient_there, error_there = function(trial)
        n_iter += going
        slope_there = dot(gradient_there, direction)
        # Near the end the values differ by less than their rounding: there the slopes decide (Hager and Zhang, 2005).
        noise = 4 * unit * value.abs()
        fits = (value_there <= value + DECREASE * step * slope) | (
            (value_there <= value + noise) & (slope_there <= (2 * DECREASE - 1) * slope)
        )
        steep = slope_there < CURVATURE * slope
        taken = going & fits & ~steep
        high = torch.where(fits, high, step)
        low = torch.where(fits & steep, step, low)

        moved, changed = trial - x, gradient_there - gradient
        curved = dot(moved, changed)
        known = taken & (curved > unit * dot(changed, changed).sqrt() * dot(moved, moved).sqrt())
        steps, changes = (
            torch.where(known[:, None], torch.cat([kept[1:], new[None]]), kept)
            for kept, new in ((steps, moved), (changes, changed))
        )
        inverses = torch.where(known, torch.cat([inverses[1:], 1 / curved[None]]), inverses)
        progress = (value - value_there > noise) | (error_there < 0.5 * least)
        stalled = torch.where(taken, torch.where(progress, 0, stalled + 1), stalled)
        least = torch.where(taken, torch.minimum(least, error_there), least)
        x, gradient = (torch.where(taken[:, None], new, old) for new, old in ((trial, x), (gradient_there, gradient)))
        value, error = torch.where(taken, value_there, value), torch.where(taken, error_there, error)

        searched = torch.where(taken, 0, searched + 1)
        failed = searched > SEARCHES
        fresh = ~(inverses != 0).any(0)
        going = going & (error > tol) & (stalled < PATIENCE) & ~(failed & fresh)
        inverses = torch.where(failed, 0, inverses)  # the next try is along the gradient
        renewed = taken | failed
        direction = torch.where(renewed[:, None], _direction(gradient, steps, changes, inverses, dot), direction)
        slope = torch.where(renewed, dot(direction, gradient), slope)
        middle = torch.where(high < torch.inf, 0.5 * (low + high), 2 * step)
        plain = ~(inverses != 0).any(0)
        step = torch.where(renewed, torch.where(plain, first_step(gradient), 1.0), middle)
        low, high = torch.where(renewed, 0, low), torch.where(renewed, torch.inf, high)
        searched = torch.where(failed, 0, searched)
    return x, n_iter


def _direction(gradient: Tensor, steps: Tensor, changes: Tensor, inverses: Tensor, dot) -> Tensor:
    """The two-loop recursion; a pair whose inverse is 0 is not there."""
    q, along = gradient, []
    for i in reversed(range(HISTORY)):
        along.append(inverses[i] * dot(steps[i], q))
        q = q - (along[-1][:, None] * changes[i]).to(q.dtype)
    curvature = inverses[-1] * dot(changes[-1], changes[-1])
    q = torch.where((inverses[-1] != 0)[:, None], (q / curvature[:, None]).to(q.dtype), q)
    for i in range(HISTORY):
        back = inverses[i] * dot(changes[i], q)
        q = q + ((along.pop() - back)[:, None] * steps[i]).to(q.dtype)
    return -q
