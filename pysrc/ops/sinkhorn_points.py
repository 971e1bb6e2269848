"""sinkhorn_points: fakes, autograd, and the public function over two sets of points, whose costs are never held."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.formulas.transport import costs_of_points
from tilewise.ops import autocast, derivatives, register, rows, transport
from tilewise.ops.sinkhorn import _penalties, _result, _solved_shapes
from tilewise.ops.transport import Problem, SinkhornResult, marginal_gradient
from tilewise.ops.unit_rows import unit_rows

OP = "sinkhorn_points"
COSTS = ("sqeuclidean", "euclidean", "cosine")
solve, plan_of, _apply, _apply_gradients = map(
    register.operator, (OP, "sinkhorn_plan", "sinkhorn_points_apply", "sinkhorn_points_apply_backward")
)


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    cost: str = "sqeuclidean",
    max_iter: int = 1000,
    tol: float = 1e-6,
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    epsilon_scaling: float | None = None,
    allow_tf32: bool = False,
) -> SinkhornResult:
    """Entropic optimal transport between two sets of points, with O((n + m) d) memory.

    The problem of :func:`tilewise.sinkhorn` with costs formed from points, tile by tile, whenever they are needed:
    ``value``, ``apply``, ``transpose_apply``, ``barycentric_map`` and their gradients never hold an (n, m) matrix (on a
    CPU problems of up to 32 MiB of costs keep one of that size; ``plan()`` is one). Points are centred first, so that
    an offset of both sets costs no accuracy.

    From "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (Cuturi, 2013); points in tiles with shifted
    potentials as in "FlashSinkhorn" (2026).

    Args:
        x: (..., n, d), float64 (on a CPU), float32, bfloat16 or float16 (these two are computed in float32).
        y: (..., m, d) of the same dtype (under autocast, of any) and batch.
        a: (..., n) or a shape that broadcasts to it, >= 0; None is 1/n each.
        b: (..., m), with the same sum as a where marginals are constraints; None is 1/m each.
        epsilon: > 0, a number or a tensor of shape () or that of the batch, in units of the cost.
        cost: ``"sqeuclidean"`` |x - y|^2, ``"euclidean"`` |x - y|, or ``"cosine"`` 1 - cos(x, y).
        max_iter, tol, reg_marginal, init: as for :func:`tilewise.sinkhorn`.
        epsilon_scaling: in (0, 1): begin with epsilon = the largest cost that the points' bounding box allows, as for
            :func:`tilewise.sinkhorn`.
        allow_tf32: on a GPU, round the coordinates of which the iterations form squared distances to TF32 (10 bits):
            one product in place of three, where there are 24 features or more. A cost then errs by up to
            2e-3 |x| |y|, which should be small beside epsilon. Gradients take the potentials so found, and exact costs.

    Returns:
        A :class:`~tilewise.SinkhornResult`. Gradients reach x, y, a, b and epsilon through ``value`` (twice), through
        ``apply`` and its like (once, and not for "euclidean" a second time), and through ``plan()``.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.
        RuntimeError: on a CPU: a point that is not finite, a negative marginal, sums that differ.

    Example:
        >>> import torch, tilewise
        >>> x, y = torch.randn(100, 2, requires_grad=True), torch.randn(80, 2) + 1
        >>> result = tilewise.sinkhorn_points(x, y, epsilon=0.5)
        >>> result.value.backward()
        >>> x.grad.shape, result.barycentric_map().shape
        (torch.Size([100, 2]), torch.Size([100, 2]))
    """
    pair, problem, options = prepared(
        OP, x, y, a, b, epsilon=epsilon, cost=cost, max_iter=max_iter, tol=tol, reg_marginal=reg_marginal, init=init,
        epsilon_scaling=epsilon_scaling, allow_tf32=allow_tf32
    )  # fmt: skip
    moved, kind = (pair.x, pair.y), pair.cost
    marginals = (problem.a, problem.b, problem.epsilon)
    f, g, value, error, n_iter = solve(*moved, *marginals, *problem.init, **options)

    def plan() -> Tensor:
        costs = costs_of_points(*moved, kind)
        return plan_of(costs, *marginals, f, g, **problem.penalties)

    def apply(v: Tensor, transpose: bool) -> Tensor:
        arguments = (*moved, *marginals, f, g)
        penalties = problem.penalties
        if transpose:
            arguments = (*moved[::-1], problem.b, problem.a, problem.epsilon, g, f)
            penalties = {"rho_a": problem.rho_b, "rho_b": problem.rho_a}
        return _apply(*arguments, v, cost=kind, **penalties)

    result = _result(problem, f, g, value, error, n_iter, plan, apply)
    object.__setattr__(result, "_points", y)
    return result


@dataclass(frozen=True)
class Pair:
    """Points (B, n, d) and (B, m, d) as the operators take them: centred, dense, in the type of statistics."""

    x: Tensor
    y: Tensor
    cost: str


def prepared(
    op, x, y, a, b, *, epsilon, cost, max_iter, tol, reg_marginal, init=None, epsilon_scaling=None,
    allow_tf32=False
):  # fmt: skip
    """Checked arguments of the operator: the points, the problem, and the options of the call."""
    x, y = autocast.widen(x, y)
    transport.check_tensor(op, "x", x, "n, d", 2)
    transport.check_tensor(op, "y", y, "m, d", 2)
    if y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"tilewise.{op}: expected y to have shape {(*x.shape[:-2], 'm', x.shape[-1])} like x, got {tuple(y.shape)}"
        )
    if y.dtype != x.dtype:
        raise TypeError(f"tilewise.{op}: expected y to be {x.dtype} like x, got {y.dtype}")
    rows.check_device(op, "y", y, x, "x")
    if cost not in COSTS:
        raise ValueError(f"tilewise.{op}: expected cost to be 'sqeuclidean', 'euclidean' or 'cosine', got {cost!r}")
    problem: Problem = transport.check_problem(
        op, x, x.shape[:-2], x.shape[-2], y.shape[-2], a=a, b=b, epsilon=epsilon, max_iter=max_iter, tol=tol,
        reg_marginal=reg_marginal, init=init
    )  # fmt: skip
    scaling = transport.check_scaling(op, epsilon_scaling)
    wide = statistics_dtype(x)
    if y is x:
        x = y = _centred(x.to(wide), None, cost)
    else:
        x, y = _centred(x.to(wide), y.to(wide), cost), _centred(y.to(wide), x.to(wide), cost)
    x, y = (t.reshape(-1, *t.shape[-2:]).contiguous() for t in (x, y))
    kind = "euclidean" if cost == "euclidean" else "sqeuclidean"
    start = None
    if epsilon_scaling is not None:
        both = torch.cat([x.detach(), y.detach()], 1)
        square = (both.amax(1) - both.amin(1)).square().sum(1)
        start = square.sqrt() if kind == "euclidean" else square
    options = {
        "start": start, "cost": kind, "max_iter": max_iter, "tol": problem.tol, "scaling": scaling,
        "allow_tf32": bool(allow_tf32)
    }  # fmt: skip
    return Pair(x, y, kind), problem, options | problem.penalties


def _centred(x: Tensor, other: Tensor | None, cost: str) -> Tensor:
    """x less the mean of both sets; for cosines on the sphere of radius 1/sqrt(2), where |x - y|^2 is 1 - cos."""
    if cost == "cosine":
        return unit_rows(x) * 0.5**0.5
    with torch.no_grad():
        centre = x.mean(-2, keepdim=True)
        if other is not None:
            centre = (centre + other.mean(-2, keepdim=True)) / 2
    return x - centre


@register.fake("sinkhorn_points")
def _forward_fake(x, y, *tensors, **options):
    return _solved_shapes(x, x.shape[1], y.shape[1])


@register.fake("sinkhorn_points_apply")
def _apply_fake(x, y, a, b, epsilon, f, g, v, *tensors, **options):
    return v.new_empty(*x.shape[:2], v.shape[2])


@register.fake("sinkhorn_points_apply_backward")
def _apply_backward_fake(grad, x, y, a, b, epsilon, f, g, v, **options):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, y, a, b, epsilon, v))


def _setup_context(ctx, inputs, options, output):
    ctx.options = {"cost": options["cost"], **_penalties(options)}
    ctx.symmetric = options["symmetric"]
    ctx.save_for_backward(*inputs[:5], *output[:2])


def _toward(x: Tensor, y: Tensor, sums: Tensor, cost: str) -> Tensor:
    """sum_j W_ij dC_ij / dx_i from the sums of W (divided by the distances, if the cost is one) over [1, y, ..]."""
    moved = x * sums[:, :, :1] - sums[:, :, 1 : 1 + y.shape[2]]
    return 2 * moved if cost == "sqeuclidean" else moved


def _with_ones(y: Tensor, squares: bool) -> Tensor:
    """[1, y] and, where costs are summed, |y|^2: what sums over a plan are taken of."""
    parts = [torch.ones_like(y[:, :, :1]), y]
    return torch.cat([*parts, (y * y).sum(2, keepdim=True)] if squares else parts, 2)


def _cost_sum(x: Tensor, sums: Tensor) -> Tensor:
    """sum_ij W_ij C_ij from the same sums of W (for distances, of W / C)."""
    d = x.shape[2]
    squares = (x * x).sum(2) * sums[:, :, 0] + sums[:, :, d + 1] - 2 * (x * sums[:, :, 1 : d + 1]).sum(2)
    return squares.sum(1)


def _backward(ctx, grad):
    """The envelope: dx_i = sum_j P_ij dC_ij / dx_i, da = f, db = g, and KL(P | a b^T) for epsilon."""
    x, y, a, b, epsilon, f, g = ctx.saved_tensors
    if ctx.symmetric:  # g is one update from f: between them the plan is symmetric, and nearer to the solution
        f = g = (f + g) / 2
    cost, rho_a, rho_b = ctx.options.values()
    need_x, need_y, need_a, need_b, need_epsilon = ctx.needs_input_grad[:5]
    over = {"over_distance": True} if cost == "euclidean" else {}
    scale = grad[:, None]
    d_x = d_y = d_a = d_b = d_epsilon = None
    if need_x or need_epsilon:
        v = _with_ones(y, need_epsilon)
        sums = _apply(x, y, a, b, epsilon, f, g, v, **ctx.options, **over)
        d_x = scale[:, :, None] * _toward(x, y, sums, cost)
    if need_y and ctx.symmetric and d_x is not None:
        d_y = d_x
    elif need_y:
        swapped = {"cost": cost, "rho_a": rho_b, "rho_b": rho_a}
        v = _with_ones(x, False)
        of_y = _apply(y, x, b, a, epsilon, g, f, v, **swapped, **over)
        d_y = scale[:, :, None] * _toward(y, x, of_y, cost)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, a, b, epsilon))
    if (need_a or need_b or need_epsilon) and recorded:
        f, g = (_Constant.apply(p, x, y, a, b, epsilon) for p in (f, g))
    centred = rho_a is None and rho_b is None
    if need_a:
        d_a = scale * marginal_gradient(f, epsilon, b, rho_a, centred=centred)
    if need_b:
        d_b = scale * marginal_gradient(g, epsilon, a, rho_b, centred=centred)
    if need_epsilon:
        r = a if rho_a is None else a * torch.exp(-f / rho_a)
        c = b if rho_b is None else b * torch.exp(-g / rho_b)
        exponents = ((f * r).sum(1) + (g * c).sum(1) - _cost_sum(x, sums)) / epsilon
        d_epsilon = grad * (exponents - c.sum(1) + a.sum(1) * b.sum(1))
    return d_x, d_y, d_a, d_b, d_epsilon, None, None, None


class _Constant(torch.autograd.Function):
    """Potentials in a gradient that is to be differentiated again: in marginals and epsilon of points it cannot be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(potential, *problem):
        return potential.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            f"tilewise.{OP}: expected no second differentiation in marginals or epsilon of points; "
            "tilewise.sinkhorn of their costs has it"
        )


_jvp = derivatives.of_losses(OP, _backward, by_row=(0, 1, 2, 3, 4))
register.autograd(OP, _backward, _setup_context, _jvp, outputs=(2,))


def _apply_setup(ctx, inputs, options, output):
    *saved, h, _ = [*inputs, None, None][:10]
    if saved[2] is None or saved[3] is None or h is not None or options["over_distance"]:
        ctx.options = None
        return
    ctx.options = {"cost": options["cost"], **_penalties(options)}
    ctx.save_for_backward(*saved)


def _apply_backward(ctx, grad):
    if ctx.options is None:
        raise RuntimeError(
            "tilewise.sinkhorn_points_apply: expected both marginals, no weights h and k and no over_distance where a "
            "gradient is wanted (a second derivative of euclidean costs is not there)"
        )
    found = _apply_gradients(grad.contiguous(), *ctx.saved_tensors, **ctx.options)
    *of_problem, grad_v = found
    return *of_problem, None, None, grad_v, None, None


register.autograd("sinkhorn_points_apply", _apply_backward, _apply_setup)


def _implicit_backward(grad, x, y, a, b, epsilon, f, g, v, *, cost, rho_a, rho_b):
    """As _implicit_backward of sinkhorn with dL/dP_ij = <grad_i, v_j>, which enters the sums over the plan as the
    weights <h_i, k_j> of P_ij:  dC_ij = P_ij (u_i + w_j - <grad_i, v_j> / eps)."""
    scale = epsilon[:, None]

    def over(marginal, values, h=None, k=None, divided=False):
        return _apply(x, y, marginal, b, epsilon, f, g, values, h, k, cost=cost, over_distance=divided)

    def back(marginal, values, h=None, k=None, divided=False):
        return _apply(y, x, marginal, a, epsilon, g, f, values, h, k, cost=cost, over_distance=divided)

    ones_x, ones_y = torch.ones_like(x[:, :, :1]), torch.ones_like(y[:, :, :1])
    forward, r = over(a, torch.cat([v, ones_y], 2)).split([v.shape[2], 1], 2)
    grad_v, c = back(b, torch.cat([grad, ones_x], 2)).split([v.shape[2], 1], 2)
    of_f, of_g = ((p * q).sum(2) / scale for p, q in ((grad, forward), (v, grad_v)))
    r, c = r[:, :, 0], c[:, :, 0]
    u, w = transport.implicit(
        lambda t: over(a, t[:, :, None].contiguous())[:, :, 0],
        lambda t: back(b, t[:, :, None].contiguous())[:, :, 0],
        r, c, of_f, of_g, epsilon, rho_a, rho_b
    )  # fmt: skip
    h = torch.cat([u[:, :, None], ones_x, -grad / scale[:, :, None]], 2)
    k = torch.cat([ones_y, w[:, :, None], v], 2)
    divided = cost == "euclidean"
    sums = over(a, _with_ones(y, True), h, k, divided)
    d_x = _toward(x, y, sums, cost)
    d_y = _toward(y, x, back(b, _with_ones(x, False), k, h, divided), cost)
    # sum_j dC_ij = u r + P w - of_f, and the same over i.
    by_rows = u * r + over(a, w[:, :, None].contiguous())[:, :, 0] - of_f
    by_columns = w * c + back(b, u[:, :, None].contiguous())[:, :, 0] - of_g
    d_epsilon = ((f * by_rows).sum(1) + (g * by_columns).sum(1) - _cost_sum(x, sums)) / epsilon
    # P / a, also where a is 0
    free = over(None, torch.cat([v, w[:, :, None]], 2))
    d_a = (grad * free[:, :, :-1]).sum(2) - scale * free[:, :, -1]
    free = back(None, torch.cat([grad, u[:, :, None]], 2))
    d_b = (v * free[:, :, :-1]).sum(2) - scale * free[:, :, -1]
    return d_x, d_y, d_a, d_b, d_epsilon, grad_v.contiguous()


register.composite(
    "sinkhorn_points_apply_backward",
    _implicit_backward,
    "x b N d, y b M d, a b N, b b M, epsilon b, f b N, g b M, v b M w, grad b N w",
)
derivatives.refuse_second("sinkhorn_points_apply_backward", OP)
