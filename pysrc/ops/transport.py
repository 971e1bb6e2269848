"""What the operators of entropic optimal transport share: checked arguments, the derivative of a solved problem, and
the result that users hold."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.formulas.lbfgs import Asked
from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import autocast, register, rows

Apply = Callable[[Tensor], Tensor]  # a plan, or its transpose, on (batch, size)


@dataclass(frozen=True)
class Problem:
    """Marginals (B, n) and (B, m), epsilon (B,) and penalties of checked arguments, in the type of statistics."""

    batch: torch.Size  # as the caller has it
    a: Tensor
    b: Tensor
    epsilon: Tensor
    rho_a: float | None
    rho_b: float | None
    init: tuple[Tensor | None, Tensor | None]
    max_iter: int
    tol: float

    @property
    def penalties(self) -> dict[str, float | None]:
        return {"rho_a": self.rho_a, "rho_b": self.rho_b}


def check_tensor(op: str, name: str, tensor: Tensor, last: str, dims: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tilewise.{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.dim() < dims or 0 in tensor.shape[-dims:]:
        raise ValueError(f"tilewise.{op}: expected {name} to have shape (..., {last}), got {tuple(tensor.shape)}")
    rows.check_floating(op, name, tensor)


def check_like(op: str, name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], spread=False) -> Tensor:
    """A floating tensor of a shape (with `spread`, one that broadcasts to it), in the type of statistics of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tilewise.{op}: expected {name} to be a tensor or None, got {type(tensor).__name__}")
    fits = tensor.shape == shape
    if spread and tensor.dim() <= len(shape):
        tail = shape[len(shape) - tensor.dim() :]
        spreads = all(t in (1, s) for t, s in zip(tensor.shape[:-1], tail, strict=False))
        fits = spreads and tensor.shape[-1:] == tail[-1:]
    if not fits or not tensor.is_floating_point():
        raise ValueError(
            f"tilewise.{op}: expected {name} to be floating of shape {tuple(shape)}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    rows.check_device(op, name, tensor, like, "the costs")
    return tensor.expand(shape).to(statistics_dtype(like))


def marginal(op: str, name: str, given: Tensor | None, like: Tensor, batch: torch.Size, count: int) -> Tensor:
    """(B, count), uniform if None; it may broadcast over the batch."""
    if given is None:
        return torch.full((batch.numel(), count), 1 / count, dtype=statistics_dtype(like), device=like.device)
    given = check_like(op, name, given, like, (*batch, count), spread=True)
    return given.reshape(batch.numel(), count).contiguous()


def check_problem(
    op: str, like: Tensor, batch: torch.Size, n: int, m: int, *, a, b, epsilon, max_iter, tol, reg_marginal, init=None
) -> Problem:
    """Of the arguments that every transport has; `like` has the dtype and the device."""
    wide, size = statistics_dtype(like), batch.numel()

    if isinstance(epsilon, Tensor):
        if epsilon.shape not in ((), batch) or not epsilon.is_floating_point():
            raise ValueError(
                f"tilewise.{op}: expected epsilon to be a number or floating of shape () or {tuple(batch)}, "
                f"got {epsilon.dtype} of shape {tuple(epsilon.shape)}"
            )
        rows.check_device(op, "epsilon", epsilon, like, "the costs")
        epsilon = epsilon.to(wide).expand(batch).reshape(size).contiguous()
    else:
        number = rows.check_positive(op, "epsilon", epsilon, wide)
        epsilon = register.as_tensor(number, wide, like.device).repeat(size)
    rows.check_integer(op, "max_iter", max_iter)
    tol = rows.check_number(op, "tol", tol, low=0.0)
    if not isinstance(reg_marginal, tuple):
        reg_marginal = (reg_marginal, reg_marginal)
    if len(reg_marginal) != 2:
        raise ValueError(f"tilewise.{op}: expected reg_marginal to be a number or a pair, got {reg_marginal!r}")
    rho_a, rho_b = (None if rho is None else rows.check_positive(op, "reg_marginal", rho, wide) for rho in reg_marginal)
    if init is None:
        init = (None, None)
    else:
        f, g = init
        shapes = (("init[0]", f, n), ("init[1]", g, m))
        init = tuple(
            check_like(op, name, p, like, (*batch, count)).detach().reshape(size, count).contiguous()
            for name, p, count in shapes
        )
    sides = marginal(op, "a", a, like, batch, n), marginal(op, "b", b, like, batch, m)
    return Problem(batch, *sides, epsilon, rho_a, rho_b, init, max_iter, tol)


def check_scaling(op: str, epsilon_scaling: float | None) -> float:
    if epsilon_scaling is None:
        return 0.5
    if isinstance(epsilon_scaling, Tensor) or not 0 < epsilon_scaling < 1:
        raise ValueError(
            f"tilewise.{op}: expected epsilon_scaling to be None or a number in (0, 1), got {epsilon_scaling!r}"
        )
    return float(epsilon_scaling)


def marginal_gradient(f: Tensor, epsilon: Tensor, other: Tensor, rho: float | None, *, centred: bool) -> Tensor:
    """dV/da; `other` is the other marginal. Without penalties it is known up to a constant: its mean is 0."""
    if centred:
        return f - f.mean(1, keepdim=True)
    epsilon, mass = epsilon[:, None], other.sum(1, keepdim=True)
    if rho is None:
        return f - epsilon * (1 - mass)
    return -rho * torch.expm1(-f / rho) - epsilon * (torch.exp(-f / rho) - mass)


def reciprocal(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / x, 0)


def implicit(
    apply: Apply,
    transpose_apply: Apply,
    r: Tensor,
    c: Tensor,
    of_f: Tensor,
    of_g: Tensor,
    epsilon: Tensor,
    rho_a: float | None,
    rho_b: float | None,
) -> tuple[Tensor, Tensor]:
    """(u, v) of [diag(r) (1 + eps/rho_a), P; P^T, diag(c) (1 + eps/rho_b)] [u; v] = [of_f; of_g].

    Conjugate gradients on the Schur complement of v, with its diagonal c as the preconditioner; each problem stops on
    its own. Without penalties the complement's null space, constants, is projected out. Every tenth step asks whether
    all are done.
    """
    rows_by = reciprocal(r if rho_a is None else r * (1 + epsilon[:, None] / rho_a))
    columns = c if rho_b is None else c * (1 + epsilon[:, None] / rho_b)
    by_columns = reciprocal(columns)
    right = of_g - transpose_apply(rows_by * of_f)
    if rho_a is None and rho_b is None:
        right = right - columns * (right.sum(1, keepdim=True) / columns.sum(1, keepdim=True))
    v, residual = torch.zeros_like(right), right
    direction = by_columns * residual
    size = start = (residual * direction).sum(1)
    bound = start * (1e-5 if right.dtype == torch.float32 else 1e-11) ** 2
    going = size > bound
    asked = Asked(going)
    for step in range(min(1000, 2 * right.shape[1] + 20)):
        if step % 10 == 0 and not asked.any(going):
            break
        image = columns * direction - transpose_apply(rows_by * apply(direction))
        along = (direction * image).sum(1)
        length = torch.where(going & (along > 0), size / along, 0)[:, None]
        v = v + length * direction
        residual = residual - length * image
        scaled = by_columns * residual
        before, size = size, (residual * scaled).sum(1)
        direction = scaled + torch.where(going, size / before, 0)[:, None] * direction
        going = going & (size > bound) & (along > 0)
    else:
        if asked.can and bool((size > 1e-6 * start).any()):
            warnings.warn(
                "tilewise: the gradient of a transport plan is not accurate: conjugate gradients did not converge; "
                "let the problem itself converge (more iterations), or take a larger epsilon",
                stacklevel=2,
            )
    return rows_by * (of_f - apply(v)), v


@dataclass(frozen=True)
class TransportLoss:
    """A loss made of solved transport problems, with how near to the solution they are: what
    :func:`tilewise.sinkhorn_divergence`, :func:`tilewise.monge_gap` and :class:`tilewise.nn.SamplesLoss` return when
    ``return_result`` is True.

    Attributes:
        value: (...) the loss, differentiable.
        n_iter: (...) int64, the most iterations that one of its problems took.
        marginal_error: (...) the largest of its problems' errors.
        converged: (...) whether that is at most tol.
    """

    value: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    converged: Tensor


def finished(op: str, loss: TransportLoss, return_result: bool) -> Tensor | TransportLoss:
    """What the caller wants of it; a value alone warns where it is not the solution's. Nobody waits for a device, and a
    graph that is being compiled has no values."""
    if return_result:
        return loss
    known = loss.converged.device.type == "cpu" and type(loss.converged) is Tensor
    if known and not torch.compiler.is_compiling() and not register.transforms_active() and not loss.converged.all():
        error, n_iter = float(loss.marginal_error.max()), int(loss.n_iter.max())
        warnings.warn(
            f"tilewise.{op}: not converged: the marginals' error is {error:.1e} after {n_iter} iterations; "
            "let it have more (max_iter), a larger epsilon, or epsilon_scaling",
            stacklevel=_level_of_caller(),
        )
    return loss.value


def _level_of_caller() -> int:
    """Of whoever called this library, for warnings, which are shown once for each place."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("tilewise.", "torch.nn.")):
        level, frame = level + 1, frame.f_back
    return level


@dataclass(frozen=True, repr=False)
class SinkhornResult:
    """A solved transport problem, or a batch of them: what :func:`tilewise.sinkhorn` and
    :func:`tilewise.sinkhorn_points` return.

    Attributes:
        f: (..., n) dual potentials of the rows, without gradient; with g up to a constant where no marginal is
            penalised.
        g: (..., m) those of the columns.
        value: (...) ``min <P, C> + epsilon KL(P | a b^T)``, with the penalties if there are any. Differentiable in the
            costs or points, a, b and epsilon (as if the problem were solved exactly).
        n_iter: (...) int64, iterations done.
        marginal_error: (...) ``sum |P 1 - a| / sum a``, with a penalty against ``a exp(-f / rho)``. The columns are
            exact after every iteration.
        converged: (...) whether the error is at most tol.
    """

    f: Tensor
    g: Tensor
    value: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    converged: Tensor
    _plan: Callable[[], Tensor]
    _apply: Callable[[Tensor, bool], Tensor]
    _points: Tensor | None = None

    def __repr__(self) -> str:
        shape, n, m = tuple(self.value.shape), self.f.shape[-1], self.g.shape[-1]
        converged = f"{int(self.converged.sum())}/{self.value.numel()}"
        return f"SinkhornResult(batch={shape}, n={n}, m={m}, converged={converged})"

    def plan(self) -> Tensor:
        """(..., n, m): P, formed anew at every call. Differentiable, through the solution (see ``gradient``)."""
        with autocast.off(self.f.device.type):
            return self._plan()

    def apply(self, v: Tensor) -> Tensor:
        """P v for v of shape (..., m) or (..., m, p), without forming P where no gradient is asked for (of points:
        never)."""
        return self._product(v, self.g, transpose=False)

    def transpose_apply(self, v: Tensor) -> Tensor:
        """P^T v for v of shape (..., n) or (..., n, p)."""
        return self._product(v, self.f, transpose=True)

    def barycentric_map(self, points: Tensor | None = None) -> Tensor:
        """(..., n, d): where each row goes on average, ``P points / P 1``, 0 without mass; points are (..., m, d),
        by default y."""
        points = self._points if points is None else points
        if points is None:
            raise ValueError("tilewise.sinkhorn: expected the points of the columns for barycentric_map, got None")
        moved = self.apply(torch.cat([points, torch.ones_like(points[..., :1])], -1))
        mass = moved[..., -1:]
        return moved[..., :-1] / torch.where(mass > 0, mass, 1)

    def _product(self, v: Tensor, side: Tensor, transpose: bool) -> Tensor:
        flat = v.dim() == side.dim()
        matrix = v[..., None] if flat else v
        if matrix.shape[:-1] != side.shape:
            raise ValueError(
                f"tilewise.sinkhorn: expected v to have shape {tuple(side.shape)} or {(*side.shape, 'p')}, "
                f"got {tuple(v.shape)}"
            )
        with autocast.off(side.device.type):
            out = self._apply(matrix.to(side.dtype).reshape(-1, *matrix.shape[-2:]).contiguous(), transpose)
        out = out.reshape(*side.shape[:-1], *out.shape[1:])
        return out[..., 0] if flat else out
