"""Gradients of sinkhorn: of the value by the envelope, of the plan through the solution, through the iterations."""

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import BACKEND
from sinkhorn_problems import problem
from torch import Tensor

import tilewise
from tilewise.ops import transport


def tangent(weights: Tensor, direction: Tensor) -> Tensor:
    """A positive marginal that moves without changing its sum: what balanced derivatives are defined along."""
    return weights + (direction - direction.mean(-1, keepdim=True))


def float64_problem(name="small", forbid=False):
    cost, a, b, epsilon = problem(name, torch.float64, zeros=False)
    if forbid:
        cost[:, 1, 2] = torch.inf
    return cost[:2], a[:2], b[:2], 2 * epsilon[:2]


def inputs_of_gradients(forbid=False):
    cost, a, b, epsilon = float64_problem(forbid=forbid)
    zero_a, zero_b = (torch.zeros_like(w, requires_grad=True) for w in (a, b))
    return a, b, (cost.requires_grad_(), zero_a, zero_b, epsilon.requires_grad_())


OF_RESULT = {
    "value": lambda result: result.value,
    "plan": lambda result: result.plan(),
    "apply": lambda result: result.apply(torch.linspace(-1, 1, 9).double().expand(2, 9)),
    "transpose_apply": lambda result: result.transpose_apply(torch.linspace(-1, 1, 7).double().expand(2, 7)),
}
REG_MARGINAL = [None, 0.7, (0.5, None), (None, 0.5), (0.5, 0.8)]


@pytest.mark.skipif(BACKEND != "cpu", reason="derivatives are formed by the same code on every backend")
@pytest.mark.parametrize("reg_marginal", REG_MARGINAL, ids=str)
@pytest.mark.parametrize("of", OF_RESULT)
def test_gradcheck(of, reg_marginal):
    """In costs, marginals and epsilon, through the envelope and through the solution."""
    a, b, inputs = inputs_of_gradients()

    def function(cost, of_a, of_b, epsilon):
        a_moved, b_moved = tangent(a, of_a), tangent(b, of_b)
        result = tilewise.sinkhorn(
            cost, a_moved, b_moved, epsilon=epsilon, tol=1e-14, max_iter=20000, reg_marginal=reg_marginal
        )
        return OF_RESULT[of](result)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=of == "plan", atol=1e-6)


@pytest.mark.skipif(BACKEND != "cpu", reason="derivatives are formed by the same code on every backend")
@pytest.mark.parametrize("reg_marginal", [None, 0.7, (0.5, None)], ids=str)
def test_double_backward_of_the_value(reg_marginal):
    a, b, inputs = inputs_of_gradients()

    def function(cost, of_a, of_b, epsilon):
        options = {"tol": 1e-14, "max_iter": 20000, "reg_marginal": reg_marginal}
        return tilewise.sinkhorn(cost, tangent(a, of_a), tangent(b, of_b), epsilon=epsilon, **options).value

    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-5, fast_mode=True)


@pytest.mark.skipif(BACKEND != "cpu", reason="derivatives are formed by the same code on every backend")
def test_unbalanced_gradient_of_masses():
    """With penalties marginals may change their sums too."""
    cost, a, b, epsilon = float64_problem()

    def function(a, b):
        options = {"reg_marginal": (0.5, 0.8), "tol": 1e-14, "max_iter": 20000}
        return tilewise.sinkhorn(cost, a, b, epsilon=epsilon, **options).value

    assert torch.autograd.gradcheck(function, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.skipif(BACKEND != "cpu", reason="derivatives are formed by the same code on every backend")
@pytest.mark.parametrize("reg_marginal", [None, 0.7], ids=str)
def test_implicit_gradient_is_that_of_long_unrolling(reg_marginal):
    for_implicit, for_unrolled = ([t.clone().requires_grad_() for t in float64_problem()] for _ in range(2))
    gradients = []
    for (cost, a, b, epsilon), gradient in ((for_implicit, "implicit"), (for_unrolled, "unrolled")):
        options = {"max_iter": 20000, "tol": 1e-14} if gradient == "implicit" else {"max_iter": 3000}
        result = tilewise.sinkhorn(cost, a, b, epsilon=epsilon, reg_marginal=reg_marginal, gradient=gradient, **options)
        weights = torch.linspace(-1, 1, 63).double().reshape(7, 9)
        found = torch.autograd.grad((result.plan() * weights).sum(), (cost, a, b, epsilon))
        if reg_marginal is None:  # known along changes that keep the sums
            found = [d - d.mean(1, keepdim=True) if d.dim() == 2 else d for d in found]
        gradients.append(found)
    for implicit, unrolled in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(BACKEND != "cpu", reason="derivatives are formed by the same code on every backend")
@pytest.mark.parametrize("of", OF_RESULT)
def test_unrolled_gradcheck(of):
    a, b, inputs = inputs_of_gradients(forbid=False)

    def function(cost, of_a, of_b, epsilon):
        result = tilewise.sinkhorn(cost, a + of_a, b + of_b, epsilon=epsilon, max_iter=4, gradient="unrolled")
        return OF_RESULT[of](result)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=of == "plan")


@pytest.mark.skipif(BACKEND != "cpu", reason="derivatives are formed by the same code on every backend")
@pytest.mark.filterwarnings("error")
def test_the_null_space_is_projected_out():
    """A balanced system has solutions for right sides without constants alone; rounding brings some in."""
    plan = torch.rand(3, 5, 6, dtype=torch.float64)
    r, c = plan.sum(2), plan.sum(1)
    of_f, of_g = torch.randn_like(r), torch.randn_like(c)
    u, v = transport.implicit(
        lambda t: (plan @ t[:, :, None])[:, :, 0], lambda t: (plan.mT @ t[:, :, None])[:, :, 0],
        r, c, of_f, of_g, torch.ones(3).double(), None, None
    )  # fmt: skip
    torch.testing.assert_close(r * u + (plan @ v[:, :, None])[:, :, 0], of_f)
    excess = (of_g.sum(1) - of_f.sum(1)) / c.sum(1)
    torch.testing.assert_close((plan.mT @ u[:, :, None])[:, :, 0] + c * v, of_g - excess[:, None] * c)


def test_zero_marginals_have_gradients():
    """P / a is finite where a is 0: a point that is about to appear."""
    cost, a, b, epsilon = problem("small")
    assert (a == 0).any()
    a, b = a.requires_grad_(), b.requires_grad_()
    result = tilewise.sinkhorn(cost, a, b, epsilon=epsilon, tol=1e-5)
    value = torch.autograd.grad(result.value.sum(), (a, b), retain_graph=True)
    moved = torch.autograd.grad(result.plan().square().sum(), (a, b))
    assert all(g.isfinite().all() for g in (*value, *moved))
    torch.testing.assert_close(value[0].mean(1), torch.zeros_like(value[0][:, 0]), rtol=0, atol=1e-6)
