"""sparse_ot: against the reference and exhaustive search, its limits, its gradients, and what it says of ties."""

import itertools

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU

import tilewise
from tilewise.reference.sparse_ot import OPS as REFERENCE

WIDE = torch.float64 if NATIVE_CPU else torch.float32
native = pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")


def problem(m=12, n=9, batch=(), seed=0, dtype=WIDE):
    """cost (..., m, n), a, b."""
    torch.manual_seed(seed)
    cost = torch.rand(*batch, m, n, dtype=torch.float64)
    a, b = (torch.rand(*batch, size, dtype=torch.float64) + 0.2 for size in (m, n))
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return [t.to(DEVICE, dtype) for t in (cost, a, b)]


def wide(tensor):
    return tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu()


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(
    "sizes", [(2, 5, 3, 2), (1, 1, 1, 1), (3, 70, 20, 6), (1, 40, 33, 40), (1, 600, 3, 300)], ids=str
)
def test_columns(sizes, dual):
    batch, m, n, k = sizes
    cost, a, b = problem(m, n, (batch,))
    costs = cost.mT.contiguous()
    costs[:, 0, m // 2] = torch.inf if m > 2 else 0.5
    alpha = 0.3 * torch.randn_like(a)
    level = (-alpha.amax(1, keepdim=True) + 0.5 + 0.1 * torch.randn_like(b)) if dual else b
    options = {"k": k, "gamma": 0.5, "dual": dual}
    found = torch.ops.tilewise.sparse_ot_columns(costs, alpha, level, **options)
    expected = REFERENCE["sparse_ot_columns"](*map(wide, (costs, alpha, level)), **options)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if NATIVE_CPU else {"rtol": 1e-4, "atol": 3e-6}
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(wide(value), truth, **tolerance if truth.is_floating_point() else {})


@pytest.mark.parametrize("rate", [1e-3, 2.0])
def test_the_plan_is_that_of_the_potentials(rate):
    """Columns that many blocks of a GPU gather, above what an evaluation knows from the one before; rightly or not."""
    cost, a, b = problem(26000, 2, (1,))
    costs, a, b = cost.mT.contiguous(), 500 * a, 500 * b
    options = {"method": "adam", "max_iter": 3, "tol": 0.0, "lr": rate}
    values, indices, alpha, beta, *_ = torch.ops.tilewise.sparse_ot(costs, a, b, k=900, gamma=0.5, **options)
    expected = REFERENCE["sparse_ot_columns"](*map(wide, (costs, alpha, b)), k=900, gamma=0.5)
    plan, truth = (torch.zeros(1, 2, 26000).double().scatter_add(2, wide(i), wide(v)) for v, i in
                   ((values, indices), expected[:2]))  # fmt: skip
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if NATIVE_CPU else {"rtol": 1e-4, "atol": 3e-6}
    torch.testing.assert_close(plan, truth, **tolerance)
    torch.testing.assert_close(wide(beta), expected[2], **tolerance)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
@pytest.mark.parametrize("k", [4, 12])
@pytest.mark.parametrize("method", ["semi_dual", "dual"])
def test_batches_against_the_reference(method, k):
    cost, a, b = problem(batch=(2, 3))
    tol = 1e-9 if NATIVE_CPU else 1e-5
    result = tilewise.sparse_ot(cost, a, b, k=k, gamma=0.5, method=method, tol=tol)
    assert result.value.shape == (2, 3) and result.values.shape == (2, 3, 9, k) and result.plan().shape == cost.shape
    wide_cost = wide(cost).reshape(6, 12, 9).mT.contiguous()
    sides = wide(a).reshape(6, 12), wide(b).reshape(6, 9)
    options = {"k": k, "gamma": 0.5, "method": method, "max_iter": 500, "tol": 1e-9}
    expected = REFERENCE["sparse_ot"](wide_cost, *sides, **options)
    torch.testing.assert_close(wide(result.value).flatten(), expected[4], rtol=2e-6, atol=1e-7)
    solved = (expected[5] < 1e-6) & wide(result.converged).flatten().bool()
    assert solved.sum() >= (6 if k == 12 else 1)
    plan = torch.zeros(6, 9, 12).double().scatter_add(2, expected[1], expected[0]).mT
    difference = (wide(result.plan()).reshape(6, 12, 9) - plan)[solved]
    assert difference.abs().max() < (1e-6 if NATIVE_CPU else 2e-4)


def exhaustive(cost, a, b, k, gamma):
    """The least cost over all sets of positive cells with at most k rows a column: each set's optimum has the entries
    t = (u + v - c) / gamma on it, where u and v solve for the marginals, and counts where these hold and t >= 0."""
    m, n = cost.shape
    choices = [c for size in range(k + 1) for c in itertools.combinations(range(m), size)]
    of_column = torch.zeros(len(choices), m, dtype=torch.float64)
    for at, rows in enumerate(choices):
        of_column[at, list(rows)] = 1
    masks = torch.stack([of_column[list(p)] for p in itertools.product(range(len(choices)), repeat=n)]).mT.flatten(1)
    sums = torch.cat([torch.eye(m).repeat_interleave(n, 1), torch.eye(n).repeat(1, m)]).double()  # (m + n, m n)
    right = torch.cat([a, b])
    system = torch.einsum("ip,bp,jp->bij", sums, masks, sums)
    wanted = gamma * right + (masks * cost.flatten()) @ sums.T
    duals = (torch.linalg.pinv(system, hermitian=True, rtol=1e-12) @ wanted[:, :, None])[:, :, 0]
    t = masks * (duals @ sums - cost.flatten()) / gamma
    fits = ((t @ sums.T - right).abs().amax(1) < 1e-11) & (t.amin(1) >= -1e-13)
    return float((t @ cost.flatten() + gamma / 2 * (t * t).sum(1))[fits].min())


@native
def test_exhaustive_search():
    """Where the rows hold there is no gap, to 1e-9; elsewhere, at a tie, the dual's value is a bound."""
    exact = 0
    for seed in range(12):
        cost, a, b = problem(5, 3, seed=seed)
        best = exhaustive(cost, a, b, 3, 0.5)
        result = tilewise.sparse_ot(cost, a, b, k=3, gamma=0.5, tol=1e-11, max_iter=3000)
        if result.row_violation < 1e-10:
            exact += 1
            assert abs(float(result.value) - best) < 1e-9 and abs(float(result.gap)) < 1e-9
        else:
            assert float(result.value) < best + 1e-9 and float(result.tie_margin) < 1e-4
    assert 3 <= exact < 12


@native
def test_all_entries_are_quadratic_transport():
    """k = m: the optimality conditions of quadratically regularised transport."""
    cost, a, b = problem(30, 20)
    result = tilewise.sparse_ot(cost, a, b, k=30, gamma=0.3, tol=1e-10, max_iter=2000)
    plan = result.plan()
    torch.testing.assert_close(plan.sum(1), a, rtol=0, atol=1e-9)
    torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-12)
    slack = (result.alpha[:, None] + result.beta[None] - cost) / 0.3
    torch.testing.assert_close(plan, slack.clamp(min=0), rtol=0, atol=1e-12)
    assert abs(float(result.gap)) < 1e-9 and result.tie_margin == torch.inf and result.converged


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
def test_invariants():
    """nnz <= k, exact columns, the value not rising in k."""
    cost, a, b = problem(20, 15)
    values = []
    for k in (2, 3, 5, 8, 20):
        result = tilewise.sparse_ot(cost, a, b, k=k, gamma=0.3, max_iter=300)
        plan = result.plan()
        assert int((plan > 0).sum(0).max()) <= k and (result.indices[result.values == 0] == 0).all()
        torch.testing.assert_close(plan.sum(0), b, rtol=1e-5, atol=1e-7)
        values.append(float(result.value))
    assert all(more >= less - 1e-6 for more, less in itertools.pairwise(values))
    assert values[0] > values[-1]


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
def test_one_entry_a_column():
    """k = 1: the linear programme's value + gamma/2 |b|^2; here every row feeds several columns."""
    cost, _, b = problem(3, 9)
    choice = torch.arange(9) % 3
    a = torch.zeros(3, dtype=WIDE, device=DEVICE).index_add(0, choice.to(DEVICE), b)
    cost = cost + 2 * (torch.arange(3)[:, None] != choice).to(cost)
    result = tilewise.sparse_ot(cost, a, b, k=1, gamma=0.2)
    expected = (cost[choice, torch.arange(9)] * b).sum() + 0.1 * (b * b).sum()
    torch.testing.assert_close(result.value, expected, rtol=1e-6, atol=1e-7)
    assert result.converged


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
def test_ties_are_said():
    """A problem of equal costs cannot be solved with one entry a column: nothing pretends."""
    cost = torch.zeros(4, 4, dtype=WIDE, device=DEVICE)
    a = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=WIDE, device=DEVICE)
    result = tilewise.sparse_ot(cost, a, k=1, max_iter=100)
    assert not result.converged and result.row_violation > 0.05 and result.tie_margin < 1e-3
    assert (result.n_iter <= 100).all()


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
def test_marginals_whose_sums_differ_by_rounding():
    cost, a, b = problem()
    result = tilewise.sparse_ot(cost, a * (1 + 1e-6), b, k=12, tol=1e-12, max_iter=400)
    assert result.alpha.abs().max() < 10 and result.row_violation < 1e-5


@native
@pytest.mark.parametrize("method", ["semi_dual", "dual"])
def test_gradients(method):
    """Of the value by the envelope, of the entries through the solution."""
    cost, a, b = problem(7, 6)
    weights = torch.randn(7, 6, dtype=WIDE)

    def value_and_plan(cost, a, b):
        a, b = a / a.sum(), b / b.sum()
        result = tilewise.sparse_ot(cost, a, b, k=5, gamma=0.5, method=method, tol=1e-13, max_iter=3000)
        return result.value, (result.plan() * weights).sum(), result.values.sum(-1)

    assert tilewise.sparse_ot(cost, a, b, k=5, gamma=0.5, tol=1e-12, max_iter=3000).row_violation < 1e-10
    inputs = [t.requires_grad_() for t in (cost, a, b)]
    assert torch.autograd.gradcheck(value_and_plan, inputs, eps=1e-5, atol=1e-5, rtol=1e-4)


@native
@pytest.mark.parametrize("kind", ["sqeuclidean", "euclidean"])
def test_points(kind, monkeypatch):
    """The costs formed, the costs in blocks, and their gradients are the same."""
    module = tilewise.ops.sparse_ot_points
    torch.manual_seed(0)
    x, y = torch.randn(2, 30, 3, dtype=WIDE) + 100, torch.randn(2, 20, 3, dtype=WIDE) + 100
    x.requires_grad_(), y.requires_grad_()
    cost = torch.cdist(x, y) ** (2 if kind == "sqeuclidean" else 1)
    expected = tilewise.sparse_ot(cost, k=12, gamma=2.0, tol=1e-10, max_iter=2000)
    weights = torch.randn(2, 20, 12, dtype=WIDE)

    def loss(result):
        return result.value.sum() + (result.values * weights).sum()

    truth = torch.autograd.grad(loss(expected), (x, y))
    for chunk in (module.CHUNK_BYTES, 2 * 30 * 8 * 7):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
        result = tilewise.sparse_ot_points(x, y, k=12, gamma=2.0, cost=kind, tol=1e-10, max_iter=2000)
        torch.testing.assert_close(result.plan(), expected.plan(), rtol=0, atol=1e-7)
        torch.testing.assert_close(torch.autograd.grad(loss(result), (x, y)), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("wrong", ["NaN", "all forbidden"])
def test_a_column_that_cannot_be_solved_is_nan(wrong, dual):
    """In its potential, and so in the value; the other columns do not know of it."""
    cost, a, b = problem(20, 4, (1,))
    costs = cost.mT.contiguous()
    costs[0, 2] = torch.nan if wrong == "NaN" else torch.inf
    if wrong == "NaN":
        costs[0, 2, :-1] = 0.5
    values, _, beta, row_sums, _ = torch.ops.tilewise.sparse_ot_columns(costs, 0 * a, b, k=3, gamma=0.5, dual=dual)
    assert beta[0].isnan().tolist() == [False, False, True, False]
    assert (values[0, 2] == 0).all() and row_sums.isfinite().all()


@pytest.mark.skipif(BACKEND != "cpu", reason="values are looked at by the CPU kernels")
@pytest.mark.parametrize("chunk", [1 << 20, 2 * 12 * 8])
def test_bad_values_of_points(chunk, monkeypatch):
    monkeypatch.setattr(tilewise.ops.sparse_ot_points, "CHUNK_BYTES", chunk)
    x, y = torch.randn(12, 2), torch.randn(9, 2)
    nan, (_, a, b) = x.clone(), problem(dtype=torch.float32)
    nan[3, 1] = torch.nan
    for arguments, message in (
        ((nan, y), "expected x to hold finite numbers"),
        ((y, nan), "expected y to hold finite numbers"),
        ((x, y, -a, b), "expected a to hold finite numbers >= 0"),
        ((x, y, a, 2 * b), "expected a and b to have equal sums"),
    ):
        with pytest.raises(RuntimeError, match=f"tilewise.sparse_ot_points: {message}"):
            tilewise.sparse_ot_points(*arguments, k=5)


@pytest.mark.skipif(BACKEND != "triton", reason="the other backends of a CPU take float64")
def test_triton_refuses_float64():
    costs = torch.rand(1, 3, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match=r"tilewise.sparse_ot: the Triton backend takes float32, got torch.float64"):
        torch.ops.tilewise.sparse_ot_columns(costs, costs[:, 0], costs[:, :, 0].contiguous(), k=2, gamma=1.0)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
def test_warm_start():
    cost, a, b = problem(20, 15)
    first = tilewise.sparse_ot(cost, a, b, k=20)
    for method in ("semi_dual", "dual"):
        again = tilewise.sparse_ot(cost, a, b, k=20, method=method, init=(first.alpha, first.beta))
        assert again.n_iter <= 3 < first.n_iter and again.converged


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
def test_layouts_and_dtypes():
    cost, a, b = problem(20, 15)
    expected = tilewise.sparse_ot(cost, a, b, k=20)
    for other in (cost.t().contiguous().t(), cost.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(tilewise.sparse_ot(other, a, b, k=20).values, expected.values)
    half = tilewise.sparse_ot(cost.bfloat16(), k=20)
    assert half.values.dtype == torch.float32
    assert torch.equal(half.values, tilewise.sparse_ot(cost.bfloat16().float(), k=20).values)
    assert tilewise.sparse_ot(cost[None][:0], k=3).values.shape == (0, 15, 3)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
def test_same_bits_every_time():
    cost, a, b = problem(400, 350)  # enough for several threads
    first = tilewise.sparse_ot(cost, a, b, k=9, max_iter=20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = tilewise.sparse_ot(cost, a, b, k=9, max_iter=20)
    torch.set_num_threads(threads)
    assert torch.equal(first.values, second.values) and torch.equal(first.alpha, second.alpha)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be compiled")
def test_compile_and_opcheck():
    cost, a, b = problem(8, 6, dtype=torch.float32)

    def step(cost, a, b):
        result = tilewise.sparse_ot(cost, a, b, k=8, max_iter=50)
        return result.value + result.values.square().sum()

    cost.requires_grad_()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(cost, a, b), step(cost, a, b))
    costs = cost.detach().t()[None].contiguous().requires_grad_()
    options = {"k": 8, "gamma": 1.0, "method": "semi_dual", "max_iter": 20, "tol": 1e-6}
    torch.library.opcheck(torch.ops.tilewise.sparse_ot, (costs, a[None], b[None]), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"expected k to be an integer in \[1, 12\], the rows of cost, got 0"),
        ({"k": 13}, "got 13"),
        ({"k": 1}, "k n to be at least 12, the rows with mass, got 1 x 9"),
        ({"k": 2, "gamma": 0.0}, "gamma to be a finite number above 0"),
        ({"k": 2, "method": "primal"}, "method to be 'semi_dual' or 'dual', got 'primal'"),
        ({"k": 2, "max_iter": 0}, "max_iter"),
        ({"k": 2, "tol": -1.0}, "tol"),
        ({"k": 2, "a": torch.ones(5)}, r"expected a to be floating of shape \(12,\)"),
        ({"k": 2, "init": (torch.zeros(5), torch.zeros(9))}, r"init\[0\]"),
    ],
)
def test_bad_arguments(options, message):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message) as raised:
        tilewise.sparse_ot(torch.rand(12, 9, device=DEVICE), **options)
    assert str(raised.value).startswith("tilewise.sparse_ot: ")


@pytest.mark.skipif(BACKEND != "cpu", reason="values are looked at by the CPU kernels")
def test_bad_values():
    cost, a, b = problem()
    nan, forbidden, negative = cost.clone(), cost.clone(), a.clone()
    nan[3, 4], forbidden[:, 2], negative[1] = torch.nan, torch.inf, -0.1
    for arguments, message in (
        ((nan, a, b), "expected cost to hold numbers"),
        ((forbidden, a, b), "not all of a column forbidden"),
        ((cost, negative, b), "expected a to hold finite numbers >= 0"),
        ((cost, a, 2 * b), "expected a and b to have equal sums, got 1 and 2"),
    ):
        with pytest.raises(RuntimeError, match=f"tilewise.sparse_ot: .*{message}"):
            tilewise.sparse_ot(*arguments, k=5)
    with pytest.raises(RuntimeError, match="k n to be at least 12, the rows with mass, got 1 x 9"):
        tilewise.sparse_ot(cost, a, b, k=1)
