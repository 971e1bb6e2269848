"""sparse_ot: fakes, autograd, the result, and the public function over a matrix of costs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import derivatives, register, rows, transport

OP = "sparse_ot"
_solve, gradients = map(register.operator, (OP, f"{OP}_backward"))
METHODS = ("semi_dual", "dual")


@dataclass(frozen=True, repr=False)
class SparseOTResult:
    """A solved transport problem with few entries a column, or a batch of them: what :func:`tilewise.sparse_ot` and
    :func:`tilewise.sparse_ot_points` return.

    Attributes:
        values: (..., n, k) the entries of each column of the plan, in the order of their rows, then zeros.
            Differentiable in the costs or points, a and b, through the solution, as long as no tie is passed.
        indices: (..., n, k) int64, their rows; 0 where the value is 0.
        value: (...) of the dual, which is at most the least cost ``<T, C> + gamma/2 |T|^2``, and equal to it where the
            marginals hold. Differentiable in the costs or points, a and b.
        alpha: (..., m) dual potentials of the rows, without gradient.
        beta: (..., n) those of the columns.
        row_violation: (...) ``sum |T 1 - a| / sum a``. Above 0 where no plan of the dual has the rows' marginal: at a
            tie, which a small k makes common.
        column_violation: (...) the same of the columns; rounding alone with the semi-dual.
        tie_margin: (...) the least difference of a column's k-th and following score where the following would have had
            mass, in units of the cost; inf where k cuts nothing off, 0 at a tie.
        n_iter: (...) int64, evaluations of the dual.
        converged: (...) whether the violations are at most tol.
    """

    values: Tensor
    indices: Tensor
    value: Tensor
    alpha: Tensor
    beta: Tensor
    row_violation: Tensor
    column_violation: Tensor
    tie_margin: Tensor
    n_iter: Tensor
    converged: Tensor
    _a: Tensor
    _b: Tensor

    def __repr__(self) -> str:
        shape, m, (n, k) = tuple(self.value.shape), self.alpha.shape[-1], self.values.shape[-2:]
        converged = f"{int(self.converged.sum())}/{self.value.numel()}"
        return f"SparseOTResult(batch={shape}, m={m}, n={n}, k={k}, converged={converged})"

    def plan(self) -> Tensor:
        """(..., m, n): T, dense, formed anew at every call. Differentiable like ``values``."""
        shape = (*self.values.shape[:-1], self.alpha.shape[-1])
        return self.values.new_zeros(shape).scatter_add(-1, self.indices, self.values).mT

    def row_sums(self) -> Tensor:
        """(..., m): T 1."""
        entries, where = self.values.flatten(-2), self.indices.flatten(-2)
        return self.values.new_zeros(self.alpha.shape).scatter_add(-1, where, entries)

    @property
    def gap(self) -> Tensor:
        """(...): the plan's own cost ``<T, C> + gamma/2 |T|^2`` above the dual's value; 0 where the marginals hold,
        below 0 where a plan that moves too little is cheaper."""
        with torch.no_grad():
            of_rows = self.alpha * (self.row_sums() - self._a)
            of_columns = self.beta * (self.values.sum(-1) - self._b)
            return of_rows.sum(-1) + of_columns.sum(-1)


def sparse_ot(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    k: int,
    gamma: float = 1.0,
    method: str = "semi_dual",
    max_iter: int = 500,
    tol: float = 1e-6,
    init: tuple[Tensor, Tensor] | None = None,
) -> SparseOTResult:
    r"""Optimal transport whose plan has at most k entries in each column, with quadratic regularisation.

    .. math::
        \min_T \langle T, C \rangle + \tfrac{\gamma}{2} \|T\|^2 \quad\text{over}\quad T \ge 0,\ T 1 = a,\
        T^\top 1 = b,\ \|t_j\|_0 \le k

    solved in its dual, which is concave, by L-BFGS. Between linear optimal transport (k = 1: its value + gamma/2 |b|^2)
    and quadratically regularised optimal transport (k = m). The dual's plan has at most k entries a column always, and
    with the semi-dual exact columns; **its rows are exact only where no column has a tie**, so look at
    ``row_violation``: with a small k ties are common.

    From "Sparsity-Constrained Optimal Transport" (Liu, Puigcerver, Blondel, 2023).

    Args:
        cost: (..., m, n), float64 (on a CPU), float32, bfloat16 or float16 (these two are computed in float32), any
            strides; inf forbids a pair.
        a: (..., m) or a shape that broadcasts to it, >= 0; None is 1/m each.
        b: (..., n), with the same sum as a; None is 1/n each.
        k: in [1, m], and k n at least the number of rows with mass.
        gamma: > 0, in units of the cost.
        method: "semi_dual" seeks alpha alone and has exact columns; "dual" seeks alpha and beta.
        max_iter: evaluations of the dual.
        tol: of ``row_violation`` and ``column_violation``, which ends the search.
        init: (alpha, beta) to start from, (..., m) and (..., n), such as those of an earlier result; constants.

    Returns:
        A :class:`~tilewise.SparseOTResult`: values, indices, value, alpha, beta, row_violation, tie_margin, n_iter,
        converged, gap, plan().

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.
        RuntimeError: on a CPU: a NaN in the costs, a negative marginal, sums that differ, a column that is forbidden,
            more rows with mass than k n.

    Example:
        >>> import torch, tilewise
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.2, 0.9]])
        >>> result = tilewise.sparse_ot(cost, torch.tensor([0.3, 0.5, 0.2]), k=2)
        >>> result.indices.tolist(), bool(result.converged)
        ([[0, 2], [1, 0]], True)
    """
    transport.check_tensor(OP, "cost", cost, "m, n", 2)
    *batch, m, n = cost.shape
    batch = torch.Size(batch)
    problem = check_problem(OP, cost, batch, m, n, a, b, k=k, gamma=gamma, method=method, max_iter=max_iter, tol=tol,
                            init=init)  # fmt: skip
    costs = cost.mT.to(statistics_dtype(cost)).reshape(-1, n, m).contiguous()
    return problem.result(_solve(costs, *problem.tensors, **problem.options))


@dataclass(frozen=True)
class SparseProblem:
    """Marginals, where to start, and options of checked arguments, for the operators."""

    batch: torch.Size
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    options: dict

    def result(self, solved: tuple[Tensor, ...]) -> SparseOTResult:
        values, indices, alpha, beta, value, row_error, column_error, margin, n_iter = solved
        a, b = self.tensors[:2]

        def shaped(t: Tensor) -> Tensor:
            return t.reshape((*self.batch, *t.shape[1:]))

        return SparseOTResult(
            values=shaped(values),
            indices=shaped(indices),
            value=shaped(value),
            alpha=shaped(alpha),
            beta=shaped(beta),
            row_violation=shaped(row_error),
            column_violation=shaped(column_error),
            tie_margin=shaped(margin.amin(1)),
            n_iter=shaped(n_iter),
            converged=shaped(torch.maximum(row_error, column_error) <= self.options["tol"]),
            _a=shaped(a.detach()),
            _b=shaped(b.detach()),
        )


def check_problem(
    op: str, like: Tensor, batch: torch.Size, m: int, n: int, a, b, *, k, gamma, method, max_iter, tol, init
) -> SparseProblem:
    rows.check_integer(op, "k", k, high=m, of="the rows of cost")
    gamma = rows.check_positive(op, "gamma", gamma, statistics_dtype(like))
    if method not in METHODS:
        raise ValueError(f"tilewise.{op}: expected method to be 'semi_dual' or 'dual', got {method!r}")
    rows.check_integer(op, "max_iter", max_iter)
    tol = rows.check_number(op, "tol", tol, low=0.0)
    if a is None and k * n < m:  # the kernels count the rows of a given marginal
        raise ValueError(f"tilewise.{op}: expected k n to be at least {m}, the rows with mass, got {k} x {n}")
    a, b = transport.marginal(op, "a", a, like, batch, m), transport.marginal(op, "b", b, like, batch, n)
    start = (None, None)
    if init is not None:
        named = zip(("init[0]", "init[1]"), init, (m, n), strict=True)
        start = tuple(transport.check_like(op, name, p, like, (*batch, size)).detach().reshape(-1, size).contiguous()
                      for name, p, size in named)  # fmt: skip
    options = {"k": k, "gamma": gamma, "method": method, "max_iter": max_iter, "tol": tol}
    return SparseProblem(batch, (a, b, *start), options)


def solved_shapes(like: Tensor, m: int, n: int, k: int):
    size = like.shape[0]
    empty, whole = like.new_empty, torch.int64
    lists = empty(size, n, k), empty(size, n, k, dtype=whole)
    numbers = [empty(size) for _ in range(3)]
    return *lists, empty(size, m), empty(size, n), *numbers, empty(size, n), empty(size, dtype=whole)


@register.fake("sparse_ot")
def _forward_fake(costs, *tensors, k, **options):
    return solved_shapes(costs, costs.shape[2], costs.shape[1], k)


@register.fake("sparse_ot_columns")
def _columns_fake(costs, alpha, level, *, k, gamma, dual=False):
    batch, n, m = costs.shape
    empty = costs.new_empty
    lists = empty(batch, n, k), empty(batch, n, k, dtype=torch.int64)
    return *lists, empty(batch, n), empty(batch, m), empty(batch, n)


@register.fake("sparse_ot_backward")
def _backward_fake(grad_value, grad_values, values, indices, alpha, beta, *, gamma):
    return torch.empty_like(values), torch.empty_like(alpha), torch.empty_like(beta)


DIFFERENTIABLE = (0, 4)  # of the results: the plan's values, and the value of the problem


def keep_solution(ctx, tensors, options, output) -> None:
    """What the gradients need: `tensors`, and the plan with its potentials."""
    ctx.options = options
    ctx.save_for_backward(*tensors, *output[:4])


def _setup_context(ctx, inputs, options, output):
    keep_solution(ctx, (), options, output)


def _backward(ctx, grad_values, grad_value):
    values, indices, alpha, beta = ctx.saved_tensors
    entries, grad_a, grad_b = gradients(
        grad_value, grad_values, values, indices, alpha, beta, gamma=ctx.options["gamma"]
    )
    costs = None
    if ctx.needs_input_grad[0]:
        costs = entries.new_zeros(*entries.shape[:2], alpha.shape[1]).scatter_add_(2, indices, entries)
    return costs, grad_a, grad_b, None, None


register.autograd(OP, _backward, _setup_context, outputs=DIFFERENTIABLE)


def _gradients(grad_value, grad_values, values, indices, alpha, beta, *, gamma):
    """Of the costs of the entries, a and b. Of the value (the envelope): dC = T, da = alpha, db = beta. Of the entries:
    with A = 1[T > 0] and G = A grad, u and v solve [diag(A 1), A; A^T, diag(A^T 1)] [u; v] = [G 1; G^T 1], and

    dC = A (u + v - G) / gamma,   da = u,   db = v
    """
    entries, grad_a, grad_b = torch.zeros_like(values), torch.zeros_like(alpha), torch.zeros_like(beta)
    if grad_value is not None:
        entries += grad_value[:, None, None] * values
        grad_a += grad_value[:, None] * alpha
        grad_b += grad_value[:, None] * beta
    if grad_values is not None:
        support, where = (values > 0).to(values.dtype), indices.flatten(1)
        wanted = grad_values * support

        def to_rows(x: Tensor) -> Tensor:
            return torch.zeros_like(alpha).scatter_add(1, where, x.flatten(1))

        def of_rows(x: Tensor) -> Tensor:
            return x.gather(1, where).view_as(values)

        u, v = transport.implicit(
            lambda x: to_rows(x[:, :, None] * support),
            lambda x: (of_rows(x) * support).sum(2),
            to_rows(support), support.sum(2), to_rows(wanted), wanted.sum(2), torch.ones_like(alpha[:, 0]), None, None
        )  # fmt: skip
        entries += (support * (of_rows(u) + v[:, :, None]) - wanted) / gamma
        grad_a += u
        grad_b += v
    return entries, grad_a, grad_b


register.composite(
    "sparse_ot_backward",
    _gradients,
    "values b M k, #indices b M k, alpha b N, beta b M, grad_value b, grad_values b M k",
)
derivatives.refuse_second(f"{OP}_backward", OP)
derivatives.refuse_derivative("sparse_ot_columns", "expected no gradient: sparse_ot has one")
