"""Losses of transport between near sets, and with an epsilon far below the costs: against long solves in float64."""

import functools
import warnings

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED

import tilewise
from tilewise.nn import SamplesLoss

HUNDREDS = pytest.mark.skipif(
    INTERPRETED or BACKEND == "reference", reason="hundreds of iterations take minutes where each is Python"
)
FLOAT64 = pytest.mark.skipif(BACKEND != "cpu", reason="the long solve is the CPU kernels' in float64")


def near(distance, n=200, d=2):
    torch.manual_seed(0)
    x = torch.randn(n, d)
    return x, x + distance * torch.randn(n, d)


@functools.cache
def exact_loss(distance, blur=0.05, reach=None):
    """Of SamplesLoss, and its gradient: averaged iterations, thousands of them at the last epsilon, in float64."""
    epsilon = 2 * blur**2

    def solve(x, y):
        costs = ((x[:, None] - y) ** 2).sum(-1)
        f, g = costs.new_zeros(len(x)), costs.new_zeros(len(y))
        log_a, log_b = -torch.tensor(float(len(x))).log(), -torch.tensor(float(len(y))).log()
        now = float(costs.max())
        while True:
            last = now <= epsilon
            now = max(now, epsilon)
            damp = 1.0 if reach is None else 2 * reach**2 / (2 * reach**2 + now)
            for _ in range(20 if not last else 200 if x is y else 3000):
                of_f = -damp * now * torch.logsumexp((g - costs) / now + log_b, 1)
                of_g = -damp * now * torch.logsumexp((f[:, None] - costs) / now + log_a, 0)
                f, g = (f + of_f) / 2, (g + of_g) / 2
            if last:
                break
            now *= 0.5
        f = -damp * epsilon * torch.logsumexp((g - costs) / epsilon + log_b, 1)
        plan = torch.exp((f[:, None] + g - costs) / epsilon + log_a + log_b)
        if reach is None:
            value = f.mean() + g.mean() - epsilon * (plan.sum() - 1)
        else:
            rho = 2 * reach**2
            value = -rho * (torch.expm1(-f / rho).mean() + torch.expm1(-g / rho).mean()) - epsilon * (plan.sum() - 1)
        return value, plan

    x, y = (points.double() for points in near(distance))
    (value, plan), (of_x, own), (of_y, _) = solve(x, y), solve(x, x), solve(y, y)
    own = (own + own.T) / 2
    gradient = 2 * (plan.sum(1, keepdim=True) * x - plan @ y) - 2 * (own.sum(1, keepdim=True) * x - own @ x)
    return (value - (of_x + of_y) / 2) / 2, gradient / 2


@HUNDREDS
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=FLOAT64)], ids=str)
def test_sets_that_are_far_apart_for_their_blur(dtype):
    """Points at distances of hundreds with a blur of 0.05: a permutation, whose cost is exact."""
    torch.manual_seed(0)
    x = torch.randn(60, 3) * 100
    y = x + torch.randn(60, 3)
    x, y = x.to(DEVICE, dtype), y.to(DEVICE, dtype)
    exact = float(((x - y).double() ** 2).sum(1).mean() / 2)
    assert abs(exact - 1.5698) < 1e-4
    loss = SamplesLoss(return_result=True)
    same, apart = loss(x, x), loss(x, y)
    assert abs(float(same.value)) < 1e-3 and abs(float(apart.value) - exact) < 1e-3
    if dtype == torch.float64:  # potentials of 4000 in float32 are no better than a twentieth of epsilon
        assert same.converged and apart.converged


@HUNDREDS
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=FLOAT64)], ids=str)
@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 1e-2])
def test_near_sets(distance, reach, dtype):
    """The value to 1 %, the gradient's direction to a cosine of 0.99, and 0 for equal sets."""
    x, y = near(distance)
    exact, gradient = exact_loss(distance, reach=reach)
    if distance == 1e-2 and reach is None:
        assert abs(exact - 9.963e-5) < 3e-8
    x = x.to(DEVICE, dtype).requires_grad_()
    tol = 1e-3 if reach is None else 1e-4  # an error leaves more to the masses that a penalty moves
    result = SamplesLoss(reach=reach, tol=tol, return_result=True)(x, y.to(DEVICE, dtype))
    value = float(result.value.detach())
    assert result.converged and abs(value - exact) <= 1e-2 * exact + 2e-8
    found = torch.autograd.grad(result.value, x)[0].double().cpu()
    assert found.norm() < 1.02 * gradient.norm() + 1e-5
    if distance > 0:
        assert float((found * gradient).sum() / (found.norm() * gradient.norm())) > 0.99


@HUNDREDS
@pytest.mark.parametrize("epsilon_scaling", [None, 0.25])
def test_near_sets_with_an_epsilon_of_ones_own(epsilon_scaling):
    x, y = (p.to(DEVICE) for p in near(1e-2))
    exact = 2 * 9.963425e-5
    options = {"epsilon": 0.005, "epsilon_scaling": epsilon_scaling, "tol": 1e-5}
    assert abs(float(tilewise.sinkhorn_divergence(x, y, **options)) - exact) < 1e-2 * exact
    assert abs(float(tilewise.monge_gap(x, x, **options)) - 0.0275398) < 1e-6  # of a long solve in float64
    sharp = tilewise.monge_gap(x, x, **options | {"epsilon": 1e-5, "tol": 1e-3})
    assert 0 <= float(sharp) <= 2e-5 * torch.tensor(200.0).log()  # the entropy that P may have
    far = torch.randn(200, 2).to(DEVICE) * 0.7 + 0.3
    result = tilewise.sinkhorn_divergence(x, far, **options | {"tol": 1e-3}, return_result=True)
    plain = tilewise.sinkhorn_points(x, far, epsilon=0.005, tol=1e-4, max_iter=30000).value
    own = [tilewise.sinkhorn_points(p, p, epsilon=0.005, tol=1e-4, max_iter=30000).value for p in (x, far)]
    assert result.converged and abs(float(result.value - (plain - sum(own) / 2))) < 2e-4


@HUNDREDS
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=FLOAT64)], ids=str)
@pytest.mark.parametrize("blur", [1e-2, 1e-3])
@pytest.mark.parametrize("n, m", [(60, 45), (200, 150)])
def test_a_small_blur_is_exact_transport(n, m, blur, dtype):
    ot = pytest.importorskip("ot", reason="the peer is a benchmark requirement")
    torch.manual_seed(0)
    x, y = torch.randn(n, 2), torch.randn(m, 2) + 0.5
    exact = ot.emd2([], [], ((x[:, None].double() - y.double()) ** 2).sum(-1).numpy()) / 2
    result = SamplesLoss(blur=blur, return_result=True)(x.to(DEVICE, dtype), y.to(DEVICE, dtype))
    assert abs(float(result.value) - exact) < 3e-4 * exact
    assert result.converged or dtype == torch.float32


def test_what_has_not_converged_says_so(recwarn):
    def said():
        return [w for w in recwarn if "tilewise" in str(w.message)]  # the interpreter's NumPy warns of its own

    x, y = (p.to(DEVICE) for p in near(1e-2, 40))
    calls = {
        "nn.SamplesLoss": lambda **result: SamplesLoss(max_iter=3, **result)(x, y),
        "sinkhorn_divergence": lambda **result: tilewise.sinkhorn_divergence(x, y, epsilon=0.005, max_iter=3, **result),
        "monge_gap": lambda **result: tilewise.monge_gap(x, y, epsilon=0.005, max_iter=3, **result),
    }
    for op, call in calls.items():
        recwarn.clear()
        result = call(return_result=True)
        assert not said() and not result.converged and result.n_iter == 3
        assert result.marginal_error > 1e-3 and result.value.isfinite()
        value = call()
        torch.testing.assert_close(value, result.value)
        if DEVICE == "cpu":
            (warning,) = said()
            assert f"tilewise.{op}: not converged" in str(warning.message) and warning.filename == __file__
        else:
            assert not said()
    recwarn.clear()
    tilewise.sinkhorn_divergence(x, y, epsilon=1.0, tol=1e-3)
    assert not said()


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
def test_a_compiled_loss_does_not_look():
    x, y = (p.to(DEVICE) for p in near(1e-2, 40))
    loss = SamplesLoss(max_iter=3)
    compiled = torch.compile(loss, fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="tilewise")
        value = compiled(x, y)
    with pytest.warns(UserWarning, match="not converged") if DEVICE == "cpu" else warnings.catch_warnings():
        torch.testing.assert_close(loss(x, y), value)


@pytest.mark.parametrize("penalties", [{}, {"rho_a": 0.7, "rho_b": 0.7}], ids=str)
def test_two_problems_fall_each_on_its_own(penalties):
    """Of different starts and last epsilons: as each alone, and of a few iterations all that are allowed."""
    torch.manual_seed(0)
    batch, n, m = 3, 9, 12
    x, y = torch.rand(batch, n, 2).to(DEVICE), torch.rand(batch, m, 2).to(DEVICE)
    a, b = (torch.full((batch, size), 1 / size, device=DEVICE) for size in (n, m))
    epsilon, start = (torch.tensor(v, device=DEVICE) for v in ([0.05, 0.5, 0.2], [2.0, 0.1, 1.0]))
    options = {"cost": "sqeuclidean", "max_iter": 60, "tol": 1e-3, "scaling": 0.25, **penalties}
    together = torch.ops.tilewise.sinkhorn_points(x, y, a, b, epsilon, start=start, **options)
    assert (together[3] <= 1e-3).all() and together[4].unique().numel() > 1
    for i in range(batch):
        of_one = (t[i : i + 1] for t in (x, y, a, b, epsilon))
        alone = torch.ops.tilewise.sinkhorn_points(*of_one, start=start[i : i + 1], **options)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-3, atol=1e-4)
