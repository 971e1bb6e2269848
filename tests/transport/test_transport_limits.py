"""Transport at the ends of what it takes: numbers that are 0 or infinite in the type that computes, rows that span it,
iterations without end, tensors that a default device would catch, graphs that ask nobody."""

import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU

import tilewise
from tilewise.formulas import lbfgs
from tilewise.ops import transport
from tilewise.reference.sparse_ot import OPS as REFERENCE

MOST = torch.finfo(torch.float32).max
OPS = torch.ops.tilewise


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rows_of(name, size):
    if name == "both signs":
        return (torch.rand(6, size, dtype=torch.float64) * 2 - 1) * MOST
    if name == "magnitudes":
        return torch.randn(6, size).sign() * 10 ** (torch.rand(6, size, dtype=torch.float64) * 76 - 38)
    if name == "few numbers":
        return torch.tensor([MOST, -MOST, 0.0, MOST / 2])[torch.randint(4, (6, size))]
    return -MOST * (1 - 1e-6 * torch.rand(6, size, dtype=torch.float64))  # the least there are


@pytest.mark.parametrize("scale", [MOST, 1e35, 1.0, 1e-37])
@pytest.mark.parametrize("name", ["both signs", "magnitudes", "few numbers", "least"])
@pytest.mark.parametrize("size", [2, 20, 300])
def test_rows_that_span_the_type(size, name, scale):
    x = rows_of(name, size).float()
    for k in {1, size // 2, size - 1, size}:
        found = tilewise.simplex_topk(x.to(DEVICE), k, scale=scale).cpu().double()
        expected = REFERENCE["simplex_topk"](x.double(), k=k, scale=scale)
        # Differences of large numbers are multiples of their unit, which may be more than the scale.
        unit = torch.where(expected > 0, x.double().abs(), 0).amax(1) * torch.finfo(torch.float32).eps
        error = (found - expected).abs().amax(1)
        assert (error <= 1e-3 * scale + unit.clamp(max=1e-3 * scale)).all()


TOO = [
    ("scale", lambda value: tilewise.simplex_topk(torch.rand(4, device=DEVICE), 2, scale=value)),
    ("gamma", lambda value: tilewise.sparse_ot(torch.rand(4, 4, device=DEVICE), k=2, gamma=value)),
    ("gamma", lambda value: tilewise.sparse_ot_points(*torch.rand(2, 4, 2, device=DEVICE), k=2, gamma=value)),
    ("gamma", lambda value: tilewise.sparse_ot_router(torch.rand(4, 2, device=DEVICE), 2, gamma=value)),
    ("lr", lambda value: tilewise.sparse_ot_router(torch.rand(4, 2, device=DEVICE), 2, lr=value)),
    ("epsilon", lambda value: tilewise.sinkhorn(torch.rand(4, 4, device=DEVICE), epsilon=value)),
    ("epsilon", lambda value: tilewise.sinkhorn_points(*torch.rand(2, 4, 2, device=DEVICE), epsilon=value)),
    ("epsilon", lambda value: tilewise.sinkhorn_knopp(torch.rand(4, 4, device=DEVICE), epsilon=value)),
    ("reg_marginal", lambda value: tilewise.sinkhorn(torch.rand(4, 4), epsilon=0.1, reg_marginal=value)),
    ("reg_marginal", lambda value: tilewise.sinkhorn_divergence(*torch.rand(2, 4, 2), epsilon=0.1, reg_marginal=value)),
]


@pytest.mark.parametrize("value", [1e-300, 1e-40, 1e300])
@pytest.mark.parametrize(("name", "function"), TOO, ids=lambda x: x if isinstance(x, str) else "")
def test_numbers_that_float32_does_not_have(name, function, value):
    with pytest.raises(
        ValueError, match=rf"expected {name} to be a finite number above 0, a normal one in float32, got 1e"
    ):
        function(value)


@pytest.mark.skipif(BACKEND != "cpu", reason="of the library's bindings")
@pytest.mark.parametrize("value", [1e-300, 1e300])
def test_operators_check_numbers_in_the_type_that_computes(value):
    cost, even = torch.rand(4, 8, 8), torch.full((4, 8), 0.125)
    solve, sparse = {"max_iter": 3, "tol": 1e-3}, {"k": 2, "max_iter": 3, "tol": 1e-3}
    for name, call in (
        ("scale", lambda c, e: OPS.simplex_topk(c, k=2, scale=value)),
        ("gamma", lambda c, e: OPS.sparse_ot(c, e, e, gamma=value, method="dual", **sparse)),
        ("gamma", lambda c, e: OPS.sparse_ot_columns(c, e, e, k=2, gamma=value)),
        ("lr", lambda c, e: OPS.sparse_ot(c, e, e, gamma=1.0, method="adam", lr=value, **sparse)),
        ("rho_a", lambda c, e: OPS.sinkhorn(c, e, e, e[:, 0].contiguous(), rho_a=value, **solve)),
    ):
        with pytest.raises(RuntimeError, match=rf"expected {name} to be .* normal one in float32, got 1e"):
            call(cost, even)
        call(cost.double(), even.double())


@pytest.mark.skipif(BACKEND != "cpu", reason="a GPU's values are not read by the host")
def test_a_start_is_finite():
    cost, even = torch.rand(4, 8, 8), torch.full((4, 8), 0.125)
    epsilon, options = even[:, 0].contiguous(), {"max_iter": 3, "tol": 1e-3}
    infinite = even * torch.inf
    for name, extra in (
        ("f", (infinite, None, None)),
        ("g", (None, infinite, None)),
        ("start", (None, None, epsilon * torch.inf)),
    ):
        with pytest.raises(RuntimeError, match=f"expected {name} to hold finite numbers"):
            OPS.sinkhorn(cost, even, even, epsilon, *extra, **options)
    with pytest.raises(RuntimeError, match=r"scaling to be in \(0, 1\)"):
        OPS.sinkhorn(cost, even, even, epsilon, scaling=1 - 1e-12, **options)


def test_unrolled_iterations_have_an_end():
    cost = torch.rand(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"max_iter to be at most 10000 with gradient='unrolled'.*got 1000000000"):
        tilewise.sinkhorn(cost, epsilon=0.1, gradient="unrolled", max_iter=10**9)
    if not INTERPRETED:
        assert tilewise.sinkhorn(cost, epsilon=0.1, gradient="unrolled", max_iter=10_000).converged


@pytest.mark.skipif(BACKEND != "cpu", reason="a GPU's values are not read by the host")
@pytest.mark.parametrize("batch", [1, 5])
def test_the_unrolled_backward_checks_what_the_forward_does(batch):
    cost, a, b = torch.rand(batch, 8, 9), torch.full((batch, 8), 1 / 8), torch.full((batch, 9), 1 / 9)
    epsilon, grads = torch.full((batch,), 0.1), (torch.randn(batch, 8), torch.randn(batch, 9))
    for arguments, max_iter, message in (
        *(((cost, a, b, epsilon), count, rf"max_iter to be in \[1, 10000\], got {count}") for count in (0, -1, 2**50)),
        ((cost * torch.nan, a, b, epsilon), 3, "cost to hold numbers"),
        ((cost, -a, b, epsilon), 3, "a to hold finite numbers >= 0"),
        ((cost, a, 2 * b, epsilon), 3, "a and b to have equal sums"),
        ((cost, a, b, 0 * epsilon), 3, "epsilon to be a finite number above 0, got 0"),
    ):
        with pytest.raises(RuntimeError, match=rf"tilewise\.sinkhorn_unrolled_backward: expected {message}"):
            OPS.sinkhorn_unrolled_backward(*grads, *arguments, max_iter=max_iter)


@pytest.mark.skipif(BACKEND != "cpu", reason="of the library's bindings")
def test_points_have_features():
    empty, even, one = torch.rand(2, 5, 0), torch.full((2, 5), 0.2), torch.ones(2)
    with pytest.raises(RuntimeError, match="with points and features"):
        OPS.sinkhorn_points(empty, empty, even, even, one, cost="sqeuclidean", max_iter=3, tol=0.0)
    with pytest.raises(RuntimeError, match="with points and features"):
        OPS.sinkhorn_points_apply(empty, empty, even, even, one, even, even, even[..., None], cost="euclidean")


@pytest.mark.parametrize("n_iter", [1, 5])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_what_all_logits_have_in_common_costs_nothing(offset, n_iter):
    logits = torch.randn(64, 8) + offset
    found = tilewise.sinkhorn_knopp(logits.to(DEVICE), n_iter=n_iter, epsilon=0.05)
    scores = (logits.double() - offset) / 0.05
    for _ in range(n_iter):
        scores = torch.log_softmax(torch.log_softmax(scores, 0), 1)
    torch.testing.assert_close(found.cpu().double(), scores.exp(), rtol=1e-4, atol=1e-5)


x, y = torch.rand(2, 12, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
POINTS = {"epsilon": 0.1, "max_iter": 20}
PUBLIC = {
    "sinkhorn": lambda: tilewise.sinkhorn(x @ y.mT, **POINTS).value,
    "sinkhorn, penalised": lambda: tilewise.sinkhorn(x @ y.mT, **POINTS, reg_marginal=1.0).plan(),
    "sinkhorn, scaled epsilon": lambda: tilewise.sinkhorn(x @ y.mT, **POINTS, epsilon_scaling=0.5).apply(y),
    "sinkhorn, unrolled": lambda: tilewise.sinkhorn(x @ y.mT, **POINTS, gradient="unrolled").plan(),
    "sinkhorn_points": lambda: tilewise.sinkhorn_points(x, y, **POINTS).barycentric_map(),
    "sinkhorn_divergence": lambda: tilewise.sinkhorn_divergence(x, y, **POINTS),
    "monge_gap": lambda: tilewise.monge_gap(x, y, **POINTS),
    "sinkhorn_knopp": lambda: tilewise.sinkhorn_knopp(x, n_iter=3),
    "simplex_topk": lambda: tilewise.simplex_topk(x, 2),
    "sparse_ot": lambda: tilewise.sparse_ot(x @ y.mT, k=4, max_iter=20).plan(),
    "sparse_ot_points": lambda: tilewise.sparse_ot_points(x, y, k=4, max_iter=20).value,
    "sparse_ot_router": lambda: tilewise.sparse_ot_router(x, 6).weights,
    "SamplesLoss": lambda: tilewise.nn.SamplesLoss()(x, y),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_no_tensor_is_made_on_the_default_device(name):
    x.requires_grad_()

    def run():
        found = PUBLIC[name]()
        if not found.requires_grad:
            return (found,)
        return found, *torch.autograd.grad(found.square().sum(), x)

    expected = run()
    try:
        with torch.device("meta"):
            found = run()
    finally:
        x.requires_grad_(False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(not NATIVE_CPU, reason="what a GPU answers is pretended")
def test_while_a_graph_is_captured_nobody_asks(monkeypatch):
    """The implicit gradient and the search take all their steps, and find what they find when they ask."""
    plan = torch.rand(3, 6, 6, dtype=torch.float64) + torch.eye(6)
    of_f, of_g = torch.randn(2, 3, 6, dtype=torch.float64)
    of_g -= (of_g.sum(1) - of_f.sum(1))[:, None] / 6
    epsilon = torch.ones(3, dtype=torch.float64)
    target = torch.randn(3, 5, dtype=torch.float64)

    def both():
        products = (lambda v: (plan @ v[..., None])[..., 0], lambda v: (plan.mT @ v[..., None])[..., 0])
        solved = transport.implicit(*products, plan.sum(2), plan.sum(1), of_f, of_g, epsilon, None, None)

        def function(x):
            off = x - target
            return off.square().sum(1) / 2, off, off.abs().sum(1)

        return (*solved, *lbfgs.minimise(function, torch.zeros_like(target), max_iter=40, tol=1e-9))

    def refused(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = both()
    monkeypatch.setattr(lbfgs.Asked, "__init__", lambda self, like: setattr(self, "can", False))
    monkeypatch.setattr(torch.Tensor, "__bool__", refused)
    found = both()
    monkeypatch.undo()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
