"""The CUDA kernels of simplex_topk and sparse_ot, run by the CPU emulator, against the float64 reference."""

import emulated
import pytest
import torch
from emulated import Guards, SparseCall, checked, pointer

from tilewise.reference.sparse_ot import OPS as REFERENCE

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")
METHODS = ("semi_dual", "dual", "adam")


@pytest.fixture(scope="module")
def library():
    return emulated.build()


# Rows in registers up to 1024, in shared memory up to 24576, or of these what the room is enough for.
COLUMNS = [1, 7, 32, 200, 256, 257, 700, 1024, 1025, 24576, 24577, 30000]


@pytest.mark.parametrize("columns, k", [(n, k) for n in COLUMNS for k in sorted({1, 3, 40, 26000, n}) if k <= n])
def test_simplex_topk(library, columns, k):
    torch.manual_seed(0)
    rows = 9 if columns <= 1025 else 2
    guards, scale = Guards(), 0.7 * k
    x, grad = torch.randn(rows, columns), torch.randn(rows, columns)
    x[0, : columns // 3] = -torch.inf
    p, out = guards.empty(rows, columns), guards.empty(rows, columns)
    checked(library.simplex_topk(pointer(guards.put(x)), None, pointer(p), rows, columns, k, scale))
    expected = REFERENCE["simplex_topk"](x.double(), k=k, scale=scale)
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=2e-6 * scale)
    checked(library.simplex_topk(pointer(p), pointer(guards.put(grad)), pointer(out), rows, columns, k, scale))
    expected = REFERENCE["simplex_topk_backward"](grad.double(), p.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    guards.check()


def test_simplex_topk_of_equal_numbers_and_nan(library):
    guards = Guards()
    p, scale = guards.empty(1, 2), 3.073333501815796
    edge = guards.put(torch.tensor([[0.0, -3.073333263397217]]))  # the threshold is where the last entry is
    checked(library.simplex_topk(pointer(edge), None, pointer(p), 1, 2, 2, scale))
    torch.testing.assert_close(p, torch.tensor([[scale, 0.0]]), rtol=0, atol=1e-6)
    p = guards.empty(1, 3)
    tie = guards.put(torch.tensor([[0.0, 0.0, 35.359375]]))
    checked(library.simplex_topk(pointer(tie), None, pointer(p), 1, 3, 2, 46.74778377369581))
    torch.testing.assert_close(p, torch.tensor([[5.6942062, 0.0, 41.0535838]]))
    for size in (50, 1100, 26000):
        x = torch.zeros(4, size)
        x[1, 7], x[2, 3], x[3] = torch.inf, torch.nan, -torch.inf
        p = guards.empty(4, size)
        checked(library.simplex_topk(pointer(guards.put(x)), None, pointer(p), 4, size, 4, 1.0))
        torch.testing.assert_close(p[0], torch.cat([torch.full((4,), 0.25), torch.zeros(size - 4)]))
        assert p[1:].isnan().all()
    guards.check()


@pytest.mark.parametrize("size", [100, 900, 2000, 26000])
def test_simplex_topk_takes_the_first_of_equal_numbers(library, size):
    torch.manual_seed(0)
    x, guards = torch.randint(0, 5, (3, size)) / 4, Guards()
    k = int((x[0] == 1).sum()) + 7  # some of those that are 3/4
    p = guards.empty(3, size)
    checked(library.simplex_topk(pointer(guards.put(x)), None, pointer(p), 3, size, k, 2.0 * k))
    expected = REFERENCE["simplex_topk"](x.double(), k=k, scale=2.0 * k)
    order = x.sort(dim=1, descending=True, stable=True).indices[:, :k]
    first = torch.zeros(3, size, dtype=torch.bool).scatter(1, order, True)
    torch.testing.assert_close(p.sort(1).values.double(), expected.sort(1).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(p > 0, first)


@pytest.mark.parametrize("k", [3, 17, 20])
@pytest.mark.parametrize("scale", [3.4e38, 1.0])
def test_simplex_topk_of_rows_that_span_the_type(library, k, scale):
    torch.manual_seed(0)
    most, guards = torch.finfo(torch.float32).max, Guards()
    x = torch.stack([(torch.rand(20, dtype=torch.float64) * 2 - 1) * most, -most * (1 - 1e-6 * torch.rand(20))]).float()
    p = guards.empty(2, 20)
    checked(library.simplex_topk(pointer(guards.put(x)), None, pointer(p), 2, 20, k, scale))
    expected = REFERENCE["simplex_topk"](x.double(), k=k, scale=scale)
    torch.testing.assert_close(p.double(), expected, rtol=1e-4, atol=1e-4 * scale)


class Problem:
    def __init__(self, batch, rows, columns, k, gamma=0.5):
        torch.manual_seed(0)
        self.sizes, self.k, self.gamma = (batch, rows, columns), k, gamma
        self.guards = Guards()
        self.costs = torch.rand(batch, columns, rows)
        self.costs[:, 0, rows // 2] = torch.inf if rows > 2 else 0.5
        a, b = torch.rand(batch, rows) + 0.2, torch.rand(batch, columns) + 0.2
        self.a, self.b = (w / w.sum(1, keepdim=True) for w in (a, b))
        self.call = SparseCall(batch=batch, rows=rows, columns=columns, k=k, gamma=gamma)
        self.put("costs", self.costs)
        empty = self.guards.empty
        shapes = {"values": (batch, columns, k), "beta": (batch, columns), "margin": (batch, columns)}
        shapes |= {"row_sums": (batch, rows), "value": (batch,), "row_error": (batch,), "column_error": (batch,)}
        self.out = {name: empty(*shape) for name, shape in shapes.items()}
        self.out |= {"indices": empty(batch, columns, k, dtype=torch.int64), "n_iter": empty(batch, dtype=torch.int64)}
        for name, tensor in self.out.items():
            setattr(self.call, name, pointer(tensor))

    def put(self, name, tensor):
        held = self.guards.put(tensor)
        setattr(self.call, name, pointer(held))
        return held


# In registers; in shared memory; gathered (k = 1 and 900, 12288 at most); too many to be gathered, or for the room.
SIZES = [(2, 5, 3, 2), (1, 1, 1, 1), (3, 70, 20, 6), (1, 40, 33, 40), (2, 300, 5, 1), (1, 1024, 3, 200)]
LONG = [(1, 1200, 3, 500), (1, 24577, 2, 1), (2, 30000, 2, 900), (1, 30000, 2, 12288), (1, 30000, 2, 12289)]
LONG += [(1, 30000, 2, 25000), (1, 30000, 2, 30000)]


def check_same(out, found):
    """Bit by bit."""
    for name, tensor in found.items():
        assert torch.equal(out[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def check_columns(p, alpha, level, dual=False):
    options = {"k": p.k, "gamma": p.gamma, "dual": dual}
    expected = REFERENCE["sparse_ot_columns"](p.costs.double(), alpha.double(), level.double(), **options)
    for name, truth in zip(("values", "indices", "beta", "row_sums", "margin"), expected, strict=True):
        found = p.out[name].to(truth.dtype)
        if name == "row_sums" and p.call.a:
            continue
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-6 if found.is_floating_point() else 0, msg=name)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("sizes", SIZES + LONG)
def test_columns(library, sizes, dual):
    p = Problem(*sizes)
    alpha = 0.3 * torch.randn_like(p.a)
    share = 1 if p.sizes[1] < 2000 else p.k  # of many entries each is smaller than the costs' rounding
    level = -alpha.amax(1, keepdim=True) + 0.5 + 0.1 * torch.randn_like(p.b) if dual else share * p.b
    p.put("alpha", alpha), p.put("level", level)
    p.call.method = METHODS.index("dual" if dual else "semi_dual")
    checked(library.sparse_transport(p.call))
    p.guards.check()
    check_columns(p, alpha, level, dual)
    found = {name: tensor.clone() for name, tensor in p.out.items()}
    checked(library.sparse_transport(p.call))
    check_same(p.out, found)


@pytest.mark.parametrize("rows", [20, 2000, 30000])
def test_columns_of_equal_numbers(library, rows):
    p = Problem(1, rows, 3, rows // 3)
    p.costs[0, 0], p.costs[0, 1, rows // 2 :] = 0.25, torch.inf
    p.costs[0, 2] = 0.25 * (torch.arange(rows) % 5)
    alpha, level = torch.zeros_like(p.a), torch.full_like(p.b, float(p.k))
    p.put("costs", p.costs), p.put("alpha", alpha), p.put("level", level)
    checked(library.sparse_transport(p.call))
    p.guards.check()
    used = p.out["values"][0] > 0
    assert p.out["indices"][0, 0].tolist() == list(range(p.k)) and used.sum(1).tolist() == [p.k] * 3
    assert (p.out["indices"][0, 1] < rows // 2).all()
    first = (-p.costs[0, 2]).sort(descending=True, stable=True).indices[: p.k].sort().values
    assert torch.equal(p.out["indices"][0, 2], first)
    torch.testing.assert_close(p.out["values"][0].sum(1), level[0], rtol=1e-4, atol=0)
    assert p.out["margin"][0, [0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("rows", [20, 1100, 25000])
def test_a_column_with_nan_is_nan(library, rows, dual):
    p = Problem(1, rows, 4, 3)
    p.costs[0, 2, rows // 3] = torch.nan
    p.put("costs", p.costs), p.put("alpha", torch.zeros_like(p.a)), p.put("level", p.b)
    p.call.method = METHODS.index("dual" if dual else "semi_dual")
    checked(library.sparse_transport(p.call))
    p.guards.check()
    assert p.out["beta"][0].isnan().tolist() == [False, False, True, False]
    assert (p.out["values"][0, 2] == 0).all() and p.out["row_sums"].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(2, 6, 4, 6), (2, 30, 20, 8)])
def test_solve(library, sizes, method):
    p = Problem(*sizes)
    alpha = p.put("alpha", torch.zeros_like(p.a))
    p.out["beta"].zero_()
    p.put("a", p.a), p.put("b", p.b)
    p.call.method, p.call.tol, p.call.rate = METHODS.index(method), 1e-4, 0.01
    p.call.max_iter = 12 if method == "adam" else 300
    checked(library.sparse_transport(p.call))
    p.guards.check()
    wide = [t.double() for t in (p.costs, p.a, p.b)]
    tol = 0.0 if method == "adam" else 1e-9
    options = {"k": p.k, "gamma": p.gamma, "method": method, "max_iter": 12 if method == "adam" else 500, "tol": tol}
    expected = REFERENCE["sparse_ot"](*wide, **options, lr=0.01)
    torch.testing.assert_close(p.out["value"].double(), expected[4], rtol=1e-5, atol=1e-6)
    assert (p.out["n_iter"] <= p.call.max_iter).all() and (p.out["column_error"] < (2e-4)).all()
    if method == "adam":
        torch.testing.assert_close(alpha.double(), expected[2], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(p.out["row_error"].double(), expected[5], rtol=1e-4, atol=1e-5)
    else:
        assert (p.out["row_error"] <= 1e-4).all() and (p.out["n_iter"] < 300).all()
        plans = [torch.zeros(*p.costs.shape).scatter_add(2, i, v.float()) for v, i in
                 ((p.out["values"], p.out["indices"]), expected[:2])]  # fmt: skip
        torch.testing.assert_close(*plans, rtol=1e-2, atol=3e-4)


# A long column is gathered above a hint from the evaluation before. It is too low where potentials jump up, too high
# where those of all rows that were taken fall (and the last 100 rise, which nobody took), and lies below what has mass
# where this is little.
@pytest.mark.parametrize(
    ("rate", "mass", "k"), [(1e-3, 500.0, 900), (5.0, 500.0, 900), (5.0, 3e5, 12000), (1e-3, 1e-3, 900)]
)
def test_what_was_known_of_long_columns_changes_nothing(library, rate, mass, k):
    p = Problem(1, 30000, 3, k)
    p.costs += (torch.arange(30000) // 10000 != torch.arange(3)[:, None]).float()
    p.costs[..., -100:] += 2.0
    a = torch.full_like(p.a, 1e-3)
    b = torch.full_like(p.b, mass)
    alpha = p.put("alpha", torch.zeros_like(a))
    p.put("costs", p.costs), p.put("a", a), p.put("b", b)
    p.call.method, p.call.max_iter, p.call.rate = METHODS.index("adam"), 3, rate
    checked(library.sparse_transport(p.call))
    p.guards.check()
    check_columns(p, alpha, b)


@pytest.mark.parametrize("method", METHODS)
def test_solve_of_long_columns(library, method):
    p = Problem(1, 26000, 3, 12000, gamma=20.0)
    alpha = p.put("alpha", torch.zeros_like(p.a))
    p.out["beta"].zero_()
    p.put("a", p.a), p.put("b", p.b)
    p.call.method, p.call.max_iter, p.call.tol, p.call.rate = METHODS.index(method), 3, 1e-4, 0.01
    checked(library.sparse_transport(p.call))
    p.guards.check()
    wide = [t.double() for t in (p.costs, p.a, p.b)]
    options = {"k": p.k, "gamma": p.gamma, "method": method, "max_iter": 3, "tol": 1e-4}
    expected = REFERENCE["sparse_ot"](*wide, **options, lr=0.01)
    torch.testing.assert_close(p.out["value"].double(), expected[4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.out["row_error"].double(), expected[5], rtol=1e-2, atol=1e-4)
    assert torch.equal(p.out["n_iter"], expected[8])
    if method == "adam":
        found = {name: tensor.clone() for name, tensor in p.out.items()}
        alpha.zero_()
        checked(library.sparse_transport(p.call))
        check_same(p.out, found)
