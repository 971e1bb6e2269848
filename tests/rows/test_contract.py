"""What every loss of rows of logits keeps on every backend: each check for each operator of row_operators.py."""

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import (
    BACKEND,
    DEVICE,
    DTYPES,
    INTERPRETED,
    NATIVE_CPU,
    SHAPES,
    Case,
    Operator,
    check_against_reference,
    logits_of,
    soft_targets,
    to,
    value_and_gradient,
)
from row_operators import OPERATORS
from torch import Tensor

from tilewise.testing import allocated_bytes, class_targets


def cases_of(chosen):
    pairs = [(op, case) for op in OPERATORS for case in chosen(op)]
    return pytest.mark.parametrize("op, case", pairs, ids=[f"{op.name}-{case.name}" for op, case in pairs])


EACH_OPERATOR = pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
EACH_CASE = cases_of(lambda op: op.cases)
FIRST_AND_LAST_CASES = cases_of(lambda op: dict.fromkeys((op.cases[0], op.cases[-1])))


def options_of(op: Operator, case: Case, n: int, v: int) -> dict:
    return {**op.required, **case.options(n, v)}


def target_of(case: Case, n: int, v: int, dtype: torch.dtype, ignored: float = 0.2) -> Tensor:
    return soft_targets(n, v, dtype) if case.soft else class_targets(n, v, ignored=ignored if n > 1 else 0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@EACH_CASE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(op, shape, dtype, case):
    n, v = shape if shape[1] < 50257 or case is op.cases[0] else (4, shape[1])
    target = target_of(case, n, v, dtype)
    check_against_reference(
        op, logits_of("random", target[:, 0] if case.soft else target, v, dtype), target, options_of(op, case, n, v)
    )


@EACH_OPERATOR
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["confident", "masked", "huge", "rising", "jump"])
def test_hard_rows(op, kind, dtype):
    if op.polynomial and (kind == "masked" or (kind in ("huge", "rising", "jump") and dtype == torch.float16)):
        pytest.skip("-inf, or squares beyond float16's range, in a loss of the row's sum of squares")
    n, v = 8, 20011
    target = class_targets(n, v if kind in ("confident", "masked", "huge") else 10, ignored=0.1)
    if kind in ("rising", "jump"):  # a small loss: the target is among the largest
        target = torch.where(target >= 0, v - 1 - target, target)
    check_against_reference(op, logits_of(kind, target, v, dtype), target, dict(op.required))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@EACH_CASE
def test_reductions(op, case, reduction):
    target = target_of(case, 7, 33, torch.float32)
    logits = 3 * torch.randn(7, 33)
    options = options_of(op, case, 7, 33) | {"reduction": reduction}
    grad = torch.randn(7) if reduction == "none" else torch.tensor(-1.7)
    ours = value_and_gradient(op.call, logits.to(DEVICE), target.to(DEVICE), grad.to(DEVICE), **to(DEVICE, options))
    wide = target.double() if case.soft else target
    truth = value_and_gradient(op.reference, logits.double(), wide, grad, **to(torch.float64, options))
    for value, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-6)


@EACH_CASE
@pytest.mark.parametrize("layout", ["transposed", "sliced", "step 2", "row stride", "broadcast"])
def test_strides(op, layout, case):
    base = torch.randn(64, 64, device=DEVICE)
    logits = {
        "transposed": base.t()[:9, :40],
        "sliced": base[:9, 3:43],
        "step 2": base[:9, ::2],
        "row stride": base[::5, :40],
        "broadcast": base[:1, :40].expand(9, 40),
    }[layout]
    n, v = logits.shape
    target = target_of(case, n, v, torch.float32).to(DEVICE)
    options = to(DEVICE, options_of(op, case, n, v))
    ours = value_and_gradient(op.call, logits, target, **options)
    packed = value_and_gradient(op.call, logits.contiguous(), target, **options)
    torch.testing.assert_close(ours, packed, rtol=1e-6, atol=1e-7)


@EACH_OPERATOR
def test_gradient_is_contiguous_and_typed(op):
    for dtype in DTYPES:
        logits = torch.randn(33, 9, device=DEVICE, dtype=dtype).t().requires_grad_()
        op(logits, class_targets(9, 33, device=DEVICE)).backward()
        assert logits.grad.dtype == dtype and logits.grad.shape == (9, 33)


@EACH_CASE
def test_one_class(op, case):
    """The gradient is a difference of equal terms: its error is absolute, one rounding of a term."""
    target = target_of(case, 3, 1, torch.float32, ignored=0)
    logits, options = 3 * torch.randn(3, 1), options_of(op, case, 3, 1)
    ours = value_and_gradient(op.call, logits.to(DEVICE), target.to(DEVICE), **to(DEVICE, options))
    wide = target.double() if case.soft else target
    truth = value_and_gradient(op.reference, logits.double(), wide, **to(torch.float64, options))
    for value, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=2e-7)


@EACH_OPERATOR
def test_no_rows(op):
    logits = torch.randn(0, 5, device=DEVICE, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for reduction in ("mean", "sum"):
        loss = op(logits, target, reduction=reduction)
        assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.shape == (0, 5)
    assert op(logits, target, reduction="none").shape == (0,)


@EACH_OPERATOR
def test_all_rows_ignored(op):
    logits = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    target = torch.full((4,), -100, device=DEVICE)
    for reduction in ("mean", "sum"):
        loss = op(logits, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and gradient.count_nonzero() == 0


@EACH_OPERATOR
def test_ignored_rows_are_not_read(op):
    logits = torch.randn(5, 40, device=DEVICE)
    logits[2] = torch.nan
    target = torch.tensor([1, 2, -100, 4, 5], device=DEVICE)
    loss, gradient = value_and_gradient(op, logits, target)
    kept = [0, 1, 3, 4]
    expected = value_and_gradient(op, logits[kept], target[kept])
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient[kept], expected[1])
    assert gradient[2].count_nonzero() == 0


@EACH_OPERATOR
def test_custom_ignore_index(op):
    logits = torch.randn(4, 5, device=DEVICE)
    target = torch.tensor([0, 3, 3, 1], device=DEVICE)
    ours = value_and_gradient(op, logits, target, ignore_index=3)
    expected = value_and_gradient(op, logits[[0, 3]], target[[0, 3]])
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1][[0, 3]], expected[1])


@EACH_OPERATOR
def test_stride_zero_upstream(op):
    logits = torch.randn(6, 9, device=DEVICE, requires_grad=True)
    target = class_targets(6, 9, device=DEVICE)
    rows = op(logits, target, reduction="none")
    (expanded,) = torch.autograd.grad(rows.sum(), logits, retain_graph=True)
    (dense,) = torch.autograd.grad(rows, logits, torch.ones(6, device=DEVICE))
    torch.testing.assert_close(expanded, dense, rtol=0, atol=0)


@EACH_OPERATOR
def test_every_output_is_written(op):
    """Deterministic mode fills fresh memory with NaN: an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in DTYPES:
            logits = torch.randn(5, 1037, device=DEVICE).to(dtype)
            loss, gradient = value_and_gradient(op, logits, class_targets(5, 1037, device=DEVICE, ignored=0.3))
            assert loss.isfinite().all() and gradient.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@EACH_OPERATOR
def test_same_bits_every_time(op):
    logits = torch.randn(65, 1500, device=DEVICE)
    target = class_targets(65, 1500, device=DEVICE)
    first = value_and_gradient(op, logits, target)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = value_and_gradient(op, logits, target)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EACH_OPERATOR
@pytest.mark.skipif(BACKEND == "reference", reason="the reference holds the big matrix")
def test_memory(op):
    """The forward keeps O(N); the backward allocates the gradient and a few rows."""
    n, v = 64, 2048
    logits = torch.randn(n, v, device=DEVICE, requires_grad=True)
    target = class_targets(n, v, device=DEVICE)
    loss = op(logits, target)
    spare = 4096 if DEVICE == "cuda" else 0  # the allocator's granularity
    assert allocated_bytes(lambda: op(logits, target), DEVICE) <= 4 * n * (op.state_per_row + 2) + 16 + spare
    backward = allocated_bytes(lambda: torch.autograd.grad(loss, logits, retain_graph=True), DEVICE)
    assert 4 * n * v <= backward <= 4 * n * v + 16 + spare


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@EACH_CASE
def test_gradcheck(op, case):
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    target = target_of(case, 5, 9, torch.float64)
    options = to(torch.float64, options_of(op, case, 5, 9))
    assert torch.autograd.gradcheck(lambda x: op.call(x, target, reduction="none", **options), logits)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
@FIRST_AND_LAST_CASES
def test_compile_and_export(op, case):
    options = to(DEVICE, options_of(op, case, 6, 12))

    def step(logits, target):
        return op.call(logits * 2, target, **options)

    torch._dynamo.reset()  # the cases share one code object, whose recompilations are limited
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (6, 11):
        if n != 6 and any(isinstance(o, Tensor) and len(o) == 6 for o in options.values()):
            continue  # a per-row option fixes the number of rows
        logits = torch.randn(n, 12, device=DEVICE)
        target = target_of(case, n, 12, torch.float32).to(DEVICE)
        torch.testing.assert_close(
            value_and_gradient(compiled, logits, target), value_and_gradient(step, logits, target)
        )

    class Step(torch.nn.Module):
        def forward(self, logits, target):
            return step(logits, target)

    logits, target = torch.randn(6, 12, device=DEVICE), target_of(case, 6, 12, torch.float32).to(DEVICE)
    exported = torch.export.export(Step(), (logits, target)).module()
    torch.testing.assert_close(exported(logits, target), step(logits, target))


@EACH_OPERATOR
def test_autocast(op):
    """Under autocast nothing is cast: statistics are float32 already."""
    logits, target = torch.randn(6, 40, device=DEVICE), class_targets(6, 40, device=DEVICE)
    expected = value_and_gradient(op, logits.bfloat16(), target)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = value_and_gradient(op, logits.bfloat16(), target)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, expected, strict=True))


@EACH_OPERATOR
def test_out_of_range_target(op):
    logits = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    for bad in (5, -1, 2**40, -(2**40)):
        target = torch.tensor([0, bad, 2, 3], device=DEVICE)
        if DEVICE == "cpu" and BACKEND != "triton":
            with pytest.raises(RuntimeError, match=rf"tilewise\.{op.name}: .*target\[1\].* got {bad}"):
                op(logits, target)
            continue
        loss = op(logits, target, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().tolist() == [False, True, False, False]
        assert gradient[1].isnan().all() and gradient[[0, 2, 3]].isfinite().all()


@EACH_OPERATOR
@pytest.mark.parametrize(
    "logits, target, error, message",
    [
        (torch.randn(3, 4, 5), torch.zeros(3).long(), ValueError, r"logits to be 2-D, got shape \(3, 4, 5\)"),
        (torch.randn(3, 0), torch.zeros(3).long(), ValueError, r"at least one class, got shape \(3, 0\)"),
        (torch.ones(3, 4).long(), torch.zeros(3).long(), TypeError, r"logits to be float.*got torch.int64"),
        (torch.randn(3, 4), torch.zeros(4).long(), ValueError, r"target to have shape \(3,\), got \(4,\)"),
        (torch.randn(3, 4), torch.zeros(3, 1).long(), ValueError, r"target to have shape \(3,\), got \(3, 1\)"),
        (torch.randn(3, 4), [0, 1, 2], TypeError, "target to be a tensor, got list"),
        ([[0.0]], torch.zeros(1).long(), TypeError, "logits to be a tensor, got list"),
        (torch.randn(3, 4), torch.zeros(3, dtype=torch.bool), TypeError, "got torch.bool"),
    ],
)
def test_bad_arguments(op, logits, target, error, message):
    def place(value):
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    with pytest.raises(error, match=rf"^tilewise\.{op.name}: expected .*{message}"):
        op(place(logits), place(target))


@EACH_OPERATOR
def test_bad_reduction(op):
    with pytest.raises(ValueError, match=rf"tilewise\.{op.name}: .*'none', 'mean' or 'sum', got 'median'"):
        op(torch.randn(3, 4, device=DEVICE), torch.zeros(3, device=DEVICE).long(), reduction="median")


@EACH_OPERATOR
def test_narrow_integer_targets(op):
    logits = torch.randn(4, 5, device=DEVICE)
    target = torch.tensor([0, 4, 2, 1], device=DEVICE)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(op(logits, target.to(dtype)), op(logits, target))
