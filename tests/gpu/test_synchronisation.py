"""No operator waits for the GPU, so that a CUDA graph can capture it: what waits is searched for in the sources, and
each place where it may is named with its reason. What indexes with a mask waits too, and is not seen here."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pysrc"
if not (ROOT / "csrc").exists():
    pytest.skip("the sources are not part of an installed tilewise", allow_module_level=True)

# Functions of a tensor that give numbers of Python, or a shape that depends on values; and what waits by itself.
WAITING = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "argwhere",
    "unique",
    "masked_select",
    "synchronize",
    "bincount",
}
REDUCED = {"any", "all", "sum", "max", "min", "amax", "amin", "mean", "count_nonzero", "isfinite", "equal", "allclose"}
NUMBERS = {"bool", "int", "float"}

# function -> why it may wait
ALLOWED = {
    "formulas/lbfgs.py Asked.any": "callers go on without an answer where `can` is false: in a capture",
    "formulas/rows.py split_target": "on a CPU alone",
    "nn/factored_spherical_output.py _Loss.forward": "on a CPU alone",
    "nn/factored_spherical_output.py FactoredSphericalOutput._stabilize": "each tenth step an SVD decides what it does",
    "nn/wta_crs.py set_sample_ids": "on a CPU alone",
    "ops/sparse_ot_points.py _check_values": "on a CPU alone",
    "ops/transport.py finished": "on a CPU alone",
    "ops/transport.py implicit": "after an answer, which there is none of while a graph is captured",
    "ops/transport.py SinkhornResult.__repr__": "a text for people",
    "ops/mining.py *": "pairs are lists as long as there are pairs",
    "nn/pairwise.py *": "pairs of a miner, as above",
    "distributed.py *": "sizes are exchanged before tensors are",
    "testing/*": "for tests of those who use it",
    "ops/sparse_ot.py SparseOTResult.__repr__": "a text for people",
}


class Finder(ast.NodeVisitor):
    """Names of functions that wait, with the line and what waits there."""

    def __init__(self):
        self.scope: list[str] = []
        self.found: list[tuple[str, int, str]] = []

    def within(self, node):
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_FunctionDef = visit_ClassDef = within

    def note(self, node: ast.AST):
        self.found.append((".".join(self.scope), node.lineno, ast.unparse(node)[:60]))

    def visit_Call(self, node: ast.Call):
        name = method(node)
        is_number = isinstance(node.func, ast.Name) and node.func.id in NUMBERS and node.args
        if name in WAITING or (is_number and gives_tensor(node.args[0])):
            self.note(node)
        self.generic_visit(node)

    def visit_condition(self, node):
        for part in terms(node.test):
            if method(part) in REDUCED and gives_tensor(part):
                self.note(part)
        self.generic_visit(node)

    visit_If = visit_While = visit_IfExp = visit_Assert = visit_condition


def method(node: ast.AST) -> str | None:
    """x.name(..)"""
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None


def terms(condition: ast.AST) -> list[ast.AST]:
    """What a condition asks: without and, or, not."""
    if isinstance(condition, ast.BoolOp):
        return [term for value in condition.values for term in terms(value)]
    return terms(condition.operand) if isinstance(condition, ast.UnaryOp) else [condition]


def gives_tensor(node: ast.AST) -> bool:
    """Whether it looks like a reduction of a tensor, or a part of one: builtins and shapes do not."""
    if method(node) in REDUCED:
        return ast.unparse(node.func.value) != "asked"  # of formulas/lbfgs.py, which is looked at itself
    return isinstance(node, ast.Subscript) and gives_tensor(node.value)


def waits(source: str) -> list[tuple[str, int, str]]:
    finder = Finder()
    finder.visit(ast.parse(source))
    return finder.found


def reason_for(name: str, function: str, allowed: dict[str, str]) -> str | None:
    """The key in `allowed` that lets this function wait."""
    folder = name.split("/")[0]
    return next((key for key in (f"{name} {function}", f"{name} *", f"{folder}/*") if key in allowed), None)


def test_python_waits_nowhere_else():
    wrong, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("reference/"):
            continue
        for function, line, what in waits(path.read_text()):
            key = reason_for(name, function, ALLOWED)
            used.add(key)
            if key is None:
                wrong.append(f"pysrc/{name}:{line}, {function}: {what}")
    assert not wrong, "\n".join(wrong)
    assert set(ALLOWED) - used == set()


PLANTED = {
    "x.sum().item()": "x.sum().item()",
    "if going.any():\n  pass": "going.any()",
    "while k < 3 and not (x > 0).all():\n  pass": "(x > 0).all()",
    "n = int(x.max())": "int(x.max())",
    "y = bool(x.any(1)[0])": "bool(x.any(1)[0])",
    "torch.cuda.synchronize()": "torch.cuda.synchronize()",
    "i = torch.nonzero(x)": "torch.nonzero(x)",
    "y = 1 if x.equal(z) else 0": "x.equal(z)",
}


@pytest.mark.parametrize(("source", "expected"), PLANTED.items())
def test_what_waits_is_found(source, expected):
    code = "def f(x):\n" + "\n".join(f"  {line}" for line in source.splitlines())
    [(function, line, what)] = waits(code)
    assert (function, line, what) == ("f", 2, expected)
    assert reason_for("ops/new.py", "f", ALLOWED) is None


@pytest.mark.parametrize(
    "source", ["x = y.any(1)", "if any(p):\n  pass", "n = int(len(x))", "x = torch.where(a.all(1), b, c)"]
)
def test_what_does_not_wait_is_not_found(source):
    assert waits(source) == []


# ---- C++

HOST = re.compile(
    r"cuda\w*Synchronize|cudaMemcpy(?!\w*Async)\w*|cudaMemset(?!\w*Async)\w*|cudaMalloc\w*|cudaFree\w*|_local_scalar_dense|"
    r"aoti_torch_item|\bto_cpu\b|\.item<"
)


def waits_on_host(text: str) -> list[str]:
    """What waits for the GPU, or allocates apart from PyTorch, in C++ without its comments."""
    return HOST.findall(re.sub(r"//[^\n]*", "", text))


def test_cpp_waits_nowhere():
    sources = [path for pattern in ("*.cu", "*.cuh", "*.h", "*.cpp") for path in ROOT.glob(f"csrc/**/{pattern}")]
    assert len(sources) > 50
    assert {path.name: found for path in sources if (found := waits_on_host(path.read_text()))} == {}


def test_what_waits_in_cpp_is_found():
    text = "cudaStreamSynchronize(s); // cudaDeviceSynchronize()\ncudaMemcpy(a, b, n); cudaMemcpyAsync(a, b, n, k, s);"
    assert waits_on_host(text) == ["cudaStreamSynchronize", "cudaMemcpy"]
