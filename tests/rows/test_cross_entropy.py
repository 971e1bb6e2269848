"""cross_entropy, what is its own: options, statistics, second derivatives, invariances."""

import contract
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU, soft_targets
from row_operators import CROSS_ENTROPY

import tilewise
from tilewise.reference.cross_entropy import cross_entropy as reference
from tilewise.testing import class_targets, masked_logits, relative_error


def example(n=6, v=40, dtype=torch.float32):
    torch.manual_seed(1)
    return (3 * torch.randn(n, v)).to(DEVICE, dtype), class_targets(n, v, ignored=0.2, device=DEVICE)


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equals_torch_in_float64(soft, weighted, smoothing, reduction):
    logits, target = example(dtype=torch.float64)
    target = soft_targets(6, 40, torch.float64) if soft else target
    weight = torch.rand(40, dtype=torch.float64) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    ours = contract.value_and_gradient(tilewise.cross_entropy, logits, target, weight=weight, **options)
    theirs = contract.value_and_gradient(F.cross_entropy, logits, target, weight=weight, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_confident_rows_keep_the_gradient():
    """p - 1 of a bfloat16 row with p = 0.999: rounding p before subtracting loses all of it."""
    target = torch.arange(8, device=DEVICE)
    logits = torch.zeros(8, 1000, device=DEVICE)
    logits[target, target] = torch.tensor(13.8)
    logits = logits.bfloat16()
    _, gradient = contract.value_and_gradient(tilewise.cross_entropy, logits, target, reduction="sum")
    _, expected = contract.value_and_gradient(
        CROSS_ENTROPY.reference, logits.cpu().double(), target.cpu(), reduction="sum"
    )
    assert relative_error(gradient, expected) < 4e-3
    assert (expected[0, 0] > -2e-3) and (expected[0, 0] < 0)


def test_statistics():
    logits, target = example(v=1037)
    logits[1, 5:9] = logits.max() + 1  # a tie: the lowest index wins
    _, stats = tilewise.cross_entropy(logits, target, return_stats=True)
    p = torch.softmax(logits.double(), 1)
    torch.testing.assert_close(stats.lse.double(), torch.logsumexp(logits.double(), 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.entropy.double(), -(p * p.log()).sum(1), rtol=2e-6, atol=2e-6)
    assert torch.equal(stats.argmax, logits.argmax(1)) and stats.argmax[1] == 5
    assert torch.equal(stats.correct, logits.argmax(1) == target)


def test_row_state():
    """What the backward stands on: the row's own maximum, log sum exp(x - max) and sum of target coefficients."""
    torch.manual_seed(3)
    logits, weight = contract.logits_of("rising", torch.zeros(5), 2100, torch.float32), torch.rand(2100)
    target = torch.tensor([5, 2099, 7, 1000, 2050])
    _, state = torch.ops.tilewise.cross_entropy(
        logits.to(DEVICE), target.to(DEVICE), weight.to(DEVICE), label_smoothing=0.25
    )
    top = logits.max(1).values
    mass = 0.75 * weight[target] + 0.25 * weight.mean()
    expected = torch.stack([top, torch.logsumexp(logits.double() - top[:, None], 1).float(), mass])
    torch.testing.assert_close(state[:-1].view(3, 5).cpu(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state[-1].cpu(), weight[target].sum())


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 20.0, "return_stats": True}])
def test_few_long_rows(options):
    """Rows that several blocks of a GPU share: one of all classes, one with ties, one whose last class decides."""
    torch.manual_seed(2)
    v = 140_001
    logits = 3 * torch.randn(3, v)
    logits[1, 40_000:] = 25.0
    logits[2, -1] = 60.0
    target = torch.tensor([70_000, 139_999, 12])
    result = tilewise.cross_entropy(logits.to(DEVICE), target.to(DEVICE), reduction="none", **options)
    loss, stats = result if options.get("return_stats") else (result, None)
    x = logits.double()
    if "softcap" in options:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    expected = F.cross_entropy(x, target, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    if stats is not None:
        p = torch.softmax(x, 1)
        torch.testing.assert_close(stats.entropy.double().cpu(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-5)
        assert stats.argmax.tolist() == [int(x[0].argmax()), 40_000, v - 1]


def test_statistics_with_masked_classes_and_probability_targets():
    logits, _ = example()
    logits[:, ::3] = -torch.inf
    target = soft_targets(6, 40).to(DEVICE)
    target[:, ::3] = 0
    loss, stats = tilewise.cross_entropy(logits, target, return_stats=True)
    p = torch.softmax(logits, 1)
    torch.testing.assert_close(stats.entropy, -torch.special.xlogy(p, p).sum(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.correct, logits.argmax(1) == target.argmax(1))
    assert loss.isfinite()


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_differentiable(masked):
    logits, target = example()
    if masked:
        logits = masked_logits(target.cpu(), 40, torch.float32).to(DEVICE)
    logits = logits.requires_grad_()

    def total(stats_of):
        loss, lse, entropy = stats_of()
        return 0.3 * loss + (lse * torch.linspace(1, 2, 6).to(lse)).sum() + (entropy * 0.7).sum()

    def ours():
        loss, stats = tilewise.cross_entropy(logits, target, return_stats=True)
        return loss, stats.lse, stats.entropy

    (gradient,) = torch.autograd.grad(total(ours), logits)
    wide = logits.detach().double().cpu().requires_grad_()
    result = reference(wide, target.cpu())
    (expected,) = torch.autograd.grad(total(lambda: result[:3]), wide)
    assert relative_error(gradient, expected) < 2e-6
    _, stats = tilewise.cross_entropy(logits, target, return_stats=True)
    assert not stats.argmax.requires_grad and not stats.correct.requires_grad
    (only_lse,) = torch.autograd.grad(stats.lse.sum(), logits)
    torch.testing.assert_close(only_lse, torch.softmax(logits.detach(), 1), rtol=2e-5, atol=1e-7)


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("soft", [False, True])
def test_second_derivative(soft):
    torch.manual_seed(2)
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    target = soft_targets(4, 7, torch.float64) if soft else torch.tensor([1, -100, 3, 6])
    weight, row_weight = torch.rand(7, dtype=torch.float64), torch.rand(4, dtype=torch.float64)

    def function(logits):
        loss, stats = tilewise.cross_entropy(
            logits, target, weight, row_weight=row_weight, label_smoothing=0.1, lse_square_scale=0.1, softcap=3.0,
            logit_scale=1.3, return_stats=True
        )  # fmt: skip
        return loss, stats.lse, stats.entropy

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_hessian_vector_product_in_float32():
    logits, target = example()
    logits = logits.requires_grad_()
    v = torch.randn_like(logits)
    (gradient,) = torch.autograd.grad(tilewise.cross_entropy(logits, target), logits, create_graph=True)
    (product,) = torch.autograd.grad(gradient, logits, v)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), logits, create_graph=True)
    (expected,) = torch.autograd.grad(expected, logits, v)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="opcheck traces; the interpreter is NumPy")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(soft, reduction):
    logits, target = example(4, 7)
    target = soft_targets(4, 7).to(DEVICE) if soft else target
    weight, row_weight = torch.rand(7, device=DEVICE), torch.rand(4, device=DEVICE)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 3.0, "logit_scale": 2.0}
    options |= {"ignore_index": -100, "reduction": reduction}
    ops, given = torch.ops.tilewise, (target, weight, row_weight)
    for leaf in (logits, logits.clone().requires_grad_()):
        torch.library.opcheck(ops.cross_entropy.default, (leaf, *given), options)
        torch.library.opcheck(ops.cross_entropy_with_stats.default, (leaf, *given), options)
    loss, state, lse, entropy, _ = ops.cross_entropy_with_stats(logits, *given, **options)
    grads = (torch.ones_like(loss), torch.ones_like(lse), torch.ones_like(lse))
    arguments = (*grads, logits, *given, entropy, state)
    torch.library.opcheck(ops.cross_entropy_backward.default, arguments, options)
    torch.library.opcheck(ops.cross_entropy_backward_.default, arguments, options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing to be a finite number in \[0, 1\], got 1.5"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing to be a finite number"),
        ({"softcap": 0.0}, ValueError, "softcap to be a finite number above 0, got 0.0"),
        ({"lse_square_scale": float("inf")}, ValueError, "lse_square_scale to be a finite number, got inf"),
        ({"weight": torch.ones(4)}, ValueError, r"weight to have shape \(5,\), got \(4,\)"),
        ({"weight": 0.5}, TypeError, "weight to be a tensor or None, got float"),
        ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "weight not to require a gradient"),
        ({"row_weight": torch.ones(5)}, ValueError, r"row_weight to have shape \(3,\), got \(5,\)"),
    ],
)
def test_bad_options(options, error, message):
    options = {k: v.to(DEVICE).detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
               for k, v in options.items()}  # fmt: skip
    with pytest.raises(error, match=f"tilewise.cross_entropy: expected {message}"):
        tilewise.cross_entropy(torch.randn(3, 5, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE), **options)


def test_bad_probability_targets():
    logits = torch.randn(3, 5, device=DEVICE)
    with pytest.raises(ValueError, match="ignore_index does not apply to target probabilities, got 1"):
        tilewise.cross_entropy(logits, soft_targets(3, 5).to(DEVICE), ignore_index=1)
    with pytest.raises(ValueError, match=r"target probabilities to have shape \(3, 5\) like logits, got \(3, 4\)"):
        tilewise.cross_entropy(logits, soft_targets(3, 4).to(DEVICE))
    with pytest.raises(ValueError, match="target not to require a gradient"):
        tilewise.cross_entropy(logits, soft_targets(3, 5).to(DEVICE).requires_grad_())


@pytest.mark.skipif(BACKEND not in ("cpu", "cuda"), reason="the message comes from the compiled binding")
def test_the_operator_checks_what_it_is_given():
    """torch.ops callers skip the public function: nothing may be read out of bounds."""
    op = torch.ops.tilewise.cross_entropy
    logits, target = torch.randn(3, 5, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    for arguments, message in [
        ((logits[0], target), r"expected logits to be 2-D, got shape \(5,\)"),
        ((logits, target[:2]), r"expected target to have shape \(3,\), got \(2,\)"),
        ((logits, target, torch.ones(4, device=DEVICE)), r"expected weight to have shape \(5,\), got \(4,\)"),
        ((logits, target, torch.ones(5, device=DEVICE).double()), "expected weight to have dtype Float, got Double"),
        ((logits, target, None, torch.ones(6, device=DEVICE)[::2]), "expected row_weight to be contiguous"),
        ((logits, target.int()), r"expected target to have shape \(3, 5\), got \(3,\)"),
    ]:
        with pytest.raises(RuntimeError, match=rf"^tilewise\.cross_entropy: {message}"):
            op(*arguments)
    for options, message in [
        ({"label_smoothing": 1.5}, r"expected label_smoothing in \[0, 1\], got 1.5"),
        ({"softcap": -1.0}, "expected softcap above 0, got -1"),
        ({"reduction": "median"}, "expected reduction to be 'none', 'mean' or 'sum', got 'median'"),
    ]:
        with pytest.raises(RuntimeError, match=rf"^tilewise\.cross_entropy: {message}"):
            op(logits, target, **options)


@pytest.mark.skipif(NATIVE_CPU, reason="on the CPU a class that does not exist raises")
def test_a_batch_of_unknown_classes_is_not_an_empty_batch():
    """Class weight 0 or not, its mean is NaN: only ignored rows may make the denominator 0 and the mean 0."""
    logits, target = torch.randn(3, 5, device=DEVICE), torch.tensor([5, -1, -100], device=DEVICE)
    assert tilewise.cross_entropy(logits, target, torch.zeros(5, device=DEVICE)).isnan()
    assert tilewise.cross_entropy(logits, target).isnan()


def test_module_equals_function():
    logits, target = example()
    weight = torch.rand(40, device=DEVICE)
    module = tilewise.nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum")
    assert torch.equal(module(logits, target), tilewise.cross_entropy(logits, target, weight, label_smoothing=0.1,
                                                                      reduction="sum"))  # fmt: skip
    assert "weight" in module.state_dict() and "label_smoothing=0.1" in repr(module)


@pytest.mark.skipif(BACKEND != "cpu", reason="4.3 GB of zero pages exist only in the CPU's memory")
def test_more_than_2_31_elements():
    contract.check_more_than_2_31_elements(tilewise.cross_entropy)


@hypothesis.settings(max_examples=10 if INTERPRETED else 40, deadline=None)
@hypothesis.given(n=st.integers(1, 5), v=st.integers(2, 70), seed=st.integers(0, 2**20), shift=st.floats(-50, 50))
def test_invariances(n, v, seed, shift):
    """Shifting a row changes neither loss nor gradient; permuting the classes permutes the gradient; it sums to 0."""
    torch.manual_seed(seed)
    logits, target = torch.randn(n, v, device=DEVICE), class_targets(n, v, device=DEVICE)
    order = torch.randperm(v, device=DEVICE)
    loss, gradient = contract.value_and_gradient(tilewise.cross_entropy, logits, target)
    shifted = contract.value_and_gradient(tilewise.cross_entropy, logits + shift, target)
    permuted = contract.value_and_gradient(tilewise.cross_entropy, logits[:, order], torch.argsort(order)[target])
    torch.testing.assert_close(shifted, (loss, gradient), rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(permuted, (loss, gradient[:, order.cpu()]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(n), rtol=0, atol=1e-6)


@hypothesis.settings(max_examples=15 if INTERPRETED else 120, deadline=None)
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**20))
def test_any_combination_of_options(data, seed):
    """Loss, statistics and gradient of whatever options meet, against the formula in float64."""
    torch.manual_seed(seed)
    draw = data.draw
    n, v, soft = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 31, 64, 1025, 1500])), draw(st.booleans())
    dtype = torch.float64 if NATIVE_CPU and draw(st.booleans()) else torch.float32
    logits = (draw(st.sampled_from([0.1, 3.0, 40.0])) * torch.randn(v, n, dtype=dtype)).t()
    logits = logits.contiguous() if draw(st.booleans()) else logits
    target = soft_targets(n, v, dtype) if soft else class_targets(n, v, ignored=draw(st.sampled_from([0.0, 0.5])))
    options = {
        "weight": torch.rand(v, dtype=dtype) if draw(st.booleans()) else None,
        "row_weight": torch.randn(n, dtype=dtype) if draw(st.booleans()) else None,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "lse_square_scale": draw(st.sampled_from([0.0, 0.01])),
        "softcap": draw(st.sampled_from([None, 10.0])),
        "logit_scale": draw(st.sampled_from([1.0, -0.5])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    upstream = torch.randn(3)

    def total(loss, lse, entropy):
        return upstream[0] * loss.sum() + upstream[1] * lse.sum() + upstream[2] * entropy.sum()

    leaf = logits.to(DEVICE).requires_grad_()
    loss, stats = tilewise.cross_entropy(leaf, target.to(DEVICE), return_stats=True, **contract.to(DEVICE, options))
    (gradient,) = torch.autograd.grad(total(loss, stats.lse, stats.entropy), leaf)
    wide = logits.double().requires_grad_()
    wide_target = target.double() if soft else target
    weight = contract.to(torch.float64, options)
    expected = reference(wide, wide_target, weight.pop("weight"), weight.pop("row_weight"), **weight)
    (expected_gradient,) = torch.autograd.grad(total(*expected[:3]), wide)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 3e-5, "atol": 3e-5}
    for ours, theirs in zip(
        (loss, stats.lse, stats.entropy, gradient), (*expected[:3], expected_gradient), strict=True
    ):
        torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), **tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="a GPU backend is tested with TILEWISE_BACKEND=cuda or triton")
def test_cuda_graph():
    """Nothing synchronises: forward and backward are captured, and replayed on new values."""
    logits, target = (t.clone() for t in example(64, 1000))
    logits.requires_grad_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(tilewise.cross_entropy(logits, target), logits)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = tilewise.cross_entropy(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logits.normal_()
    graph.replay()
    expected = contract.value_and_gradient(tilewise.cross_entropy, logits, target)
    torch.testing.assert_close((loss.detach().cpu(), gradient.cpu()), expected)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="a GPU backend is tested with TILEWISE_BACKEND=cuda or triton")
def test_more_than_2_31_elements_on_the_device():
    n, v = 2**14 + 1, 2**17 + 8
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = class_targets(n, v, device="cuda")
    loss = tilewise.cross_entropy(logits, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    rows = [0, n // 2, n - 1]
    wide = logits.detach()[rows].cpu().double()
    expected = contract.value_and_gradient(CROSS_ENTROPY.reference, wide, target[rows].cpu(), reduction="sum")
    assert relative_error(gradient[rows], expected[1]) < 4e-3
