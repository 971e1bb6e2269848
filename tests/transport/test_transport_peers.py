"""Against POT and geomloss in float64."""

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import BACKEND

import tilewise

ot = pytest.importorskip("ot", reason="the peer is a benchmark requirement")
geomloss = pytest.importorskip("geomloss", reason="the peer is a benchmark requirement")

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="float64 belongs to the CPU kernels")


def problem(n=40, m=50):
    torch.manual_seed(0)
    cost = torch.rand(n, m, dtype=torch.float64)
    a, b = (torch.rand(size, dtype=torch.float64) + 0.1 for size in (n, m))
    return cost, a / a.sum(), b / b.sum()


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01, 0.003])
def test_plan_of_pot(epsilon):
    cost, a, b = problem(25, 30)
    options = {"stopThr": 1e-10, "numItermax": 100000, "method": "sinkhorn_log"}
    expected = torch.from_numpy(ot.sinkhorn(a.numpy(), b.numpy(), cost.numpy(), epsilon, **options))
    result = tilewise.sinkhorn(cost, a, b, epsilon=epsilon, tol=1e-11, max_iter=100000)
    assert result.converged
    torch.testing.assert_close(result.plan(), expected, rtol=0, atol=1e-6 * float(expected.max()))
    batch = tilewise.sinkhorn(cost.expand(4, -1, -1), a, b, epsilon=epsilon, tol=1e-11, max_iter=100000)
    torch.testing.assert_close(batch.plan()[2], expected, rtol=0, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.03])
@pytest.mark.parametrize("rho", [0.1, 1.0, (0.5, 2.0)], ids=str)
def test_unbalanced_plan_of_pot(rho, epsilon):
    cost, a, b = problem()
    b = 1.5 * b
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), cost.numpy(), epsilon, rho, reg_type="kl", stopThr=1e-13, numItermax=100000
    )
    result = tilewise.sinkhorn(cost, a, b, epsilon=epsilon, reg_marginal=rho, tol=1e-13, max_iter=100000)
    torch.testing.assert_close(result.plan(), torch.from_numpy(expected), rtol=1e-6, atol=1e-10)


def clouds(batch=()):
    torch.manual_seed(0)
    x, y = (torch.rand(*batch, size, 3, dtype=torch.float64).requires_grad_() for size in (30, 40))
    a, b = (torch.rand(*batch, size, dtype=torch.float64) + 0.1 for size in (30, 40))
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return x, y + 0.2, a, b


@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("blur", [0.1, 0.3])
def test_divergence_of_geomloss(blur, reach):
    """Twice the loss of geomloss, whose squared distances are halved; its annealing ends near convergence."""
    x, y, a, b = clouds()
    if reach is not None:
        b = 1.5 * b
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, reach=reach, scaling=0.999, backend="tensorized")
    expected = 2 * theirs(a, x, b, y)
    rho = None if reach is None else 2 * reach**2
    ours = tilewise.sinkhorn_divergence(x, y, a, b, epsilon=2 * blur**2, tol=1e-12, reg_marginal=rho, max_iter=10000)
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("p, blur", [(2, 0.1), (1, 0.1)])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_samples_loss(batch, p, blur, reach, debias):
    """The same arguments, values and gradients as geomloss, for one set and for batches, with weights and without.

    With a reach geomloss's gradient is that of its loss times (rho + eps / 2) / (rho + eps): its UnbalancedWeight means
    to mend this in a `backward` that a Module never calls.
    """
    x, y, a, b = clouds(batch)
    options = {"p": p, "blur": blur, "reach": reach, "debias": debias}
    theirs = geomloss.SamplesLoss("sinkhorn", **options, scaling=0.999, backend="tensorized")
    ours = tilewise.nn.SamplesLoss("sinkhorn", **options, tol=1e-10, max_iter=10000)
    for arguments in ((x, y), (a, x, b, y), (a[..., None], x, b[..., None], y)):
        found, expected = (loss(*arguments) for loss in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-5)
        gradients = [torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (found, expected)]
        if reach is not None:
            gradients[1] *= (reach**p + blur**p) / (reach**p + blur**p / 2)
        scale = gradients[1].abs().max()
        torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, rtol=0, atol=1e-2)
    potentials = [
        kind("sinkhorn", **options, potentials=True, scaling=0.99)(a, x, b, y)
        for kind in (tilewise.nn.SamplesLoss, geomloss.SamplesLoss)
    ]  # geomloss's of one set are (1, N)
    for found, expected in zip(*potentials, strict=True):
        if reach is None:  # up to a constant
            found, expected = (w - w.mean(-1, keepdim=True) for w in (found, expected))
        scale = expected.detach().abs().max()
        torch.testing.assert_close(found / scale, expected.view_as(found) / scale, rtol=0, atol=0.03)


def test_samples_loss_does_not_depend_on_the_schedule():
    x, y, *_ = clouds()
    values = [
        tilewise.nn.SamplesLoss(blur=0.05, scaling=scaling, diameter=diameter, tol=1e-9)(x, y)
        for scaling, diameter in ((0.5, None), (0.9, 2.0), (0.3, 10.0))
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=1e-9)


def test_bad_samples_loss():
    cases = [
        ({"loss": "energy"}, "loss to be 'sinkhorn', got 'energy'"),
        ({"p": 3}, "p to be 1 or 2, got 3"),
        ({"blur": 0.0}, "blur to be a finite number"),
        ({"cost": lambda x, y: x @ y.mT}, "no cost and no kernel"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=rf"tilewise\.nn\.SamplesLoss: expected {message}"):
            tilewise.nn.SamplesLoss(**options)
    with pytest.raises(ValueError, match=r"expected \(x, y\) or \(a, x, b, y\), got 3 arguments"):
        tilewise.nn.SamplesLoss()(*clouds()[:3])


@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_sparse_transport_of_pot(gamma, capsys):
    """All entries are quadratic transport, and few of them the same plan."""
    cost, a, b = problem(40, 50)
    arrays = [t.numpy() for t in (a, b, cost)]
    all_entries = tilewise.sparse_ot(cost, a, b, k=40, gamma=gamma, tol=1e-10, max_iter=5000)
    options = {"stopThr": 1e-16, "numItermax": 50000}
    expected = torch.from_numpy(ot.smooth.smooth_ot_semi_dual(*arrays, gamma, reg_type="l2", **options))
    torch.testing.assert_close(all_entries.plan(), expected, rtol=0, atol=1e-6)
    value = (expected * cost).sum() + gamma / 2 * (expected**2).sum()
    assert abs(value - all_entries.value) < 1e-8

    few = tilewise.sparse_ot(cost, a, b, k=12, gamma=gamma, tol=1e-10, max_iter=5000)
    sparse = ot.smooth.smooth_ot_semi_dual(*arrays, gamma, reg_type="sparsity_constrained", max_nz=12, **options)
    expected = torch.from_numpy(sparse)
    capsys.readouterr()  # POT prints
    assert few.converged
    torch.testing.assert_close(few.plan(), expected, rtol=0, atol=1e-4)
