"""The CUDA kernels of sinkhorn, run on the emulator, against the reference in float64."""

import emulated
import pytest
import torch
from emulated import Guards, TransportCall, checked, pointer

from tilewise.reference.sinkhorn import OPS as REFERENCE

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")

COSTS = ("matrix", "sqeuclidean", "euclidean")
SIZES = {  # B, n, m, d
    "a pair a thread": (5, 1, 1, 2),
    "two blocks of threads": (130, 2, 3, 4),
    "a thread": (37, 3, 4, 2),
    "a thread, full": (33, 4, 4, 40),
    "8 lanes": (17, 7, 5, 3),
    "8 lanes, square": (3, 5, 5, 1),
    "16 lanes": (9, 9, 16, 3),
    "16 lanes, full": (11, 16, 16, 2),
    "17 rows": (2, 17, 5, 3),
    "a row each": (3, 32, 20, 3),
    "two rows each": (3, 40, 64, 5),
    "two rows each, full": (2, 64, 64, 2),
    "tiles": (2, 70, 130, 17),
    "tiles by products": (2, 70, 130, 35),
    "tiles by products, in parts": (1, 70, 66, 140),
    "tiles of no features": (2, 70, 130, 0),
    "a long row": (2, 1, 200, 3),
    "parts of rows": (1, 40, 2100, 2),
    "parts of columns": (2, 1030, 68, 2),
}
PARTS = ("parts of rows", "parts of columns")
OPTIONS = {
    "balanced": {},
    "unbalanced": {"rho_a": 0.7, "rho_b": 0.5},
    "one side": {"rho_b": 0.3},
    "falling epsilon": {"start": 2.0, "scaling": 0.6},
    "symmetric": {"symmetric": True},
}
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def library():
    return emulated.build()


class Problem:
    """A problem in guarded memory, and the same in float64."""

    def __init__(self, name, cost, symmetric=False, transposed=False):
        torch.manual_seed(0)
        self.batch, self.n, self.m, self.d = SIZES[name]
        self.m = self.n if symmetric else self.m
        self.cost = cost
        self.guards = Guards()
        a, b = (torch.rand(self.batch, size) + 0.1 for size in (self.n, self.m))
        if min(self.n, self.m) > 3:
            a[:, 1], b[:, -2:] = 0, 0
        a, b = (w / w.sum(1, keepdim=True) for w in (a, b))
        self.x, self.y = (torch.rand(self.batch, size, self.d) - 0.5 for size in (self.n, self.m))
        if symmetric:
            self.y, b = self.x, a
        self.a, self.b = a, b
        self.epsilon = 0.05 * 2 ** (torch.arange(self.batch) % 3)
        self.matrix = torch.rand(self.batch, self.n, self.m)
        if cost == "matrix" and min(self.n, self.m) > 3:
            self.matrix[:, 2, 3] = torch.inf
        self.call = TransportCall(cost=COSTS.index(cost), batch=self.batch, rows=self.n, columns=self.m)
        self.call.features, self.call.max_iter, self.call.scaling = self.d, 1, 0.5
        if cost == "matrix":
            strides = (self.n * self.m, 1, self.n) if transposed else None
            held = self.put(matrix=self.matrix, strides=strides)
            self.call.batch_stride, self.call.row_stride, self.call.column_stride = held.stride()
        else:
            self.put(x=self.x)
            self.put(y=self.y)
        for name in ("a", "b", "epsilon"):
            self.put(**{name: getattr(self, name)})

    def put(self, strides=None, **tensors):
        ((name, tensor),) = tensors.items()
        held = self.guards.put(tensor, strides=strides)
        setattr(self.call, name, pointer(held))
        return held

    def out(self, name, *shape, dtype=torch.float32):
        held = self.guards.empty(*shape, dtype=dtype)
        setattr(self.call, name, pointer(held))
        return held

    def wide(self):
        costs = (self.matrix,) if self.cost == "matrix" else (self.x, self.y)
        return [t.double() for t in (*costs, self.a, self.b, self.epsilon)]

    @property
    def kind(self):
        return {} if self.cost == "matrix" else {"cost": self.cost}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", SIZES)
def test_solve(library, name, cost, options):
    options = OPTIONS[options]
    symmetric = "symmetric" in options
    if symmetric and cost == "matrix":
        pytest.skip("a matrix has no symmetric form")
    if name in PARTS and cost != "matrix":
        pytest.skip("strips of points have no parts")
    p = Problem(name, cost, symmetric, transposed=name in ("tiles", "two rows each"))
    f, g = (0.1 * torch.randn_like(w) for w in (p.a, p.b))
    if symmetric:
        g = f
    start = torch.full_like(p.epsilon, options["start"]) if "start" in options else None
    held = [p.put(f=f), p.put(g=g)]
    if start is not None:
        p.put(start=start)
    for key in ("rho_a", "rho_b", "scaling"):
        setattr(p.call, key, options.get(key, 0.5 if key == "scaling" else 0.0))
    p.call.max_iter, p.call.tol, p.call.symmetric = 12, 1e-2, symmetric
    held += [p.out("value", p.batch), p.out("error", p.batch), p.out("n_iter", p.batch, dtype=torch.int64)]
    checked(library.transport_solve(p.call))
    p.guards.check()
    rest = {"rho_a": None, "rho_b": None, "scaling": 0.5} | {k: v for k, v in options.items() if k != "start"}
    starts = [f.double(), g.double(), None if start is None else start.double()]
    expected = REFERENCE["sinkhorn" if cost == "matrix" else "sinkhorn_points"](
        *p.wide(), *starts, max_iter=12, tol=1e-2, **p.kind, **rest
    )
    *numbers, n_iter = held
    assert torch.equal(n_iter, expected[4])
    for what, value, truth in zip(("f", "g", "value", "error"), numbers, expected, strict=False):
        torch.testing.assert_close(value.double(), truth, **TOLERANCE, msg=lambda m, of=what: f"{of}: {m}")


SMALL = [name for name, size in SIZES.items() if max(size[1:3]) <= 64]


@pytest.mark.parametrize("rho", [None, 0.7])
@pytest.mark.parametrize("name", ["a thread, full", "8 lanes", "16 lanes", "a row each", "two rows each", "tiles"])
def test_lines_without_a_pair(library, name, rho):
    """Their potentials are 0, and so is what they add to the value where they have no mass."""
    p = Problem(name, "matrix")
    p.matrix[1::2, 1], p.matrix[::3, :, 0] = torch.inf, torch.inf
    p.put(matrix=p.matrix)
    held = [p.put(f=torch.zeros_like(p.a)), p.put(g=torch.zeros_like(p.b))]
    p.call.max_iter, p.call.rho_a, p.call.rho_b = 6, rho or 0.0, rho or 0.0
    held += [p.out("value", p.batch), p.out("error", p.batch), p.out("n_iter", p.batch, dtype=torch.int64)]
    checked(library.transport_solve(p.call))
    p.guards.check()
    expected = REFERENCE["sinkhorn"](*p.wide(), max_iter=6, tol=0.0, rho_a=rho, rho_b=rho)
    for what, value, truth in zip(("f", "g", "value", "error", "n_iter"), held, expected, strict=True):
        torch.testing.assert_close(value.double(), truth.double(), **TOLERANCE, msg=lambda m, of=what: f"{of}: {m}")
    assert (held[0][1::2, 1] == 0).all() and (held[1][::3, 0] == 0).all()


@pytest.mark.parametrize("name", SMALL)
def test_bits_are_the_same_on_every_run(library, name):
    """Warps go in another order each time."""
    runs = []
    for _ in range(2):
        p = Problem(name, "matrix")
        found = [p.put(f=torch.zeros_like(p.a)), p.put(g=torch.zeros_like(p.b))]
        p.call.max_iter, p.call.rho_a = 5, 0.7
        found += [p.out("value", p.batch), p.out("error", p.batch), p.out("n_iter", p.batch, dtype=torch.int64)]
        checked(library.transport_solve(p.call))
        p.put(grad_f=torch.ones_like(p.a)), p.put(grad_g=torch.ones_like(p.b))
        for key, shape in {"cost": p.matrix.shape, "a": p.a.shape, "b": p.b.shape, "epsilon": p.epsilon.shape}.items():
            found.append(p.out(f"grad_{key}", *shape))
        checked(library.transport_unrolled(p.call))
        found.append(p.out("out", *p.matrix.shape))
        checked(library.transport_apply(p.call, 1))
        runs.append([t.clone() for t in found])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


APPLIED = ("two blocks of threads", "8 lanes", "16 lanes, full", "a row each", "two rows each", "tiles")


@pytest.mark.parametrize("values", [1, 16, 60, 70, 150])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", APPLIED)
def test_apply(library, name, cost, values):
    p = Problem(name, cost, transposed=name == "tiles")
    f, g = (0.1 * torch.randn_like(w) for w in (p.a, p.b))
    v = torch.randn(p.batch, p.m, values)
    for key, tensor in {"f": f, "g": g, "v": v}.items():
        p.put(**{key: tensor})
    weighted = cost != "matrix" and values == 16
    h, k = (torch.randn(p.batch, size, 40) if weighted else None for size in (p.n, p.m))
    if weighted:
        p.put(h=h), p.put(k=k)
        p.call.weights = 40
        p.call.over_distance = cost == "euclidean"
        p.call.a = None
    p.call.values = values
    out = p.out("out", p.batch, p.n, values)
    checked(library.transport_apply(p.call, 0))
    p.guards.check()
    arguments = [*p.wide(), f.double(), g.double(), v.double()]
    if weighted:
        arguments[2] = None
        arguments += [h.double(), k.double()]
    extra = {"over_distance": True} if weighted and cost == "euclidean" else {}
    expected = REFERENCE["sinkhorn_apply" if cost == "matrix" else "sinkhorn_points_apply"](
        *arguments, **p.kind, **extra
    )
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)


def to_tf32(x):
    """To the nearest number with 10 bits behind the point."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa.abs() * 2**11 + 0.5).floor().copysign(x), exponent - 11)


@pytest.mark.parametrize("name", ["tiles by products", "tiles by products, in parts"])
def test_products_of_tf32(library, name):
    """Coordinates are rounded in the products alone: as the problem whose costs are so formed."""
    p = Problem(name, "sqeuclidean")
    held = [p.put(f=torch.zeros_like(p.a)), p.put(g=torch.zeros_like(p.b))]
    p.call.max_iter, p.call.tol, p.call.allow_tf32 = 12, 1e-6, True
    held += [p.out("value", p.batch), p.out("error", p.batch)]
    p.out("n_iter", p.batch, dtype=torch.int64)
    checked(library.transport_solve(p.call))
    p.guards.check()
    x, y, *problem = p.wide()
    squares = (x * x).sum(2)[:, :, None] + (y * y).sum(2)[:, None]
    costs = squares - 2 * to_tf32(x) @ to_tf32(y).mT
    expected = REFERENCE["sinkhorn"](costs, *problem, max_iter=12, tol=1e-6)
    exact = REFERENCE["sinkhorn"](squares - 2 * x @ y.mT, *problem, max_iter=12, tol=1e-6)
    for value, truth in zip(held, expected, strict=False):
        torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-5)
    assert (held[0].double() - exact[0]).abs().max() > 1e-4


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [name for name in SIZES if name != "tiles of no features"])
def test_plan(library, name, transposed):
    p = Problem(name, "matrix", transposed=transposed)
    f, g = (0.1 * torch.randn_like(w) for w in (p.a, p.b))
    p.put(f=f), p.put(g=g)
    out = p.out("out", p.batch, p.n, p.m)
    checked(library.transport_apply(p.call, 1))
    p.guards.check()
    expected = REFERENCE["sinkhorn_plan"](*p.wide(), f.double(), g.double())
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("options", ["balanced", "unbalanced", "one side"])
@pytest.mark.parametrize("name", SMALL)
def test_unrolled(library, name, options):
    options = OPTIONS[options]
    p = Problem(name, "matrix", transposed=name == "two rows each")
    upstream = {"grad_f": torch.randn_like(p.a), "grad_g": torch.randn_like(p.b)}
    for key, tensor in upstream.items():
        p.put(**{key: tensor})
    p.call.max_iter, p.call.rho_a, p.call.rho_b = 5, options.get("rho_a", 0.0), options.get("rho_b", 0.0)
    found = [
        p.out("grad_cost", p.batch, p.n, p.m),
        p.out("grad_a", p.batch, p.n),
        p.out("grad_b", p.batch, p.m),
        p.out("grad_epsilon", p.batch),
    ]
    checked(library.transport_unrolled(p.call))
    p.guards.check()
    cost, *rest = p.wide()  # autograd multiplies an infinite cost by 0
    expected = REFERENCE["sinkhorn_unrolled_backward"](
        *(t.double() for t in upstream.values()), cost.nan_to_num(posinf=1e6), *rest, max_iter=5, **options
    )
    for what, value, truth in zip(("cost", "a", "b", "epsilon"), found, expected, strict=True):
        scale = truth.abs().max().clamp(min=0.1)  # of one pair some are 0
        torch.testing.assert_close(
            value.double() / scale, truth / scale, rtol=2e-4, atol=2e-5, msg=lambda m, of=what: f"{of}: {m}"
        )


@pytest.mark.parametrize("name", ["8 lanes", "tiles"])
def test_a_nan_is_not_lost(library, name):
    """A GPU's values are not looked at before: a NaN in the costs is one in the results of its problem."""
    p = Problem(name, "matrix")
    p.matrix[1, 3, 2] = torch.nan
    p.put(matrix=p.matrix)
    p.put(f=torch.zeros_like(p.a)), p.put(g=torch.zeros_like(p.b))
    p.call.max_iter = 4
    value, error = p.out("value", p.batch), p.out("error", p.batch)
    n_iter = p.out("n_iter", p.batch, dtype=torch.int64)
    checked(library.transport_solve(p.call))
    assert value[1].isnan() and error[1].isnan() and value[0].isfinite() and (n_iter == 4).all()
