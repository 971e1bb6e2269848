"""linear_cross_entropy against cross entropy of the logits, over every option, and what is its own: chunks, memory,
which gradients are formed when, a second backward, torch's own function of this name."""

import contract
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU, soft_targets

import tilewise
from tilewise.reference.linear_cross_entropy import linear_cross_entropy as reference
from tilewise.testing import allocated_bytes, assert_accurate, class_targets, relative_error

REDUCTIONS = ("mean", "sum", "none")
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "lse square": {"lse_square_scale": 1e-2},
    "softcap": {"softcap": 5.0},
    "all": {"label_smoothing": 0.2, "lse_square_scale": 1e-3, "softcap": 8.0},
}
SMALL_CHUNK = 4096  # bytes: several chunks of rows, and blocks of 256 classes


def layer(n=37, d=6, v=700, dtype=torch.float64, *, bias=True, grad=True):
    """input, linear_weight and linear_bias as leaves."""
    torch.manual_seed(0)
    found = torch.randn(n, d), torch.randn(v, d), torch.randn(v) if bias else None
    return [None if t is None else t.to(DEVICE, dtype).requires_grad_(grad) for t in found]


def targets(n, v, soft, dtype=torch.float64):
    return (soft_targets(n, v, dtype) if soft else class_targets(n, v, ignored=0.2)).to(DEVICE)


def value_and_gradients(function, x, w, b, target, grad=None, **options):
    loss = function(x, w, target, linear_bias=b, **options)
    leaves = [t for t in (x, w, b) if t is not None and t.requires_grad]
    return loss, torch.autograd.grad(loss, leaves, torch.ones_like(loss) if grad is None else grad.to(loss))


def dense(x, w, target, *, linear_bias=None, weight=None, softcap=None, lse_square_scale=0.0, **options):
    """What a user would write with the logits in hand."""
    logits = F.linear(x, w, linear_bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if lse_square_scale == 0:
        return F.cross_entropy(logits, target, weight, **options)
    reduction = options.pop("reduction", "mean")
    rows = F.cross_entropy(logits, target, weight, reduction="none", **options)
    kept = torch.ones_like(rows) if target.is_floating_point() else (target != -100).to(rows)
    rows = rows + lse_square_scale * torch.logsumexp(logits, 1).square() * kept
    share = kept if weight is None or target.is_floating_point() else kept * weight[target.clamp(min=0)]
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / share.sum()}[reduction]


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("chunk_bytes", [None, SMALL_CHUNK])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_dense_loss_in_float64(reduction, name, soft, weighted, bias, chunk_bytes):
    x, w, b = layer(bias=bias)
    target = targets(37, 700, soft)
    options = OPTIONS[name] | {"reduction": reduction, "weight": torch.rand(700).double() if weighted else None}
    grad = torch.randn(37) if reduction == "none" else torch.tensor(-1.7)
    ours = value_and_gradients(tilewise.linear_cross_entropy, x, w, b, target, grad, chunk_bytes=chunk_bytes, **options)
    expected = value_and_gradients(dense, x, w, b, target, grad, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_accuracy(reduction, name, soft, dtype):
    """Value and gradients against float64, judged by what F.linear and F.cross_entropy achieve in the type."""
    n, d, v = (19, 24, 700) if INTERPRETED else (37, 64, 3001)
    torch.manual_seed(1)
    x, w, b = torch.randn(n, d), torch.randn(v, d) / 4, torch.randn(v)
    target = soft_targets(n, v) if soft else class_targets(n, v, ignored=0.2)
    for row, y in enumerate(() if soft else target.tolist()):  # confident rows: p - 1 cancels
        if row % 4 == 0 and y >= 0:
            x[row] = 3 * w[y]

    def run(function, dtype, device, **extra):
        leaves = [t.to(dtype).to(device).requires_grad_() for t in (x, w, b)]
        t = target.to(dtype) if soft else target
        options = OPTIONS[name] | {"reduction": reduction} | extra
        return value_and_gradients(function, *leaves, t.to(device), **options)

    ours = run(tilewise.linear_cross_entropy, dtype, DEVICE, chunk_bytes=n * 300 * dtype.itemsize)
    truth = value_and_gradients(
        reference,
        *(t.to(dtype).double().requires_grad_() for t in (x, w, b)),
        target.to(dtype).double() if soft else target,
        **OPTIONS[name],
        reduction=reduction,
    )
    eager = run(dense, dtype, "cpu")
    # Triton's interpreter truncates to bfloat16 where the device rounds.
    slack = 3 * torch.finfo(dtype).eps if INTERPRETED and dtype == torch.bfloat16 else 0.0
    assert_accurate(ours[0], truth[0], eager[0], dtype, "loss", slack=slack)
    for what, mine, expected, theirs in zip(("input", "weight", "bias"), ours[1], truth[1], eager[1], strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert_accurate(mine, expected, theirs, dtype, f"{what} gradient", slack=slack)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_what_is_required(reduction, needs):
    x, w, b = layer(dtype=torch.float32)
    target = targets(37, 700, False)
    full = value_and_gradients(tilewise.linear_cross_entropy, x, w, b, target, reduction=reduction)[1]
    leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needs, strict=True)]
    loss, found = value_and_gradients(tilewise.linear_cross_entropy, *leaves, target, reduction=reduction)
    for gradient, expected in zip(found, [g for g, need in zip(full, needs, strict=True) if need], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert [t.grad for t in leaves] == [None] * 3 and loss.requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward(reduction):
    """The first backward hands out what the forward formed, later ones form it again; nothing handed out changes."""
    x, w, b = layer(dtype=torch.float32)
    loss = tilewise.linear_cross_entropy(x, w, targets(37, 700, False), linear_bias=b, reduction=reduction)
    first = torch.autograd.grad(loss.sum(), (x, w, b), torch.tensor(2.0).to(DEVICE), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss.sum(), (x, w, b), torch.tensor(-6.0).to(DEVICE), retain_graph=True)
    third = torch.autograd.grad(loss.sum(), (x, w), torch.tensor(2.0).to(DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(relative_error(a, -3 * b) < 1e-5 for a, b in zip(second, first, strict=True))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(third, first[:2], strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss.sum(), x)


def test_gradients_accumulate():
    x, w, b = layer(dtype=torch.float32)
    target = targets(37, 700, False)
    _, (_, expected, _) = value_and_gradients(tilewise.linear_cross_entropy, x, w, b, target)
    for _ in range(2):
        tilewise.linear_cross_entropy(x, w, target, linear_bias=b).backward()
    torch.testing.assert_close(w.grad, 2 * expected)


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck_and_second_derivative(soft, reduction):
    x, w, b = layer(n=4, d=3, v=5)
    target = soft_targets(4, 5, torch.float64) if soft else torch.tensor([1, -100, 3, 4])
    weight = torch.rand(5).double()

    def function(*leaves):
        return tilewise.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], weight=weight, label_smoothing=0.1, softcap=3.0,
            lse_square_scale=0.1, reduction=reduction, chunk_bytes=80
        )  # fmt: skip

    # A second backward adds up in another order than the first.
    assert torch.autograd.gradcheck(function, (x, w, b), nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(function, (x, w, b), nondet_tol=1e-12)


def test_all_rows_ignored_and_no_rows():
    for n in (5, 0):
        x, w, b = layer(n=n, v=9, dtype=torch.float32)
        target = torch.full((n,), -100, device=DEVICE)
        for reduction in ("mean", "sum"):
            loss, gradients = value_and_gradients(tilewise.linear_cross_entropy, x, w, b, target, reduction=reduction)
            assert loss.item() == 0 and [g.shape for g in gradients] == [x.shape, w.shape, b.shape]
            assert all(g.count_nonzero() == 0 for g in gradients)
        loss, gradients = value_and_gradients(tilewise.linear_cross_entropy, x, w, b, target, reduction="none")
        assert loss.shape == (n,) and all(g.count_nonzero() == 0 for g in gradients)


def test_all_positions_ignored():
    """The K-dimensional mean has its own denominator: its gradient is 0, not NaN."""
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    w = torch.randn(5, 2, 4, device=DEVICE, requires_grad=True)
    loss = tilewise.linear_cross_entropy(x, w, torch.full((3, 2), -100, device=DEVICE))
    gradients = torch.autograd.grad(loss, (x, w))
    assert loss.item() == 0 and all(g.count_nonzero() == 0 for g in gradients)


def test_strided_arguments():
    torch.manual_seed(2)
    wide = torch.randn(12, 40, device=DEVICE)
    x, w, b = wide.t()[:9, :6], torch.randn(6, 50, device=DEVICE).t(), torch.randn(100, device=DEVICE)[::2]
    target = class_targets(9, 50).to(DEVICE)
    strided = value_and_gradients(
        tilewise.linear_cross_entropy, *(t.detach().requires_grad_() for t in (x, w, b)), target
    )
    packed = value_and_gradients(
        tilewise.linear_cross_entropy, *(t.detach().contiguous().requires_grad_() for t in (x, w, b)), target
    )
    torch.testing.assert_close(strided, packed, rtol=1e-5, atol=1e-6)


def test_out_of_range_target():
    x, w, _ = layer(n=4, v=9, dtype=torch.float32, bias=False)
    for bad in (9, -1, 2**40):
        target = torch.tensor([0, bad, 2, 3], device=DEVICE)
        if DEVICE == "cpu" and BACKEND != "triton":
            with pytest.raises(RuntimeError, match=rf"target\[1\].* got {bad}"):
                tilewise.linear_cross_entropy(x, w, target)
            continue
        loss, (gradient, _) = value_and_gradients(tilewise.linear_cross_entropy, x, w, None, target, reduction="none")
        assert loss.isnan().tolist() == [False, True, False, False]
        assert gradient[1].isnan().all() and gradient[[0, 2, 3]].isfinite().all()


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch < 2.13 has no function of this name")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("positions", [None, (), (3,), (2, 2)], ids=["one row", "rows", "3", "2 x 2"])
def test_equals_torch_function(positions, soft, reduction):
    """Every documented shape: (d,), (N, d), and K-dimensional weights with one loss per position."""
    torch.manual_seed(3)
    shape = positions or ()
    batch = () if positions is None else (6,)
    x = torch.randn(*batch, 4).double().requires_grad_()
    w, b = (torch.randn(5, *shape, *last).double().requires_grad_() for last in ((4,), ()))
    logits_shape = (*batch, 5, *shape)
    target = torch.rand(logits_shape).double() if soft else torch.randint(5, (*batch, *shape))
    options = {"linear_bias": b, "weight": torch.rand(5).double(), "reduction": reduction, "label_smoothing": 0.1}
    if not soft:
        options["ignore_index"] = 2
    ours = tilewise.linear_cross_entropy(x, w, target, **options)
    theirs = F.linear_cross_entropy(x, w, target, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    grad = torch.randn_like(ours)
    gradients = [torch.autograd.grad(loss, (x, w, b), grad) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(BACKEND == "reference", reason="the reference holds the big matrix")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype):
    """Beside the gradients: one chunk of logits and O(N) numbers; for 16 bits in the backward two (N, d) sums."""
    n, d, v, chunk = 256, 16, 2048, 2**17
    x, w, _ = (None if t is None else t.to(dtype) for t in layer(n, d, v, torch.float32, bias=False, grad=False))
    x, w = x.requires_grad_(), w.requires_grad_()
    target = targets(n, v, False)

    def step():
        loss = tilewise.linear_cross_entropy(x, w, target, chunk_bytes=chunk)
        return torch.autograd.grad(loss, (x, w))

    step()
    held = max(chunk, 256 * n * dtype.itemsize if dtype != torch.float32 else 0)
    sums = 0 if dtype == torch.float32 else n * d * (4 + dtype.itemsize)
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        sums += 2 * held  # oneDNN packs copies of its 16-bit operands
    spare = 16 * 1024 + (65536 if DEVICE == "cuda" or BACKEND == "triton" else 0)
    gradients = (x.numel() + w.numel()) * dtype.itemsize
    assert allocated_bytes(step, DEVICE) <= gradients + held + sums + 4 * n * 8 + spare
    assert gradients + held < n * v * dtype.itemsize


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_and_export(reduction):
    def step(x, w, b, target):
        return tilewise.linear_cross_entropy(x * 2, w, target, linear_bias=b, reduction=reduction)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (6, 11):
        x, w, b = layer(n=n, v=40, dtype=torch.float32)
        target = targets(n, 40, False)
        found = [
            (loss := f(x, w, b, target), torch.autograd.grad(loss, (x, w, b), torch.ones_like(loss)))
            for f in (compiled, step)
        ]
        torch.testing.assert_close(*found)

    class Step(torch.nn.Module):
        def forward(self, *arguments):
            return step(*arguments)

    arguments = (*(t.detach() for t in (x, w, b)), target)
    torch.testing.assert_close(torch.export.export(Step(), arguments).module()(*arguments), step(*arguments))


@pytest.mark.skipif(INTERPRETED, reason="opcheck traces; the interpreter is NumPy")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction):
    x, w, b = layer(n=4, v=7, dtype=torch.float32)
    target, weight = class_targets(4, 7).to(DEVICE), torch.rand(7, device=DEVICE)
    ops = torch.ops.tilewise
    options = {"ignore_index": -100, "label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 3.0}
    options |= {"reduction": reduction, "chunk_bytes": 0}
    arguments = (x, w, target, b, weight)
    torch.library.opcheck(ops.linear_cross_entropy.default, arguments, options)
    # Formed gradients belong to the backward, which scales them where they lie: no run of it here.
    flags = {f"form_{name}_grad": True for name in ("input", "weight", "bias")}
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.linear_cross_entropy.default, arguments, options | flags, test_utils=utilities)
    plain = [t.detach() for t in (x, w, b)]
    loss, state, *_ = ops.linear_cross_entropy(plain[0], plain[1], target, plain[2], weight, **options)
    flags = {f"{name}_grad": True for name in ("input", "weight", "bias")}
    arguments = (torch.ones_like(loss), plain[0], plain[1], target, plain[2], weight, state)
    torch.library.opcheck(ops.linear_cross_entropy_backward.default, arguments, options | flags)


def test_autocast_casts_like_linear():
    x, w, b = layer(dtype=torch.float32, grad=False)
    target = targets(37, 700, False)
    expected = tilewise.linear_cross_entropy(x.bfloat16(), w.bfloat16(), target, linear_bias=b.bfloat16())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(tilewise.linear_cross_entropy(x, w, target, linear_bias=b), expected)


@hypothesis.settings(max_examples=5 if INTERPRETED else 30, deadline=None)
@hypothesis.given(n=st.integers(1, 40), v=st.integers(1, 600), chunk=st.integers(1, 20000), seed=st.integers(0, 999))
def test_chunks_do_not_show(n, v, chunk, seed):
    torch.manual_seed(seed)
    x, w = (torch.randn(size, 5, device=DEVICE).requires_grad_() for size in (n, v))
    target = class_targets(n, v, ignored=0.1).to(DEVICE)
    whole = value_and_gradients(tilewise.linear_cross_entropy, x, w, None, target, chunk_bytes=2**30)
    parts = value_and_gradients(tilewise.linear_cross_entropy, x, w, None, target, chunk_bytes=chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    rows = value_and_gradients(tilewise.linear_cross_entropy, x, w, None, target, chunk_bytes=chunk, reduction="none")
    kept = max(1, int((target >= 0).sum()))
    for found, expected in zip(rows[1], whole[1], strict=True):
        assert relative_error(found / kept, expected) < 1e-4


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": torch.randn(2, 3, 4)}, ValueError, r"input to have shape \(N, d\) or \(d,\), got \(2, 3, 4\)"),
        ({"linear_weight": torch.randn(7, 5)}, ValueError, r"to have shape \(V, 4\), V >= 1, got \(7, 5\)"),
        ({"linear_weight": torch.randn(0, 4)}, ValueError, r"V >= 1, got \(0, 4\)"),
        ({"linear_weight": torch.randn(7, 4).half()}, TypeError, "linear_weight to be torch.float32 like input"),
        ({"linear_bias": torch.randn(6)}, ValueError, r"linear_bias to have shape \(7,\), got \(6,\)"),
        ({"linear_bias": 1.0}, TypeError, "linear_bias to be a tensor, got float"),
        ({"input": torch.ones(3, 4).long()}, TypeError, "input to be float.* got torch.int64"),
        ({"target": torch.zeros(4).long()}, ValueError, r"target to have shape \(3,\), got \(4,\)"),
        ({"target": torch.rand(3, 6)}, ValueError, r"target probabilities to have shape \(3, 7\)"),
        ({"target": [0, 1, 2]}, TypeError, "target to be a tensor, got list"),
        ({"weight": torch.ones(6)}, ValueError, r"weight to have shape \(7,\), got \(6,\)"),
        ({"reduction": "median"}, ValueError, "'none', 'mean' or 'sum', got 'median'"),
        ({"softcap": -1.0}, ValueError, "softcap to be a finite number above 0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes to be a finite number above 0, got 0"),
        ({"label_smoothing": 2.0}, ValueError, r"label_smoothing to be a finite number in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    arguments = {"input": torch.randn(3, 4), "linear_weight": torch.randn(7, 4), "target": torch.zeros(3).long()}
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (arguments | change).items()}
    with pytest.raises(error, match=rf"^tilewise\.linear_cross_entropy: expected .*{message}"):
        tilewise.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("chunk_bytes", [0, SMALL_CHUNK], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bfloat16_gradients_of_the_forward(reduction, chunk_bytes):
    """Formed with the loss and scaled by what arrives, they are rounded twice: against float64, judged by eager."""
    n, d, v = (19, 24, 700) if INTERPRETED else (300, 64, 3001)
    torch.manual_seed(4)
    x, w, b = (t.bfloat16() for t in (torch.randn(n, d), torch.randn(v, d) / 4, torch.randn(v)))
    target, grad = class_targets(n, v, ignored=0.2), torch.tensor(-1.7)
    flags = {f"form_{name}_grad": True for name in ("input", "weight", "bias")}
    options = {"reduction": reduction, "chunk_bytes": chunk_bytes}

    def formed(x, w, b, target):
        return torch.ops.tilewise.linear_cross_entropy(x, w, target, b, None, **options, **flags)

    def gradients(function, device, dtype):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, w, b)]
        loss = function(*leaves, target.to(device))
        return torch.autograd.grad(loss, leaves, grad.to(loss))

    def of(function):
        return lambda x, w, b, target: function(x, w, target, linear_bias=b, reduction=reduction)

    ours = gradients(lambda *tensors: formed(*tensors)[0], DEVICE, torch.bfloat16)
    truth = gradients(of(reference), "cpu", torch.float64)
    eager = gradients(of(dense), "cpu", torch.bfloat16)
    assert [g.numel() for g in formed(*(t.to(DEVICE) for t in (x, w, b, target)))[2:]] == [n * d, v * d, v]
    slack = 3 * torch.finfo(torch.bfloat16).eps if INTERPRETED else 0.0
    for what, mine, expected, theirs in zip(("input", "weight", "bias"), ours, truth, eager, strict=True):
        assert mine.dtype == torch.bfloat16
        assert_accurate(mine, expected, theirs, torch.bfloat16, f"{what} gradient", slack=slack)


def test_where_the_forward_forms_bfloat16_gradients(monkeypatch):
    """On a GPU: that of the input alone, or all where one chunk holds the logits; the rest is the backward's."""
    from tilewise.ops import linear_cross_entropy as op

    monkeypatch.setattr(op, "_forms_bfloat16", lambda input: True)
    monkeypatch.setattr(op, "FEW_BYTES", 2 * 8 * 40)
    few, many = torch.empty(8, 4, dtype=torch.bfloat16), torch.empty(9, 4, dtype=torch.bfloat16)
    w, every = torch.empty(40, 4, dtype=torch.bfloat16), [True, True, False]
    assert op._formed_on_the_way(few, w, every, 0) == (every, 2 * 8 * 40)
    assert op._formed_on_the_way(many, w, every, 0) == ([False] * 3, 0)
    assert op._formed_on_the_way(many, w, every, 2 * 9 * 40) == (every, 2 * 9 * 40)
    assert op._formed_on_the_way(many, w, [True, False, False], 0) == ([True, False, False], 0)
    assert op._formed_on_the_way(many.half(), w.half(), every, 7) == (every, 7)
    monkeypatch.undo()
    assert op._formed_on_the_way(few, w, every, 0) == ([False] * 3, 0)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
def test_bfloat16_gradients_of_the_forward_compile(monkeypatch):
    from tilewise.ops import linear_cross_entropy as op

    monkeypatch.setattr(op, "_forms_bfloat16", lambda input: True)
    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(tilewise.linear_cross_entropy, fullgraph=True, dynamic=dynamic)
        for n in (6, 11):
            x, w, _ = layer(n=n, v=40, dtype=torch.float32, bias=False, grad=False)
            leaves = [t.bfloat16().requires_grad_() for t in (x, w)]
            target = targets(n, 40, False)
            found = [torch.autograd.grad(f(*leaves, target), leaves) for f in (compiled, tilewise.linear_cross_entropy)]
            torch.testing.assert_close(*found, rtol=2**-6, atol=2**-9)  # a step at most in either rounding
    torch._dynamo.reset()
