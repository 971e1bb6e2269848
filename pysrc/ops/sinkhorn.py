"""sinkhorn: fakes, autograd, and the public function over a matrix of costs."""

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.formulas.transport import plan as plan_of_potentials
from tilewise.formulas.transport import row_error, value_of
from tilewise.ops import derivatives, register, rows, transport
from tilewise.ops.transport import Problem, SinkhornResult, marginal_gradient

OP = "sinkhorn"
SMALL, MOST_UNROLLED = 64, 10_000  # rows and columns, iterations of a problem that is differentiated through them
_solve, _plan, _apply, _solve_unrolled, _unrolled_gradients, _as_solution, _plan_gradients = map(
    register.operator,
    (OP, "sinkhorn_plan", "sinkhorn_apply", "sinkhorn_unrolled", "sinkhorn_unrolled_backward", "sinkhorn_potentials",
     "sinkhorn_plan_backward"),
)  # fmt: skip


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    max_iter: int = 1000,
    tol: float = 1e-6,
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    mask: Tensor | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    epsilon_scaling: float | None = None,
    gradient: str = "implicit",
) -> SinkhornResult:
    r"""Entropic optimal transport between two weighted sets, from the matrix of costs.

    .. math::
        V = \min_P \langle P, C \rangle + \epsilon\, \mathrm{KL}(P \,|\, a b^\top), \qquad
        P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \epsilon)

    over plans with the marginals a and b, or with ``reg_marginal`` = (rho_a, rho_b) over all plans with the penalties
    rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b). Safe at any epsilon: exponentials never overflow, and none that matters is
    lost. Problems of a batch stop each on its own. On a CPU one more matrix of the size of a problem's costs is held
    (for batches of small problems: of a few); the dtype of the costs limits the error that can be reached to about
    max|C| / epsilon times its unit.

    From "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (Cuturi, 2013).

    Args:
        cost: (..., n, m), float64 (on a CPU), float32, bfloat16 or float16 (these two are computed in float32), any
            strides; inf forbids a pair.
        a: (..., n) or a shape that broadcasts to it, >= 0; None is 1/n each.
        b: (..., m), with the same sum as a where marginals are constraints; None is 1/m each.
        epsilon: > 0, a number or a tensor of shape () or that of the batch, in units of the cost.
        max_iter: of iterations, each an update of f and of g.
        tol: of ``marginal_error``, which ends the iterations; 0 does max_iter of them (unless the error is 0).
        reg_marginal: penalties rho > 0 in units of the cost: one for both, or a pair of which one may be None.
        mask: (..., n, m) bool, False forbids a pair. Ragged batches need none: a and b with zeros do it.
        init: (f, g) to start from, (..., n) and (..., m), such as those of an earlier result; constants.
        epsilon_scaling: in (0, 1): begin with epsilon = max(C) and multiply by this each time that problem is solved to
            an error of 0.005 (in time for half of max_iter to be left for epsilon itself), with averaged and relaxed
            updates. Where epsilon is far below the costs it saves most of the iterations.
        gradient: of ``plan()``, ``apply()``: ``"implicit"``, by a linear system, whatever the iterations were;
            ``"unrolled"``, through all max_iter <= 10,000 of them (tol is then not looked at), for n, m <= 64; the
            backward keeps up to 2 (n + m) max_iter numbers for each problem of the batch (on a CPU: of those that it is
            at, a vector's lanes on every thread).

    Returns:
        A :class:`~tilewise.SinkhornResult`: potentials f and g, value, plan(), apply(v), transpose_apply(v), n_iter,
        marginal_error, converged.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.
        RuntimeError: on a CPU: a NaN in the costs, a negative marginal, sums that differ.

    Example:
        >>> import torch, tilewise
        >>> x, y = torch.randn(100, 2), torch.randn(80, 2)
        >>> result = tilewise.sinkhorn(torch.cdist(x, y), epsilon=0.1)
        >>> result.plan().shape, bool(result.converged)
        (torch.Size([100, 80]), True)
    """
    transport.check_tensor(OP, "cost", cost, "n, m", 2)
    *batch, n, m = cost.shape
    batch = torch.Size(batch)
    problem = transport.check_problem(
        OP, cost, batch, n, m, a=a, b=b, epsilon=epsilon, max_iter=max_iter, tol=tol, reg_marginal=reg_marginal,
        init=init
    )  # fmt: skip
    scaling = transport.check_scaling(OP, epsilon_scaling)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != cost.shape:
            raise ValueError(
                f"tilewise.{OP}: expected mask to be bool of shape {tuple(cost.shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        rows.check_device(OP, "mask", mask, cost, "cost")
        cost = cost.masked_fill(~mask, torch.inf)
    cost = cost.to(statistics_dtype(cost)).reshape(-1, n, m)
    if gradient == "unrolled":
        return _unrolled(cost, problem, init, epsilon_scaling)
    if gradient != "implicit":
        raise ValueError(f"tilewise.{OP}: expected gradient to be 'implicit' or 'unrolled', got {gradient!r}")
    a, b, epsilon = problem.a, problem.b, problem.epsilon
    start = None
    if epsilon_scaling is not None:
        matrix = cost.detach()
        start = matrix.masked_fill(matrix == torch.inf, 0).amax((1, 2))
    f, g, value, error, n_iter = _solve(
        cost, a, b, epsilon, *problem.init, start, max_iter=max_iter, tol=problem.tol, scaling=scaling,
        **problem.penalties
    )  # fmt: skip

    def plan() -> Tensor:
        return _plan(cost, a, b, epsilon, f, g, **problem.penalties)

    def apply(v: Tensor, transpose: bool) -> Tensor:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (cost, a, b, epsilon, v)):
            return (plan().mT if transpose else plan()) @ v
        if transpose:
            return _apply(cost.mT, b, a, epsilon, g, f, v)
        return _apply(cost, a, b, epsilon, f, g, v)

    return _result(problem, f, g, value, error, n_iter, plan, apply)


def _result(problem: Problem, f, g, value, error, n_iter, plan, apply) -> SinkhornResult:
    batch = problem.batch
    return SinkhornResult(
        f=f.detach().reshape(*batch, f.shape[1]),
        g=g.detach().reshape(*batch, g.shape[1]),
        value=value.reshape(batch),
        n_iter=n_iter.reshape(batch),
        marginal_error=error.reshape(batch),
        converged=(error <= problem.tol).reshape(batch),
        _plan=lambda: plan().reshape(*batch, f.shape[1], g.shape[1]),
        _apply=apply,
    )


def _unrolled(cost: Tensor, problem: Problem, init, epsilon_scaling) -> SinkhornResult:
    if init is not None or epsilon_scaling is not None:
        raise ValueError(f"tilewise.{OP}: expected no init and no epsilon_scaling with gradient='unrolled'")
    if max(cost.shape[1:]) > SMALL:
        raise ValueError(
            f"tilewise.{OP}: expected cost to have at most {SMALL} rows and columns with gradient='unrolled', "
            f"got {tuple(cost.shape[1:])}"
        )
    if problem.max_iter > MOST_UNROLLED:
        raise ValueError(
            f"tilewise.{OP}: expected max_iter to be at most {MOST_UNROLLED} with gradient='unrolled', which keeps "
            f"every iteration, got {problem.max_iter}"
        )
    a, b, epsilon, penalties = problem.a, problem.b, problem.epsilon, problem.penalties
    f, g = _solve_unrolled(cost, a, b, epsilon, max_iter=problem.max_iter, **penalties)
    value = value_of(f, g, a, b, epsilon, **penalties)
    with torch.no_grad():
        error = row_error(cost, f, g, a, b, epsilon, problem.rho_a)

    def plan() -> Tensor:
        return plan_of_potentials(cost, a, b, epsilon, f, g)

    def apply(v: Tensor, transpose: bool) -> Tensor:
        return (plan().mT if transpose else plan()) @ v

    n_iter = torch.full_like(error, problem.max_iter, dtype=torch.int64)
    return _result(problem, f, g, value, error, n_iter, plan, apply)


def _solved_shapes(like: Tensor, n: int, m: int):
    batch = like.shape[0]
    return (
        like.new_empty(batch, n),
        like.new_empty(batch, m),
        like.new_empty(batch),
        like.new_empty(batch),
        like.new_empty(batch, dtype=torch.int64),
    )


@register.fake("sinkhorn")
def _forward_fake(cost, *tensors, **options):
    return _solved_shapes(cost, *cost.shape[1:])


@register.fake("sinkhorn_plan")
def _plan_fake(cost, *tensors, **options):
    return cost.new_empty(cost.shape)


@register.fake("sinkhorn_apply")
def _apply_fake(cost, a, b, epsilon, f, g, v):
    return v.new_empty(*cost.shape[:2], v.shape[2])


@register.fake("sinkhorn_unrolled")
def _unrolled_fake(cost, *tensors, **options):
    return _solved_shapes(cost, *cost.shape[1:])[:2]


@register.fake("sinkhorn_potentials")
def _potentials_fake(cost, a, b, epsilon, f, g, **options):
    return torch.empty_like(f), torch.empty_like(g)


@register.fake("sinkhorn_plan_backward")
def _plan_backward_fake(grad_plan, grad_f, grad_g, cost, a, b, epsilon, f, g, **options):
    return cost.new_empty(cost.shape), a.new_empty(a.shape), b.new_empty(b.shape), torch.empty_like(epsilon)


@register.fake("sinkhorn_unrolled_backward")
def _unrolled_backward_fake(grad_f, grad_g, cost, a, b, epsilon, **options):
    return cost.new_empty(cost.shape), a.new_empty(a.shape), b.new_empty(b.shape), torch.empty_like(epsilon)


def _penalties(options: dict) -> dict:
    return {"rho_a": options["rho_a"], "rho_b": options["rho_b"]}


def _setup_context(ctx, inputs, options, output):
    ctx.penalties = _penalties(options)
    ctx.save_for_backward(*inputs[:4], *output[:2])


def _backward(ctx, grad):
    """The envelope: dC = P, da = f, db = g, and KL(P | a b^T) for epsilon, all times the upstream gradient."""
    cost, a, b, epsilon, f, g = ctx.saved_tensors
    need_cost, need_a, need_b, need_epsilon = ctx.needs_input_grad[:4]
    d_cost = d_a = d_b = d_epsilon = None
    if (need_a or need_b or need_epsilon) and torch.is_grad_enabled():
        f, g = _as_solution(cost, a, b, epsilon, f, g, **ctx.penalties)
    rho_a, rho_b = ctx.penalties.values()
    centred = rho_a is None and rho_b is None
    if need_a:
        d_a = grad[:, None] * marginal_gradient(f, epsilon, b, rho_a, centred=centred)
    if need_b:
        d_b = grad[:, None] * marginal_gradient(g, epsilon, a, rho_b, centred=centred)
    if need_cost or need_epsilon:
        plan = _plan(cost, a, b, epsilon, f.detach(), g.detach(), **ctx.penalties)
        if need_epsilon:
            exponent = (f[:, :, None] + g[:, None] - cost.masked_fill(cost == torch.inf, 0)) / epsilon[:, None, None]
            d_epsilon = grad * ((plan * (exponent - 1)).sum((1, 2)) + a.sum(1) * b.sum(1))
        if need_cost:
            d_cost = plan * grad[:, None, None] if torch.is_grad_enabled() else plan.mul_(grad[:, None, None])
    return d_cost, d_a, d_b, d_epsilon, None, None, None


_jvp = derivatives.of_losses(OP, _backward, by_row=(0, 1, 2, 3))
register.autograd(OP, _backward, _setup_context, _jvp, outputs=(2,))


def _plan_setup(ctx, inputs, options, output):
    if inputs[1] is None or inputs[2] is None:
        raise RuntimeError("tilewise.sinkhorn_plan: expected both marginals where a gradient is wanted, got None")
    ctx.penalties = _penalties(options)
    ctx.save_for_backward(*inputs)


def _plan_backward(ctx, grad):
    wanted = {"a_grad": ctx.needs_input_grad[1], "b_grad": ctx.needs_input_grad[2]}
    found = _plan_gradients(grad, None, None, *ctx.saved_tensors, **ctx.penalties, **wanted)
    return *found, None, None


register.autograd("sinkhorn_plan", _plan_backward, _plan_setup)


def _potentials_backward(ctx, grad_f, grad_g):
    wanted = {"a_grad": ctx.needs_input_grad[1], "b_grad": ctx.needs_input_grad[2]}
    found = _plan_gradients(None, grad_f, grad_g, *ctx.saved_tensors, **ctx.penalties, **wanted)
    return *found, None, None


register.autograd("sinkhorn_potentials", _potentials_backward, _plan_setup)


def _potentials(cost, a, b, epsilon, f, g, **penalties):
    """f and g, as functions of the problem that they solve."""
    return f.clone(), g.clone()


def _implicit_backward(
    grad_plan, grad_f, grad_g, cost, a, b, epsilon, f, g, *, rho_a, rho_b, a_grad, b_grad
):  # fmt: skip
    """Through the solution: u and v solve the linear system of transport.implicit, and with W = grad_plan P

    dC = P (u + v) - W / eps,   da = (sum_j W - eps P v) / a,   db likewise,   d eps = sum dC (f + g - C) / eps
    """
    scale = epsilon[:, None]
    plan = _plan(cost, a, b, epsilon, f, g)
    of_f = torch.zeros_like(f) if grad_f is None else grad_f
    of_g = torch.zeros_like(g) if grad_g is None else grad_g
    weighted = None
    if grad_plan is not None:
        weighted = plan * grad_plan / scale[:, None]
        of_f, of_g = of_f + weighted.sum(2), of_g + weighted.sum(1)
    u, v = transport.implicit(
        lambda x: (plan @ x[:, :, None])[:, :, 0],
        lambda x: (plan.mT @ x[:, :, None])[:, :, 0],
        plan.sum(2), plan.sum(1), of_f, of_g, epsilon, rho_a, rho_b
    )  # fmt: skip
    d_cost = plan * (u[:, :, None] + v[:, None])
    if weighted is not None:
        d_cost -= weighted
    exponent = (f[:, :, None] + g[:, None] - cost.masked_fill(cost == torch.inf, 0)) / scale[:, None]
    d_epsilon = (d_cost * exponent).sum((1, 2))

    def of_marginal(without: Tensor, other: Tensor, dim: int) -> Tensor:
        inner = -scale[:, None] * (other[:, None] if dim == 2 else other[:, :, None])
        return (without * (inner if grad_plan is None else inner + grad_plan)).sum(dim)

    d_a, d_b = torch.zeros_like(a), torch.zeros_like(b)
    if a_grad:  # P / a, also where a is 0
        d_a = of_marginal(_plan(cost, None, b, epsilon, f, g), v, 2)
    if b_grad:
        d_b = of_marginal(_plan(cost, a, None, epsilon, f, g), u, 1)
    return d_cost, d_a, d_b, d_epsilon


def _unrolled_setup(ctx, inputs, options, output):
    ctx.options = options
    ctx.save_for_backward(*inputs)


def _unrolled_backward(ctx, grad_f, grad_g):
    _, a, b, _ = ctx.saved_tensors
    grad_f = torch.zeros_like(a) if grad_f is None else grad_f.contiguous()
    grad_g = torch.zeros_like(b) if grad_g is None else grad_g.contiguous()
    return _unrolled_gradients(grad_f, grad_g, *ctx.saved_tensors, **ctx.options)


register.autograd("sinkhorn_unrolled", _unrolled_backward, _unrolled_setup)
PROBLEM = "cost b N M, a b N, b b M, epsilon b, f b N, g b M"
register.composite("sinkhorn_potentials", _potentials, PROBLEM)
register.composite("sinkhorn_plan_backward", _implicit_backward, PROBLEM + ", grad_plan b N M, grad_f b N, grad_g b M")
derivatives.refuse_derivative("sinkhorn_apply", "expected no gradient; the plan has one")
derivatives.refuse_second("sinkhorn_plan_backward", "sinkhorn")
derivatives.refuse_second("sinkhorn_unrolled_backward", "sinkhorn")
