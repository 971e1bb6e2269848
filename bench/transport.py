"""What the cases of optimal transport share: loops that a user would write, peers, and the reference in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

EPSILON, ITERATIONS = 0.05, 100
NO_STOP = {"epsilon": EPSILON, "max_iter": ITERATIONS, "tol": 0.0}


def loop(cost: Tensor, iterations: int, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """f and g between uniform weights, in the log domain."""
    *_, n, m = cost.shape
    log_n, log_m = math.log(n), math.log(m)
    scores, g = -cost / epsilon, torch.zeros_like(cost[..., 0, :])
    for _ in range(iterations):
        f = log_m - torch.logsumexp(scores + g[..., None, :], -1)
        g = log_n - torch.logsumexp(scores + f[..., :, None], -2)
    return epsilon * f, epsilon * g


def plan_of(cost: Tensor, f: Tensor, g: Tensor, epsilon: float = EPSILON) -> Tensor:
    return torch.exp((f[..., :, None] + g[..., None, :] - cost) / epsilon) / (cost.shape[-1] * cost.shape[-2])


def value_of(cost: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """<P, C> + epsilon KL(P | a b) with constant potentials: by the envelope its gradient in the costs is P."""
    plan = plan_of(cost.detach(), f, g)
    dual = f.mean(-1) + g.mean(-1) - EPSILON * (plan.sum((-2, -1)) - 1)
    return dual + ((cost - cost.detach()) * plan).sum((-2, -1))


def eager_value(cost: Tensor) -> Tensor:
    with torch.no_grad():
        f, g = loop(cost, ITERATIONS)
    return value_of(cost, f, g)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T


def reference_of(loss: Callable[..., Tensor], *tensors: Tensor, rows: int = 64):
    """Loss and some rows of the gradients in float64."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    value = loss(*wide)
    gradients = torch.autograd.grad(value, wide)
    index = [torch.linspace(0, len(t) - 1, min(len(t), rows), device=t.device).round().long() for t in tensors]
    return value.item(), [(i, g[i]) for i, g in zip(index, gradients, strict=True)]


def pot_value() -> Callable[[Tensor], Tensor]:
    """POT's log solver, its loop in PyTorch, with the gradient by the envelope as ours."""
    ot = importlib.import_module("ot")

    def loss(cost: Tensor) -> Tensor:
        even = [torch.full((size,), 1 / size, dtype=cost.dtype, device=cost.device) for size in cost.shape]
        options = {"method": "sinkhorn_log", "numItermax": ITERATIONS, "stopThr": 0.0, "warn": False}
        with torch.no_grad():
            _, log = ot.sinkhorn(*even, cost, EPSILON, **options, log=True)
            # plan = exp(log_u + log_v - C / eps), so f / eps = log_u - log a
            f, g = (EPSILON * (log[key] - w.log()) for key, w in zip(("log_u", "log_v"), even, strict=True))
        return value_of(cost, f, g)

    return loss


def _jax():
    """Functions that hand tensors to JAX and arrays back, without a copy."""
    jax = importlib.import_module("jax")
    return jax, lambda t: jax.dlpack.from_dlpack(t.detach().contiguous()), torch.from_dlpack


def ott_value(geometry_of: Callable, gradients_of: Callable) -> Callable[..., Tensor]:
    """OTT-JAX, compiled, 100 iterations; `gradients_of(geometry, f, g, *inputs)` are those of the envelope."""
    jax, to_jax, to_torch = _jax()
    linear = importlib.import_module("ott.problems.linear.linear_problem")
    sinkhorn = importlib.import_module("ott.solvers.linear.sinkhorn")
    solver = sinkhorn.Sinkhorn(
        threshold=0.0, min_iterations=ITERATIONS, max_iterations=ITERATIONS, inner_iterations=ITERATIONS
    )

    @jax.jit
    def solve(*inputs):
        out = solver(linear.LinearProblem(geometry_of(*inputs)))
        return out.reg_ot_cost, out.f, out.g

    backward = jax.jit(gradients_of)

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.inputs = [to_jax(t) for t in inputs]
            value, *ctx.potentials = solve(*ctx.inputs)
            return to_torch(value.block_until_ready()).clone()

        @staticmethod
        def backward(ctx, grad):
            found = backward(*ctx.potentials, *ctx.inputs)
            return tuple(grad * to_torch(g.block_until_ready()) for g in found)

    return Solve.apply


def ott_of_matrix() -> Callable[[Tensor], Tensor]:
    geometry = importlib.import_module("ott.geometry.geometry")
    numpy = importlib.import_module("jax.numpy")

    def gradients(f, g, cost):
        return (numpy.exp((f[:, None] + g - cost) / EPSILON),)

    return ott_value(lambda cost: geometry.Geometry(cost_matrix=cost, epsilon=EPSILON), gradients)


def ott_of_points() -> Callable[[Tensor, Tensor], Tensor]:
    pointcloud = importlib.import_module("ott.geometry.pointcloud")
    numpy = importlib.import_module("jax.numpy")

    def gradients(f, g, x, y):
        cost = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
        plan = numpy.exp((f[:, None] + g - cost) / EPSILON)
        return 2 * (plan.sum(1)[:, None] * x - plan @ y), 2 * (plan.sum(0)[:, None] * y - plan.T @ x)

    return ott_value(lambda x, y: pointcloud.PointCloud(x, y, epsilon=EPSILON), gradients)


def geomloss_value() -> Callable[[Tensor, Tensor], Tensor]:
    """geomloss on as many values of epsilon as there are iterations elsewhere: it updates both sides at once."""
    samples_loss = importlib.import_module("geomloss").SamplesLoss
    blur, diameter = (EPSILON / 2) ** 0.5, 2.0
    scaling = (blur / diameter) ** (1 / (ITERATIONS - 2))
    loss = samples_loss("sinkhorn", p=2, blur=blur, diameter=diameter, scaling=scaling, debias=False)
    return lambda x, y: 2 * loss(x, y)
