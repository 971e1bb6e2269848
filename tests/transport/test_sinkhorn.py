"""sinkhorn against the reference in float64, and what is its own: stopping, safety, gradients through the solution."""

import contract
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU
from sinkhorn_problems import OPTIONS, SIZES, TOLERANCE, WIDE, assert_solved, problem, wide

import tilewise
from tilewise.reference.sinkhorn import OPS as REFERENCE
from tilewise.testing import allocated_bytes


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_against_the_reference(name, options):
    arguments = problem(name)
    count = 10 if INTERPRETED and name == "medium" else 30
    options = {"max_iter": count, "tol": 1e-3, "scaling": 0.5} | OPTIONS[options]
    found = torch.ops.tilewise.sinkhorn(*arguments, **options)
    assert_solved(found, REFERENCE["sinkhorn"](*map(wide, arguments), **options))


@pytest.mark.parametrize("name", ["small", "medium"])
def test_warm_start_and_epsilon_scaling(name):
    cost, a, b, epsilon = problem(name)
    f, g = (0.1 * torch.randn_like(w) for w in (a, b))
    start = torch.full_like(epsilon, 2.0)
    for extra in ((f, g), (None, None, start), (f, g, start)):
        options = {"max_iter": 12, "tol": 1e-4, "scaling": 0.6}
        found = torch.ops.tilewise.sinkhorn(cost, a, b, epsilon, *extra, **options)
        expected = REFERENCE["sinkhorn"](*map(wide, (cost, a, b, epsilon)), *map(wide, extra), **options)
        assert_solved(found, expected)


@pytest.mark.parametrize("name", SIZES)
def test_plan_and_products(name):
    cost, a, b, epsilon = problem(name)
    f, g, *_ = torch.ops.tilewise.sinkhorn(cost, a, b, epsilon, max_iter=50, tol=1e-4)
    plan = REFERENCE["sinkhorn_plan"](*map(wide, (cost, a, b, epsilon, f, g)))
    torch.testing.assert_close(wide(torch.ops.tilewise.sinkhorn_plan(cost, a, b, epsilon, f, g)), plan, **TOLERANCE)
    for values in (1, 3, 20):
        v = torch.randn(*b.shape, values).to(cost)
        out = torch.ops.tilewise.sinkhorn_apply(cost, a, b, epsilon, f, g, v)
        torch.testing.assert_close(wide(out), plan @ wide(v), **TOLERANCE)
    v = torch.randn(*a.shape, 2).to(cost)
    out = torch.ops.tilewise.sinkhorn_apply(cost.mT, b, a, epsilon, g, f, v)
    torch.testing.assert_close(wide(out), plan.mT @ wide(v), **TOLERANCE)


@pytest.mark.parametrize("name", ["small", "medium"])
@pytest.mark.parametrize("layout", ["transposed", "row step", "broadcast"])
def test_strides(layout, name):
    cost, a, b, epsilon = problem(name)
    if layout == "transposed":
        strided = cost.mT.contiguous().mT
    elif layout == "row step":
        strided = torch.empty(len(cost), 2 * cost.shape[1], cost.shape[2]).to(cost)[:, ::2].copy_(cost)
    else:
        cost = cost[:1].expand_as(cost).contiguous()
        strided = cost[:1].expand_as(cost)
    options = {"max_iter": 9, "tol": 0.0}
    packed = torch.ops.tilewise.sinkhorn(cost, a, b, epsilon, **options)
    found = torch.ops.tilewise.sinkhorn(strided, a, b, epsilon, **options)
    torch.testing.assert_close(found, packed, rtol=1e-6, atol=1e-7)
    f, g = packed[:2]
    plans = [torch.ops.tilewise.sinkhorn_plan(c, a, b, epsilon, f, g) for c in (strided, cost)]
    torch.testing.assert_close(*plans, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["small", "largest small"])
def test_unrolled(name, options):
    arguments = problem(name)
    if name == "largest small" and INTERPRETED:
        arguments = [t[:1] for t in arguments]
    options = {"max_iter": 6} | OPTIONS[options]
    found = torch.ops.tilewise.sinkhorn_unrolled(*arguments, **options)
    for value, truth in zip(found, REFERENCE["sinkhorn_unrolled"](*map(wide, arguments), **options), strict=True):
        torch.testing.assert_close(wide(value), truth, **TOLERANCE)
    upstream = [torch.randn_like(t) for t in found]
    found = torch.ops.tilewise.sinkhorn_unrolled_backward(*upstream, *arguments, **options)
    expected = REFERENCE["sinkhorn_unrolled_backward"](*map(wide, (*upstream, *arguments)), **options)
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(wide(value), truth, **TOLERANCE)


@pytest.mark.parametrize("name", ["small", "medium"])
def test_problems_stop_each_on_its_own(name):
    cost, a, b, _ = problem(name)
    epsilon = torch.tensor([1.0, 0.02, 0.1, 0.5, 0.05])[: len(cost)].to(cost)
    result = tilewise.sinkhorn(cost, a, b, epsilon=epsilon, tol=1e-4, max_iter=300)
    assert result.n_iter[0] < result.n_iter[1] < 300
    assert result.converged.all() and (result.marginal_error <= 1e-4).all()
    for i in range(len(cost)):
        alone = tilewise.sinkhorn(cost[i], a[i], b[i], epsilon=epsilon[i], tol=1e-4, max_iter=300)
        assert (alone.n_iter - result.n_iter[i]).abs() <= (0 if NATIVE_CPU else 1)
        torch.testing.assert_close(alone.value, result.value[i], rtol=1e-4, atol=1e-6)


def test_the_result_keeps_its_promises():
    cost, a, b, _ = problem("medium")
    result = tilewise.sinkhorn(cost, a, b, epsilon=0.05, tol=1e-5)
    plan = result.plan()
    assert result.f.shape == a.shape and result.g.shape == b.shape and plan.shape == cost.shape
    torch.testing.assert_close(plan.sum(1), b, rtol=1e-4, atol=1e-7)
    error = (plan.sum(2) - a).abs().sum(1) / a.sum(1)
    assert (error <= 1.1e-5).all() and result.converged.all()
    torch.testing.assert_close(error, result.marginal_error, rtol=0.02, atol=1e-6)
    divergence = (torch.xlogy(plan, plan) - torch.xlogy(plan, a[:, :, None] * b[:, None])).sum((1, 2))
    torch.testing.assert_close(result.value, (plan * cost).sum((1, 2)) + 0.05 * divergence, rtol=1e-4, atol=1e-6)
    v, w = torch.randn_like(b), torch.randn_like(a)
    torch.testing.assert_close(result.apply(v), (plan @ v[:, :, None])[:, :, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.transpose_apply(w), (plan.mT @ w[:, :, None])[:, :, 0], rtol=1e-4, atol=1e-6)
    points = torch.randn(*b.shape, 2).to(cost)
    kept = a > 0
    where = result.barycentric_map(points)
    assert where[~kept].count_nonzero() == 0
    torch.testing.assert_close(where[kept], ((plan @ points) / plan.sum(2, keepdim=True))[kept], rtol=1e-4, atol=1e-5)
    assert repr(result) == "SinkhornResult(batch=(2,), n=70, m=90, converged=2/2)"
    with pytest.raises(ValueError, match=r"v to have shape \(2, 90\) or \(2, 90, 'p'\), got \(2, 70\)"):
        result.apply(w)
    with pytest.raises(ValueError, match="the points of the columns for barycentric_map"):
        result.barycentric_map()


def test_not_converged_is_said():
    cost, a, b, _ = problem("medium")
    result = tilewise.sinkhorn(cost, a, b, epsilon=1e-3, max_iter=3)
    assert not result.converged.any() and (result.n_iter == 3).all() and (result.marginal_error > 1e-3).all()
    exact = tilewise.sinkhorn(cost, a, b, epsilon=0.05, max_iter=7, tol=0)
    assert (exact.n_iter == 7).all()


@pytest.mark.parametrize("name", ["small", "medium"])
def test_float32_at_a_small_epsilon(name):
    """Costs are 1000 epsilon: nothing overflows, nothing that matters is lost."""
    if INTERPRETED and name == "medium":
        pytest.skip("thousands of programs in Python; `small` and test_against_the_reference run there")
    cost, a, b, _ = problem(name, torch.float32)
    count = 5000 if BACKEND == "cpu" else 100
    result = tilewise.sinkhorn(cost, a, b, epsilon=1e-3, max_iter=count, tol=1e-4)
    plan = result.plan()
    assert plan.isfinite().all() and result.f.isfinite().all() and result.g.isfinite().all()
    torch.testing.assert_close(plan.sum(1), b, rtol=2e-3, atol=1e-6)
    scaled = tilewise.sinkhorn(cost, a, b, epsilon=1e-3, max_iter=count, tol=1e-4, epsilon_scaling=0.9)
    assert (scaled.n_iter > 60).all()
    if count > 100:
        assert ((plan.sum(2) - a).abs().sum(1) < 1e-3).all() and (scaled.marginal_error < 1e-3).all()


@pytest.mark.parametrize("dtype", contract.DTYPES[1:], ids=str)
def test_narrow_costs_are_computed_in_float32(dtype):
    cost, a, b, _ = problem("small" if INTERPRETED else "medium", torch.float32)
    cost = cost.to(dtype).requires_grad_()
    result = tilewise.sinkhorn(cost, a.to(dtype), b.to(dtype), epsilon=0.1, tol=1e-3, reg_marginal=1.0)
    exact = tilewise.sinkhorn(
        cost.float(), a.to(dtype).float(), b.to(dtype).float(), epsilon=0.1, tol=1e-3, reg_marginal=1.0
    )
    assert result.value.dtype == torch.float32 and torch.equal(result.value, exact.value)
    (gradient,) = torch.autograd.grad(result.value.sum(), cost)
    assert gradient.dtype == dtype and torch.equal(gradient, exact.plan().to(dtype))


def test_ragged_batches():
    """A mask, and zeros of the marginals, are the problems without what they leave out."""
    cost, a, b, _ = problem("small", zeros=False)
    sizes = [(7, 9), (3, 4), (1, 9), (5, 2), (6, 6)]
    for i, (n, m) in enumerate(sizes):
        a[i, n:], b[i, m:] = 0, 0
    a, b = (w / w.sum(1, keepdim=True) for w in (a, b))
    mask = (a > 0)[:, :, None] & (b > 0)[:, None]
    options = {"epsilon": 0.1, "tol": 1e-5}
    by_zeros = tilewise.sinkhorn(cost, a, b, **options)
    by_mask = tilewise.sinkhorn(cost.masked_fill(~mask, torch.nan), a, b, mask=mask, **options)
    for i, (n, m) in enumerate(sizes):
        alone = tilewise.sinkhorn(cost[i, :n, :m], a[i, :n], b[i, :m], **options)
        for result in (by_zeros, by_mask):
            torch.testing.assert_close(result.plan()[i, :n, :m], alone.plan(), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(result.value[i], alone.value, rtol=1e-4, atol=1e-6)
            assert result.plan()[i].isfinite().all() and result.plan()[i, n:].count_nonzero() == 0


@pytest.mark.parametrize("name", ["small", "medium"])
def test_forbidden_pairs(name):
    cost, a, b, _ = problem(name, zeros=False)
    mask = torch.rand(cost.shape).to(DEVICE) > 0.3
    mask[:, 0, :] = mask[:, :, 0] = True
    cost = cost.requires_grad_()
    result = tilewise.sinkhorn(cost, a, b, epsilon=0.1, mask=mask, max_iter=400, tol=1e-3)
    plan = result.plan()
    assert plan[~mask].count_nonzero() == 0
    torch.testing.assert_close(plan.sum(1), b, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(result.value.sum() + (plan * plan).sum(), cost)
    assert gradient.isfinite().all() and gradient[~mask].count_nonzero() == 0
    blocked = mask.clone()
    blocked[0, 2] = False  # a row without a pair: no plan has its marginal
    impossible = tilewise.sinkhorn(cost, a, b, epsilon=0.1, mask=blocked, max_iter=20)
    assert impossible.plan().isfinite().all() and not impossible.converged[0]


def test_marginals_broadcast():
    cost, a, b, _ = problem("small")
    found = tilewise.sinkhorn(cost, a[0], b[0], epsilon=0.1)
    expected = tilewise.sinkhorn(cost, a[:1].expand_as(a), b[:1].expand_as(b), epsilon=0.1)
    assert torch.equal(found.value, expected.value)
    uniform = tilewise.sinkhorn(cost, epsilon=0.1)
    even = [torch.full_like(w, 1 / w.shape[1]) for w in (a, b)]
    assert torch.equal(uniform.value, tilewise.sinkhorn(cost, *even, epsilon=0.1).value)
    grid = tilewise.sinkhorn(cost[:4].unflatten(0, (2, 2)), epsilon=0.1)
    assert grid.value.shape == (2, 2) and grid.plan().shape == (2, 2, 7, 9)
    assert torch.equal(grid.value.flatten(), uniform.value[:4])
    empty = tilewise.sinkhorn(cost[:0], epsilon=0.1)
    assert empty.value.shape == (0,) and empty.plan().shape == (0, 7, 9)


def test_same_bits_every_time():
    for name in ("small", "medium", "largest small"):
        arguments = problem(name, torch.float32)
        threads = torch.get_num_threads()
        first = torch.ops.tilewise.sinkhorn(*arguments, max_iter=5, tol=0.0)
        torch.set_num_threads(1)
        second = torch.ops.tilewise.sinkhorn(*arguments, max_iter=5, tol=0.0)
        torch.set_num_threads(threads)
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_every_output_is_written():
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        for name in ("small", "medium"):
            cost, a, b, epsilon = problem(name, torch.float32)
            f, g, value, error, n_iter = torch.ops.tilewise.sinkhorn(cost, a, b, epsilon, max_iter=5, tol=0.0)
            plan = torch.ops.tilewise.sinkhorn_plan(cost, a, b, epsilon, f, g)
            out = torch.ops.tilewise.sinkhorn_apply(cost, a, b, epsilon, f, g, g[:, :, None])
            assert all(t.isfinite().all() for t in (f, g, value, error, plan, out)) and (n_iter == 5).all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(BACKEND == "reference", reason="the reference holds matrices")
def test_memory():
    """On a CPU one more matrix; on a GPU vectors alone."""
    n, m = (90, 100) if INTERPRETED else (600, 800)
    cost = torch.rand(1, n, m, device=DEVICE)
    epsilon = torch.full((1,), 0.1, device=DEVICE)
    a, b = (torch.full((1, size), 1 / size, device=DEVICE) for size in (n, m))
    used = allocated_bytes(lambda: torch.ops.tilewise.sinkhorn(cost, a, b, epsilon, max_iter=3, tol=0.0), DEVICE)
    vectors = 4 * 24 * (n + m) + (16384 if DEVICE == "cuda" else 0)
    kept = cost.nbytes if BACKEND == "cpu" else 0
    assert used <= kept + vectors


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
def test_compile_and_opcheck():
    def step(cost):
        result = tilewise.sinkhorn(cost, epsilon=0.1, max_iter=20)
        return result.value.sum() + (result.plan() ** 2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for size in (6, 70):
        cost = torch.rand(2, size, 8, device=DEVICE, requires_grad=True)
        values = [f(cost) for f in (compiled, step)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(v, cost)[0] for v in values))
    arguments = [t.requires_grad_() for t in problem("small")]
    torch.library.opcheck(torch.ops.tilewise.sinkhorn, tuple(arguments), {"max_iter": 5, "tol": 0.0})
    f, g = (torch.zeros_like(w).detach() for w in arguments[1:3])
    torch.library.opcheck(torch.ops.tilewise.sinkhorn_plan, (*arguments, f, g))
    torch.library.opcheck(torch.ops.tilewise.sinkhorn_unrolled, tuple(arguments), {"max_iter": 3})


def test_sinkhorn_knopp_is_the_loop_of_swav():
    torch.manual_seed(0)
    logits = torch.randn(96, 12).to(DEVICE, WIDE)
    q = torch.exp(logits / 0.3).T
    for _ in range(5):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    found = tilewise.sinkhorn_knopp(logits, n_iter=5, epsilon=0.3)
    torch.testing.assert_close(found, (q * q.shape[1]).T, **TOLERANCE)
    first = tilewise.sinkhorn_knopp(logits, n_iter=1, epsilon=0.3)
    columns = torch.exp(logits / 0.3) / torch.exp(logits / 0.3).sum(0)
    torch.testing.assert_close(first, columns / columns.sum(1, keepdim=True), **TOLERANCE)
    confident = tilewise.sinkhorn_knopp(100 * logits, n_iter=10, epsilon=0.05)  # exp(6000) would overflow
    torch.testing.assert_close(confident.sum(1), torch.ones_like(confident[:, 0]), rtol=1e-5, atol=0)
    for options, message in (({"n_iter": 0}, "n_iter to be an integer"), ({"epsilon": 0.0}, "epsilon to be")):
        with pytest.raises(ValueError, match=rf"tilewise\.sinkhorn_knopp: expected {message}"):
            tilewise.sinkhorn_knopp(logits, **options)
    with pytest.raises(ValueError, match="logits to have rows and columns"):
        tilewise.sinkhorn_knopp(logits[:0])


C = torch.rand(6, 8)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((C[0],), {}, ValueError, r"cost to have shape \(..., n, m\), got \(8,\)"),
        ((C[:0],), {}, ValueError, r"cost to have shape \(..., n, m\), got \(0, 8\)"),
        ((C.long(),), {}, TypeError, "cost to be float64"),
        ((C.tolist(),), {}, TypeError, "cost to be a tensor, got list"),
        ((C, torch.ones(5)), {}, ValueError, r"a to be floating of shape \(6,\), got torch.float32 of shape \(5,\)"),
        ((C, None, torch.ones(8).long()), {}, ValueError, "b to be floating"),
        ((C, [1.0]), {}, TypeError, "a to be a tensor or None"),
        ((C,), {"epsilon": 0.0}, ValueError, "epsilon to be a finite number"),
        ((C,), {"epsilon": torch.ones(3)}, ValueError, r"epsilon to be a number or floating of shape \(\) or \(\)"),
        ((C,), {"max_iter": 0}, ValueError, "max_iter to be an integer of at least 1, got 0"),
        ((C,), {"max_iter": 2.0}, ValueError, "max_iter to be an integer of at least 1, got 2.0"),
        ((C,), {"tol": -1.0}, ValueError, "tol to be a finite number"),
        ((C,), {"reg_marginal": 0.0}, ValueError, "reg_marginal to be a finite number"),
        ((C,), {"reg_marginal": (1.0, 1.0, 1.0)}, ValueError, "reg_marginal to be a number or a pair"),
        ((C,), {"mask": torch.ones(6, 8)}, ValueError, r"mask to be bool of shape \(6, 8\), got torch.float32"),
        ((C,), {"init": (torch.zeros(6), torch.zeros(6))}, ValueError, r"init\[1\] to be floating of shape \(8,\)"),
        ((C,), {"epsilon_scaling": 1.0}, ValueError, r"epsilon_scaling to be None or a number in \(0, 1\), got 1.0"),
        ((C,), {"gradient": "none"}, ValueError, "gradient to be 'implicit' or 'unrolled', got 'none'"),
        ((torch.rand(65, 3),), {"gradient": "unrolled"}, ValueError, "at most 64 rows and columns"),
        ((C,), {"gradient": "unrolled", "epsilon_scaling": 0.5}, ValueError, "no init and no epsilon_scaling"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=rf"^tilewise\.sinkhorn: expected {message}|^tilewise.sinkhorn: .*{message}"):
        tilewise.sinkhorn(*arguments, **{"epsilon": 0.1} | options)


@pytest.mark.skipif(BACKEND == "cpu", reason="there it is an error")
@pytest.mark.parametrize("name", ["small", "medium"])
def test_a_nan_is_not_lost(name):
    """Values that the host does not look at: a NaN in the costs is one in the results of its problem, and said."""
    cost, a, b, _ = problem(name)
    cost[1, 3, 2] = torch.nan
    result = tilewise.sinkhorn(cost, a, b, epsilon=0.1, max_iter=4, tol=1.0)
    assert result.value[1].isnan() and result.value[0].isfinite() and result.converged.tolist()[:2] == [True, False]


@pytest.mark.skipif(BACKEND != "cpu", reason="a GPU's values are not read by the host")
@pytest.mark.parametrize("size", [8, 80])
def test_bad_values(size):
    even = torch.full((size,), 1 / size)
    cost = torch.rand(size, size)
    cases = [
        ((cost.masked_fill(torch.eye(size) > 0, torch.nan), even, even, 0.1), "cost to hold numbers or inf"),
        ((cost.masked_fill(torch.eye(size) > 0, -torch.inf), even, even, 0.1), "cost to hold numbers or inf"),
        ((cost, -even, even, 0.1), "a to hold finite numbers >= 0, got -"),
        ((cost, even, even * torch.nan, 0.1), "b to hold finite numbers >= 0, got nan"),
        ((cost, even, 2 * even, 0.1), "a and b to have equal sums without reg_marginal, got 1.*and 2"),
        ((cost, even, even, torch.tensor(-1.0)), "epsilon to be a finite number above 0, got -1"),
    ]
    for batch in (1, 5):
        for (matrix, a, b, epsilon), message in cases:
            with pytest.raises(RuntimeError, match=rf"tilewise\.sinkhorn: expected {message}"):
                tilewise.sinkhorn(matrix.expand(batch, -1, -1), a, b, epsilon=epsilon)
    tilewise.sinkhorn(cost, even, 2 * even, epsilon=0.1, reg_marginal=1.0)
