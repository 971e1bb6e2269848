"""sinkhorn_points, sinkhorn_divergence and monge_gap: against matrices of costs, and what points alone have."""

import contract
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU
from torch import Tensor

import tilewise
from tilewise.reference.sinkhorn import OPS as REFERENCE
from tilewise.reference.sinkhorn import costs_of_points
from tilewise.testing import allocated_bytes

WIDE = torch.float64 if NATIVE_CPU else torch.float32
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11} if NATIVE_CPU else {"rtol": 5e-4, "atol": 5e-5}
COSTS = ("sqeuclidean", "euclidean")
SIZES = {  # B, n, m, d
    "small": (5, 7, 9, 3),
    "one": (1, 1, 1, 1),
    "flat": (2, 70, 90, 2),
    "wide": (1, 70, 66, 40),
}


def problem(name, dtype=WIDE, same=False):
    """x, y, a, b, epsilon."""
    batch, n, m, d = SIZES[name]
    torch.manual_seed(0)
    n, m, d = (min(size, 66) if INTERPRETED else size for size in (n, m, d))  # two tiles
    m = n if same else m
    x, y = (torch.rand(batch, size, d) - 0.5 for size in (n, m))
    a, b = (torch.rand(batch, size).to(dtype) + 0.1 for size in (n, m))
    a, b = (w / w.sum(1, keepdim=True) for w in (a, b))
    if same:
        y, b = x, a
    return [t.to(DEVICE, dtype) for t in (x, y, a, b, 0.1 * 2 ** (torch.arange(batch) % 3))]


def wide(value):
    return value.detach().cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("penalties", [{}, {"rho_a": 0.7, "rho_b": 0.7}, {"rho_b": 0.3}], ids=str)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", SIZES)
def test_against_the_reference(name, cost, penalties, symmetric):
    if symmetric and len(set(penalties.values())) != 1 and penalties:
        pytest.skip("a symmetric problem has one penalty")
    arguments = problem(name, same=symmetric)
    extra = [None, None, torch.full_like(arguments[-1], 2.0)] if name == "flat" else [None] * 3
    count = 4 if INTERPRETED and name != "small" else 12
    options = {"cost": cost, "max_iter": count, "tol": 1e-3, "scaling": 0.6, "symmetric": symmetric}
    options |= {"rho_a": None, "rho_b": None} | penalties
    found = torch.ops.tilewise.sinkhorn_points(*arguments, *extra, **options)
    expected = REFERENCE["sinkhorn_points"](*map(wide, (*arguments, *extra)), **options)
    for what, value, truth in zip(("f", "g", "value", "error"), found, expected, strict=False):
        torch.testing.assert_close(wide(value), truth, **TOLERANCE, msg=lambda m, of=what: f"{of}: {m}")
    assert (found[4].cpu() - expected[4]).abs().max() <= (0 if NATIVE_CPU else 1)


def test_allow_tf32():
    """A GPU's costs come from coordinates rounded to 10 bits; others ignore it."""
    x, y, a, b, epsilon = problem("wide", torch.float32)
    options = {"max_iter": 4, "tol": 1e-6}
    exact, found = (
        tilewise.sinkhorn_points(x, y, a, b, epsilon=epsilon, allow_tf32=allowed, **options)
        for allowed in (False, True)
    )
    if DEVICE == "cpu" and not INTERPRETED:
        assert torch.equal(found.f, exact.f) and torch.equal(found.g, exact.g)
        return
    x, y = wide(x), wide(y)
    centre = (x.mean(1, keepdim=True) + y.mean(1, keepdim=True)) / 2
    x, y = (p - centre for p in (x, y))
    squares = (x * x).sum(2)[:, :, None] + (y * y).sum(2)[:, None]
    costs = squares - 2 * to_tf32(x) @ to_tf32(y).mT
    f, g, value, *_ = REFERENCE["sinkhorn"](costs, *map(wide, (a, b, epsilon)), **options)
    for what, truth in ((found.f, f), (found.g, g), (found.value, value)):
        torch.testing.assert_close(wide(what), truth, rtol=5e-5, atol=5e-5)
    assert (found.f - exact.f).abs().max() > 2e-4


def to_tf32(x):
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa.abs() * 2**11 + 0.5).floor().copysign(x), exponent - 11)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", SIZES)
def test_products(name, cost, weighted):
    """P v, and with weights <h, k> and without a marginal: what gradients sum."""
    x, y, a, b, epsilon = problem(name)
    f, g, *_ = torch.ops.tilewise.sinkhorn_points(x, y, a, b, epsilon, cost=cost, max_iter=3, tol=0.0)
    for values in (1, 20):
        v = torch.randn(*b.shape, values).to(x)
        weights = [torch.randn(*w.shape, 5).to(x) for w in (a, b)] if weighted else [None, None]
        options = {"cost": cost, "over_distance": weighted and cost == "euclidean"}
        arguments = (x, y, None if weighted else a, b, epsilon, f, g, v, *weights)
        found = torch.ops.tilewise.sinkhorn_points_apply(*arguments, **options)
        expected = REFERENCE["sinkhorn_points_apply"](*map(wide, arguments), **options)
        scale = expected.abs().max()
        torch.testing.assert_close(wide(found) / scale, expected / scale, **TOLERANCE)


@pytest.mark.parametrize("cost", (*COSTS, "cosine"))
@pytest.mark.parametrize("name", ["small"] if INTERPRETED else ["small", "flat"])
def test_as_the_matrix_of_costs(name, cost):
    x, y, a, b, _ = problem(name)
    if cost == "cosine":
        matrix = 1 - torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    else:
        matrix = costs_of_points(x, y, cost)
    options = {"epsilon": 0.2, "tol": 1e-4, "max_iter": 100}
    of_points = tilewise.sinkhorn_points(x, y, a, b, cost=cost, **options)
    of_matrix = tilewise.sinkhorn(matrix, a, b, **options)
    assert of_points.converged.all()
    torch.testing.assert_close(of_points.value, of_matrix.value, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(of_points.plan(), of_matrix.plan(), rtol=2e-3, atol=1e-6)
    plan = of_points.plan()
    torch.testing.assert_close(of_points.apply(y), plan @ y, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(of_points.transpose_apply(x), plan.mT @ x, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        of_points.barycentric_map(), (plan @ y) / plan.sum(2, keepdim=True), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("cost", COSTS)
def test_an_offset_costs_no_accuracy(cost):
    """Points around (1000, 1000, 1000) in float32: as around 0, but for what their own rounding moves."""
    x, y, a, b, _ = problem("small" if INTERPRETED else "flat", torch.float32)
    x, y = (torch.round(p * 1024) / 1024 for p in (x, y))  # both are exact
    options = {"cost": cost, "epsilon": 0.05, "tol": 1e-5, "max_iter": 50}
    near, far = (tilewise.sinkhorn_points(x + c, y + c, a, b, **options) for c in (0.0, 1024.0))
    torch.testing.assert_close(far.value, near.value, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(far.plan(), near.plan(), rtol=2e-3, atol=1e-6)


OF_RESULT = {
    "value": lambda result, x, y: result.value,
    "apply": lambda result, x, y: result.apply(torch.linspace(-1, 1, 18).double().reshape(9, 2).expand(2, 9, 2)),
    "transpose_apply": lambda result, x, y: result.transpose_apply(torch.linspace(-1, 1, 7).double().expand(2, 7)),
    "barycentric_map": lambda result, x, y: result.barycentric_map(y),
    "plan": lambda result, x, y: result.plan(),
}
ONCE = pytest.mark.skipif(BACKEND != "cpu", reason="derivatives are formed by the same code on every backend")


def inputs_of_gradients():
    x, y, a, b, epsilon = (t[:2] for t in problem("small", torch.float64))
    zeros = [torch.zeros_like(w, requires_grad=True) for w in (a, b)]
    return a, b, (x.requires_grad_(), y.requires_grad_(), *zeros, (2 * epsilon).requires_grad_())


def solved(a, b, x, y, of_a, of_b, epsilon, **options):
    of_a, of_b = (d - d.mean(1, keepdim=True) for d in (of_a, of_b))
    return tilewise.sinkhorn_points(x, y, a + of_a, b + of_b, epsilon=epsilon, tol=1e-14, max_iter=20000, **options)


@ONCE
@pytest.mark.parametrize("reg_marginal", [None, 0.7, (0.5, None)], ids=str)
@pytest.mark.parametrize("cost", (*COSTS, "cosine"))
@pytest.mark.parametrize("of", OF_RESULT)
def test_gradcheck(of, cost, reg_marginal):
    a, b, inputs = inputs_of_gradients()

    def function(x, y, of_a, of_b, epsilon):
        result = solved(a, b, x, y, of_a, of_b, epsilon, cost=cost, reg_marginal=reg_marginal)
        return OF_RESULT[of](result, x, y)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-6)


@ONCE
@pytest.mark.parametrize("cost", COSTS)
def test_unbalanced_gradient_of_masses(cost):
    """With penalties marginals may have any sums, which epsilon's derivative sees too."""
    a, b, (x, y, *_, epsilon) = inputs_of_gradients()
    a, b = (factor * w for factor, w in ((0.8, a), (1.5, b)))

    def value(x, a, b, epsilon):
        options = {"epsilon": epsilon, "cost": cost, "reg_marginal": (0.5, 0.8), "tol": 1e-14, "max_iter": 20000}
        return tilewise.sinkhorn_points(x, y.detach(), a, b, **options).value

    assert torch.autograd.gradcheck(value, (x, a.requires_grad_(), b.requires_grad_(), epsilon))


@ONCE
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_double_backward_of_the_value(cost):
    """In the points; the second derivative of what the envelope leaves constant is a clear error."""
    a, b, (x, y, *_, epsilon) = inputs_of_gradients()

    def value(x, y):
        options = {"epsilon": epsilon.detach(), "cost": cost, "tol": 1e-14, "max_iter": 20000}
        return tilewise.sinkhorn_points(x, y, a, b, **options).value

    assert torch.autograd.gradgradcheck(value, (x, y), fast_mode=True, atol=1e-5)
    total = tilewise.sinkhorn_points(x, y, a, b, epsilon=epsilon).value.sum()
    (gradient,) = torch.autograd.grad(total, epsilon, create_graph=True)
    with pytest.raises(RuntimeError, match="no second differentiation in marginals or epsilon of points"):
        gradient.sum().backward()
    total = tilewise.sinkhorn_points(x, y, a, b, epsilon=epsilon, cost="euclidean").value.sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative of euclidean costs is not there"):
        gradient.sum().backward()


@ONCE
def test_gradient_of_the_divergence():
    a, b, (x, y, of_a, of_b, epsilon) = inputs_of_gradients()

    def divergence(x, y, of_a, of_b, epsilon):
        of_a, of_b = (d - d.mean(1, keepdim=True) for d in (of_a, of_b))
        options = {"epsilon": epsilon, "tol": 1e-14, "max_iter": 20000}
        return tilewise.sinkhorn_divergence(x, y, a + of_a, b + of_b, **options)

    assert torch.autograd.gradcheck(divergence, (x, y, of_a, of_b, epsilon), fast_mode=True, atol=1e-6)

    def unbalanced(x, y, of_a, of_b, epsilon):
        options = {"epsilon": epsilon, "tol": 1e-14, "max_iter": 20000, "reg_marginal": 0.5}
        return tilewise.sinkhorn_divergence(x, y, a + of_a, b + of_b, **options)

    assert torch.autograd.gradcheck(unbalanced, (x, y, of_a, of_b, epsilon), fast_mode=True, atol=1e-6)


@ONCE
@pytest.mark.parametrize("cost", (*COSTS, "cosine"))
def test_gradient_of_the_monge_gap(cost):
    _, _, (x, *_, epsilon) = inputs_of_gradients()
    moved = (x.detach() + torch.randn_like(x)).requires_grad_()

    def gap(x, tx, epsilon):
        return tilewise.monge_gap(x, tx, epsilon=epsilon, cost=cost, tol=1e-14, max_iter=20000)

    assert torch.autograd.gradcheck(gap, (x, moved, epsilon), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("cost", (*COSTS, "cosine"))
def test_divergence(cost):
    x, y, a, b, _ = problem("small")
    options = {"epsilon": 0.2, "cost": cost, "tol": 1e-4 if INTERPRETED else 1e-5, "max_iter": 200}
    apart = tilewise.sinkhorn_divergence(x, y, a, b, **options)
    assert (apart > 0).all()
    torch.testing.assert_close(tilewise.sinkhorn_divergence(y, x, b, a, **options), apart, rtol=1e-3, atol=1e-5)
    itself = tilewise.sinkhorn_divergence(x, x, a, a, **options)
    torch.testing.assert_close(itself, torch.zeros_like(itself), rtol=0, atol=1e-5)
    of_values = [tilewise.sinkhorn_points(*p, **options).value for p in ((x, y, a, b), (x, x, a, a), (y, y, b, b))]
    torch.testing.assert_close(apart, of_values[0] - (of_values[1] + of_values[2]) / 2, rtol=1e-3, atol=1e-5)
    masses = tilewise.sinkhorn_divergence(x, y, a, 1.5 * b, **options, reg_marginal=0.5)
    assert (masses > 0).all()
    with pytest.raises(ValueError, match="reg_marginal to be one number for both"):
        tilewise.sinkhorn_divergence(x, y, a, b, **options, reg_marginal=(0.5, 0.6))


@pytest.mark.parametrize("cost", (*COSTS, "cosine"))
def test_monge_gap(cost):
    """Never below 0, 0 for a translation under squared distances as epsilon falls, larger for a shuffle."""
    torch.manual_seed(0)
    x = torch.rand(2, 60, 2).to(DEVICE, WIDE)
    options = {"epsilon": 0.01, "cost": cost, "tol": 1e-3, "max_iter": 30 if INTERPRETED else 300}
    moved = tilewise.monge_gap(x, x + 0.3, **options)
    shuffled = tilewise.monge_gap(x, x.flip(1) + 0.3, **options)
    assert (moved > -1e-3).all() and (shuffled > moved).all() and moved.shape == (2,)
    if cost == "sqeuclidean":
        assert (moved < 0.08).all() and (shuffled > 0.1).all()
        if INTERPRETED:
            return  # it has not converged, and the entropy is that of the converged plan
        result = tilewise.sinkhorn_points(x, x + 0.3, **options)
        plan = result.plan()
        entropy = -torch.xlogy(plan, plan).sum((1, 2))
        expected = 2 * 0.3**2 - (plan * costs_of_points(x, x + 0.3, cost)).sum((1, 2)) + 0.01 * entropy
        torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match=r"tx to have shape \(2, 60, 2\) like x, got \(2, 59, 2\)"):
        tilewise.monge_gap(x, x[:, 1:], epsilon=0.1)


@pytest.mark.parametrize("dtype", contract.DTYPES[1:], ids=str)
def test_narrow_points_are_computed_in_float32(dtype):
    x, y, a, b, _ = problem("small", torch.float32)
    x, y = (p.to(dtype).requires_grad_() for p in (x, y))
    value = tilewise.sinkhorn_points(x, y, a, b, epsilon=0.2).value
    exact = tilewise.sinkhorn_points(x.float(), y.float(), a, b, epsilon=0.2).value
    assert value.dtype == torch.float32 and torch.equal(value, exact)
    assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(value.sum(), (x, y)))


def test_coincident_points_have_a_gradient():
    """The distance has none where it is 0; its subgradient 0 is taken."""
    x, *_ = problem("small")
    x.requires_grad_()
    value = tilewise.sinkhorn_points(x, x.detach(), epsilon=0.2, cost="euclidean", max_iter=20).value
    assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


@pytest.mark.skipif(BACKEND == "reference", reason="the reference holds matrices")
def test_memory():
    """O((n + m) d), forward and back; on a CPU problems of up to 32 MiB of costs keep one matrix more."""
    n, m, d = (130, 150, 3) if INTERPRETED else (3000, 3100, 5)
    torch.manual_seed(0)
    x, y = (torch.randn(1, size, d, device=DEVICE, requires_grad=True) for size in (n, m))
    sizes = 4 * (n + m) * (6 * d + 40) + (65536 if DEVICE == "cuda" else 0)
    result = tilewise.sinkhorn_points(x, y, epsilon=1.0, max_iter=1)
    used = allocated_bytes(lambda: tilewise.sinkhorn_points(x, y, epsilon=1.0, max_iter=1), DEVICE)
    assert used <= sizes
    used = allocated_bytes(lambda: torch.autograd.grad(result.value.sum(), (x, y), retain_graph=True), DEVICE)
    assert used <= sizes
    moved = result.barycentric_map().sum()
    assert allocated_bytes(lambda: torch.autograd.grad(moved, (x, y)), DEVICE) <= 4 * sizes


@pytest.mark.skipif(BACKEND != "cpu", reason="the CPU kernels keep a matrix where it is small")
def test_memory_of_a_small_problem():
    x, y = torch.randn(1, 700, 3), torch.randn(1, 800, 3)
    used = allocated_bytes(lambda: tilewise.sinkhorn_points(x, y, epsilon=1.0, max_iter=1))
    assert 4 * 700 * 800 < used <= 4 * (700 * 800 + 60 * 1500)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
def test_compile_and_opcheck():
    def step(x, y):
        result = tilewise.sinkhorn_points(x, y, epsilon=0.3, max_iter=20)
        return result.value.sum() + result.barycentric_map().square().sum() + tilewise.sinkhorn_divergence(
            x, y, epsilon=0.3, max_iter=20
        ).sum()  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    x, y = (torch.rand(2, size, 3, device=DEVICE, requires_grad=True) for size in (7, 70))
    values = [f(x, y) for f in (compiled, step)]
    torch.testing.assert_close(*values)
    for mine, theirs in zip(*(torch.autograd.grad(v, (x, y)) for v in values), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    arguments = [t.requires_grad_() for t in problem("small")]
    options = {"cost": "sqeuclidean", "max_iter": 5, "tol": 0.0}
    torch.library.opcheck(torch.ops.tilewise.sinkhorn_points, tuple(arguments), options)
    f, g, v = (torch.zeros_like(t).detach() for t in (*arguments[2:4], arguments[1]))
    torch.library.opcheck(torch.ops.tilewise.sinkhorn_points_apply, (*arguments, f, g, v), {"cost": "sqeuclidean"})


X = torch.rand(6, 3)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X[0], X), {}, ValueError, r"x to have shape \(..., n, d\), got \(3,\)"),
        ((X, X[:, :2]), {}, ValueError, r"y to have shape \('m', 3\) like x, got \(6, 2\)"),
        ((X[None], X), {}, ValueError, r"y to have shape \(1, 'm', 3\) like x, got \(6, 3\)"),
        ((X, X.double()), {}, TypeError, "y to be torch.float32 like x, got torch.float64"),
        ((X.long(), X), {}, TypeError, ".*x to be float"),
        ((X, X), {"cost": "manhattan"}, ValueError, "cost to be .*'sqeuclidean'.*, got 'manhattan'"),
        ((X, X), {"epsilon": -1.0}, ValueError, "epsilon to be a finite number"),
        ((X, X), {"epsilon_scaling": 0.0}, ValueError, r"epsilon_scaling to be None or a number in \(0, 1\), got 0.0"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=rf"^tilewise\.sinkhorn_points: expected {message}"):
        tilewise.sinkhorn_points(*arguments, **{"epsilon": 0.1} | options)


@pytest.mark.skipif(BACKEND != "cpu", reason="a GPU's values are not read by the host")
def test_bad_values():
    x = X.clone()
    x[2, 1] = torch.nan
    with pytest.raises(RuntimeError, match=r"tilewise\.sinkhorn_points: expected [xy] to hold finite numbers"):
        tilewise.sinkhorn_points(x, X, epsilon=0.1)
