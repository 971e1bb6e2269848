"""The CUDA kernels without a GPU: the same .cu files, run by tests/gpu/cuda_emulator, against float64 formulas.

What this cannot show: speed, the device's own exp and rounding (its approximations are replaced by the C library's),
and races that depend on warps really running at once (`make race` finds those).
"""

import emulated
import pytest
import torch
from emulated import BFLOAT, FLOAT, HALF, WORST, Call, Guards, Matrix, checked, close_gradient, close_value, pointer
from torch import Tensor

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")

DTYPES = [FLOAT, BFLOAT, HALF]


@pytest.fixture(scope="session")
def library():
    yield emulated.build()
    print("\nworst errors:", {name: f"{error:.1e}" for name, error in sorted(WORST.items())})


# ---- cross entropy


def reference(x: Tensor, target: Tensor, o: dict) -> dict:
    """Float64, one formula per line; x requires grad."""
    n, v = x.shape
    x = x * o.get("scale", 1.0)
    cap = o.get("softcap", 0.0)
    x = cap * torch.tanh(x / cap) if cap else x
    weight = o["weight"].double() if o.get("weight") is not None else torch.ones(v, dtype=torch.float64)
    smoothing = o.get("label_smoothing", 0.0)
    log_p = torch.log_softmax(x, 1)
    p_log_p = log_p.exp() * log_p.clamp_min(-1000)
    lse = torch.logsumexp(x, 1)
    kept = torch.ones(n, dtype=torch.bool)
    bad = ~kept
    if target.is_floating_point():
        c = weight * ((1 - smoothing) * target.double() + smoothing / v)
        share = torch.ones(n, dtype=torch.float64)
    else:
        kept = target != o.get("ignore_index", -100)
        bad = kept & ((target < 0) | (target >= v))
        y = torch.where(kept & ~bad, target, 0)
        one_hot = torch.nn.functional.one_hot(y, v).double()
        c = (1 - smoothing) * weight[y][:, None] * one_hot + smoothing / v * weight
        share = torch.where(kept, weight[y], 0.0)
    loss = -torch.where(c != 0, c * log_p, 0.0).sum(1) + o.get("lse_square_scale", 0.0) * lse**2
    if o.get("row_weight") is not None:
        loss = loss * o["row_weight"].double()
    loss = torch.where(bad, torch.nan, torch.where(kept, loss, 0.0))
    return {"loss_rows": loss, "lse": lse, "entropy": -p_log_p.sum(1), "argmax": x.argmax(1), "total": share.sum()}


def reduced(rows: dict, reduction: str) -> Tensor:
    if reduction == "none":
        return rows["loss_rows"]
    total = rows["loss_rows"].sum()
    if reduction == "sum":
        return total
    return total / rows["total"] if float(rows["total"]) != 0 else total * 0


def split(guards: Guards, call: Call, parts: int) -> None:
    """Rows read by several blocks each, whose statistics of 32 bytes meet in memory."""
    call.parts, call.part_memory = parts, pointer(guards.empty(8 * call.rows * parts))


def cross_entropy(library, logits: Tensor, target: Tensor, *, layout: dict | None = None, inplace=False, **o) -> dict:
    """Forward and backward through the launch functions; upstream gradients are random but fixed."""
    n, v = logits.shape
    reduction = o.get("reduction", "mean")
    guards = Guards()
    memory = guards.put(logits, **(layout or {}))
    soft = target.is_floating_point()
    targets = guards.put(target, **(o.get("target_layout", {}) if soft else {}))
    weight, row_weight = guards.put(o.get("weight")), guards.put(o.get("row_weight"))
    out = {name: guards.empty(n) for name in ("loss_rows", "share_rows", "lse", "entropy")}
    out |= {"row_state": guards.empty(3, n), "loss": guards.empty(), "total": guards.empty()}
    out["argmax"] = guards.empty(n, dtype=torch.int64)
    call = Call(rows=n, columns=v, ignore_index=o.get("ignore_index", -100), scale=o.get("scale", 1.0))
    call.logits, call.probabilities = Matrix.of(memory), Matrix.of(targets if soft else None)
    call.target = None if soft else pointer(targets)
    call.weight, call.row_weight = pointer(weight), pointer(row_weight)
    call.reduction, call.details = emulated.REDUCTIONS[reduction], int(o.get("details", False))
    call.softcap, call.label_smoothing = o.get("softcap", 0.0), o.get("label_smoothing", 0.0)
    call.lse_square_scale = o.get("lse_square_scale", 0.0)
    split(guards, call, o.get("parts", 0))
    for name, tensor in out.items():
        setattr(call, name, pointer(tensor))
    checked(library.cross_entropy_forward(call))

    upstream = torch.Generator().manual_seed(1)
    grads = {"grad_loss": torch.randn(n if reduction == "none" else (), generator=upstream)}
    if o.get("details"):
        grads |= {name: torch.randn(n, generator=upstream) for name in ("grad_lse", "grad_entropy")}
    held = {name: guards.put(grad) for name, grad in grads.items()}
    for name, grad in held.items():
        setattr(call, name, pointer(grad))
        setattr(call, f"{name}_stride", 1 if grad.ndim else 0)
    gradient = memory if inplace else guards.empty(n, v, dtype=logits.dtype)
    call.gradient = Matrix.of(gradient)
    checked(library.cross_entropy_backward(call))
    guards.check()
    return out | {"gradient": gradient, "grads": grads}


def check_cross_entropy(library, logits: Tensor, target: Tensor, **o) -> dict:
    actual = cross_entropy(library, logits, target, **o)
    x = logits.double().requires_grad_()
    expected = reference(x, target, o)
    reduction = o.get("reduction", "mean")
    loss = reduced(expected, reduction)
    close_value("loss", actual["loss_rows"], expected["loss_rows"])
    close_value("total", actual["total"], expected["total"])
    if reduction != "none":
        close_value("reduced loss", actual["loss"], loss)
    objective = (loss * actual["grads"]["grad_loss"].double()).sum()
    if o.get("details"):
        close_value("lse", actual["lse"], expected["lse"])
        close_value("entropy", actual["entropy"], expected["entropy"])
        assert torch.equal(actual["argmax"], expected["argmax"])
        for name in ("lse", "entropy"):
            objective = objective + (expected[name] * actual["grads"][f"grad_{name}"].double()).sum()
    (gradient,) = torch.autograd.grad(objective, x)
    if bool(expected["loss_rows"].isfinite().all()):
        close_gradient("gradient", actual["gradient"], gradient)
    return actual


def inputs(n: int, v: int, dtype=FLOAT, scale: float = 3.0, ignored: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n * 100003 + v)
    target = torch.randint(0, v, (n,))
    if ignored and n > 2:
        target[1] = -100
    return (scale * torch.randn(n, v)).to(dtype), target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 5, 7, 33, 1000, 1030, 4099, 50257])
def test_plain(library, v, dtype):
    logits, target = inputs(3 if v == 50257 else 11, v, dtype)
    apart = check_cross_entropy(library, logits, target)
    inside = cross_entropy(library, logits, target, inplace=True)
    assert torch.equal(apart["gradient"], inside["gradient"])
    again = cross_entropy(library, logits, target)
    assert all(torch.equal(again[name], apart[name]) for name in ("loss", "gradient"))


def layouts(n: int, v: int) -> list[dict]:
    return [
        {"offset": 1},  # every row starts between two vectors
        {"offset": 3, "strides": (v + 5, 1)},
        {"strides": (v + 8, 1)},  # a padded vocabulary: the gradient has another alignment
        {"strides": (2 * v, 2)},
        {"strides": (1, n)},  # transposed
        {"strides": (0, 1)},  # one row, broadcast
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [5, 1030, 4099])
@pytest.mark.parametrize("layout", range(6))
def test_layouts(library, v, dtype, layout):
    logits, target = inputs(4, v, dtype)
    layout = layouts(4, v)[layout]
    if layout.get("strides") == (0, 1):
        logits = logits[:1].expand(4, v)
    check_cross_entropy(library, logits, target, layout=layout)
    if layout.get("strides") != (0, 1):
        check_cross_entropy(library, logits, target, layout=layout, inplace=True)


def options(name: str, n: int, v: int) -> dict:
    torch.manual_seed(5)
    weight, row_weight = torch.rand(v), torch.rand(n)
    weight[::3] = 0
    return {
        "weight": {"weight": weight},
        "smoothing": {"label_smoothing": 0.1},
        "weight_smoothing": {"weight": weight, "label_smoothing": 0.2},
        "softcap": {"softcap": 2.0},
        "scale": {"scale": 0.25},
        "scale_softcap": {"scale": -1.5, "softcap": 4.0, "reduction": "sum"},
        "lse_square": {"lse_square_scale": 0.01},
        "row_weight": {"row_weight": row_weight, "lse_square_scale": 0.01, "reduction": "none"},
        "details": {"details": True},
        "everything": dict(weight=weight, label_smoothing=0.1, softcap=5.0, scale=1.5, lse_square_scale=0.1)
        | dict(row_weight=row_weight, details=True, ignore_index=2),
    }[name]


OPTIONS = ["weight", "smoothing", "weight_smoothing", "softcap", "scale", "scale_softcap", "lse_square", "row_weight"]
OPTIONS += ["details", "everything"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [33, 1030])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(library, v, dtype, name):
    logits, target = inputs(5, v, dtype)
    target[3] = 2
    check_cross_entropy(library, logits, target.where(target >= 0, torch.tensor(2)), **options(name, 5, v))


@pytest.mark.parametrize("target_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "weight_smoothing", "everything"])
def test_probabilities(library, dtype, target_dtype, name):
    for v in (33, 1030, 2048):
        logits, _ = inputs(4, v, dtype)
        target = torch.softmax(2 * torch.randn(4, v), 1).to(dtype if target_dtype == "same" else FLOAT)
        o = {} if name == "none" else options(name, 4, v)
        check_cross_entropy(library, logits, target, **o)
        check_cross_entropy(library, logits, target, **o, target_layout={"offset": 1, "strides": (2 * v + 1, 2)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(library, dtype):
    for scale in (1e4, -1e4):
        logits, target = inputs(6, 1030, dtype)
        logits = (logits.double() + scale).to(dtype)
        check_cross_entropy(library, logits, target, label_smoothing=0.1, details=True)
        check_cross_entropy(library, logits, target)
        check_cross_entropy(library, (logits.double() * torch.randn(6, 1030)).to(dtype), target)


@pytest.mark.parametrize("v", [10, 1000, 4099, 32000])
@pytest.mark.parametrize("soft", [False, True])
def test_small_doubts_are_exact(library, v, soft):
    """Loss and gradient of 1 - p_y from 1e-2 to 1e-8, wherever the target is."""
    target = torch.tensor([0, v // 2, v - 1] * 7)
    doubts = torch.tensor([10.0**-k for k in range(2, 9) for _ in range(3)])
    logits = torch.zeros(21, v)
    logits[torch.arange(21), target] = ((v - 1) * (1 - doubts) / doubts).log()
    targets = torch.nn.functional.one_hot(target, v).float() if soft else target
    actual = cross_entropy(library, logits, targets, reduction="none")
    others = (-logits.amax(1).double()).exp() * (v - 1)  # in float64, too, they are lost beside a 1
    torch.testing.assert_close(actual["loss_rows"].double(), others.log1p(), rtol=2e-5, atol=0)
    slope = (-logits.amax(1, True).double()).exp().expand(-1, v).scatter(1, target[:, None], -others[:, None])
    slope = slope * (actual["grads"]["grad_loss"].double() / (1 + others))[:, None]
    torch.testing.assert_close(actual["gradient"].double(), slope, rtol=2e-5, atol=0)


@pytest.mark.parametrize("v", [33, 1030])
def test_masked_logits(library, v):
    logits, target = inputs(5, v, ignored=False)
    masked = torch.rand(5, v) < 0.6
    masked[torch.arange(5), target] = False
    masked[0, : v - 1] = True  # one column left, the last
    masked[0, -1], target[0] = False, v - 1
    logits[masked] = -torch.inf
    check_cross_entropy(library, logits, target)
    check_cross_entropy(library, logits, target, details=True)
    check_cross_entropy(library, logits, target, softcap=3.0, scale=2.0)
    soft = torch.where(masked, 0.0, torch.rand(5, v))
    check_cross_entropy(library, logits, soft)
    logits[1, target[1]] = -torch.inf
    actual = check_cross_entropy(library, logits, target, reduction="none")
    assert actual["loss_rows"][1] == torch.inf
    smoothed = check_cross_entropy(library, logits, target, label_smoothing=0.1)
    assert smoothed["loss"] == torch.inf


@pytest.mark.parametrize("v", [33, 1030])
@pytest.mark.parametrize("o", [{}, {"softcap": 30.0}, {"label_smoothing": 0.1}])
def test_bad_rows(library, v, o):
    """Targets out of range and NaN logits make their own row NaN; ignored rows are zeros whatever they hold."""
    logits, target = inputs(7, v)
    target[[0, 2, 4]] = torch.tensor([v, -1, 2**60])
    logits[1] = torch.nan
    logits[5, v // 2] = torch.nan
    actual = cross_entropy(library, logits, target, reduction="none", **o)
    nan_rows = torch.tensor([True, False, True, False, True, True, False])
    assert torch.equal(actual["loss_rows"].isnan(), nan_rows)
    assert torch.equal(actual["gradient"].isnan().all(1), nan_rows)
    assert torch.equal(actual["gradient"].isnan().any(1), nan_rows)
    assert actual["loss_rows"][1] == 0 and not actual["gradient"][1].any()


def test_argmax_takes_the_lowest_index(library):
    for v in (33, 1030, 4099):
        logits = torch.zeros(4, v)
        logits[1, 3:] = 1
        logits[2, -1] = logits[2, v // 2] = 2
        logits[3] = -torch.inf
        for offset in (0, 1):
            target = torch.zeros(4, dtype=torch.int64)
            out = cross_entropy(library, logits, target, details=True, layout={"offset": offset})
            assert out["argmax"].tolist() == [0, 3, v // 2, 0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(library, reduction):
    logits, target = inputs(1500, 3)
    check_cross_entropy(library, logits, target, reduction=reduction)
    ignored = cross_entropy(library, logits, torch.full_like(target, -100), reduction=reduction)
    assert not ignored["gradient"].any() and not ignored["loss_rows"].any() and ignored["total"] == 0
    assert reduction == "none" or ignored["loss"] == 0
    empty = cross_entropy(library, logits[:0], target[:0], reduction=reduction)
    assert empty["total"] == 0 and (reduction == "none" or empty["loss"] == 0)


# ---- the spherical family


def spherical_reference(x: Tensor, target: Tensor, kind: str, p: dict) -> dict:
    d = x.shape[1]
    kept = target != -100
    o = x.gather(1, torch.where(kept, target, 0)[:, None])[:, 0]
    if kind == "z":
        sd = x.var(1, correction=0).sqrt()
        loss = torch.nn.functional.softplus(p["a"] * (p["b"] - (o - x.mean(1)) / sd), threshold=100) / p["a"]
    elif kind == "taylor":
        loss = (d + x.sum(1) + (x * x).sum(1) / 2).log() - (1 + o + o * o / 2).log()
    else:
        loss = ((x * x).sum(1) + d * p["eps"]).log() - (o * o + p["eps"]).log()
    return {"loss_rows": torch.where(kept, loss, 0.0), "total": kept.double().sum()}


def spherical(
    library, logits: Tensor, target: Tensor, kind: str, reduction="mean", layout=None, inplace=False, parts=0
) -> dict:
    n, v = logits.shape
    guards = Guards()
    memory, targets = guards.put(logits, **(layout or {})), guards.put(target)
    out = {"loss_rows": guards.empty(n), "share_rows": guards.empty(n), "row_state": guards.empty(4, n)}
    out |= {"loss": guards.empty(), "total": guards.empty()}
    call = Call(rows=n, columns=v, ignore_index=-100, kind=emulated.KINDS[kind], a=1.5, b=0.25, eps=1e-3)
    call.logits, call.target, call.reduction = Matrix.of(memory), pointer(targets), emulated.REDUCTIONS[reduction]
    split(guards, call, parts)
    for name, tensor in out.items():
        setattr(call, name, pointer(tensor))
    checked(library.z_loss_forward(call))
    grad = torch.randn(n if reduction == "none" else (), generator=torch.Generator().manual_seed(1))
    upstream = guards.put(grad)
    call.grad_loss, call.grad_loss_stride = pointer(upstream), grad.ndim
    gradient = memory if inplace else guards.empty(n, v, dtype=logits.dtype)
    call.gradient = Matrix.of(gradient)
    checked(library.z_loss_backward(call))
    guards.check()
    return out | {"gradient": gradient, "upstream": grad}


def check_spherical(library, logits: Tensor, target: Tensor, kind: str, precision: float = 2e-6, **o) -> dict:
    actual = spherical(library, logits, target, kind, **o)
    x = logits.double().requires_grad_()
    expected = spherical_reference(x, target, kind, {"a": 1.5, "b": 0.25, "eps": 1e-3})
    close_value(f"{kind} loss", actual["loss_rows"], expected["loss_rows"], precision)
    close_value(f"{kind} total", actual["total"], expected["total"])
    loss = reduced(expected, o.get("reduction", "mean"))
    (gradient,) = torch.autograd.grad((loss * actual["upstream"].double()).sum(), x)
    close_gradient(f"{kind} gradient", actual["gradient"], gradient, precision)
    return actual


@pytest.mark.parametrize("kind", ["z", "taylor", "spherical"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [5, 7, 33, 1000, 1030, 4099, 50257])
def test_spherical(library, v, dtype, kind):
    logits, target = inputs(3 if v == 50257 else 9, v, dtype)
    apart = check_spherical(library, logits, target, kind)
    inside = spherical(library, logits, target, kind, inplace=True)
    assert torch.equal(apart["gradient"], inside["gradient"])


@pytest.mark.parametrize("kind", ["z", "taylor", "spherical"])
def test_spherical_layouts_and_reductions(library, kind):
    for v in (33, 1030):
        logits, target = inputs(6, v)
        for layout in layouts(6, v)[:5]:
            for reduction in ("none", "sum"):
                check_spherical(library, logits, target, kind, layout=layout, reduction=reduction)
        target[[2, 3]] = torch.tensor([v, -5])
        bad = spherical(library, logits, target, kind, reduction="none")
        assert bad["loss_rows"].isnan().nonzero().flatten().tolist() == [2, 3]
        assert bad["gradient"].isnan().all(1).nonzero().flatten().tolist() == [2, 3]
    empty = spherical(library, logits[:0], target[:0], kind)
    assert empty["loss"] == 0 and empty["total"] == 0


def test_moments_do_not_cancel(library):
    for v in (33, 1030, 50257):
        logits, target = inputs(3, v)
        # x - mean itself carries the rounding of the mean, 4e-6 of a standard deviation of 1
        check_spherical(library, logits / 3 + 100, target, "z", precision=2e-5)
    constant = spherical(library, torch.full((3, 1030), 0.1), torch.tensor([0, 1029, 7]), "z", reduction="none")
    softplus = torch.nn.functional.softplus(torch.tensor(1.5 * 0.25)) / 1.5
    torch.testing.assert_close(constant["loss_rows"], softplus.expand(3))
    assert not constant["gradient"].any()


@pytest.mark.parametrize("kind", ["z", "taylor", "spherical"])
@pytest.mark.parametrize("magnitude", [1e16, 1e19, 1e30, 1e36])
def test_squares_beyond_the_type(library, kind, magnitude):
    """Everywhere, in some columns, in the mean; the gradient is of the order of 1 / magnitude."""
    for v in (33, 1030, 4099):
        logits, target = inputs(5, v, ignored=False)
        logits *= magnitude
        logits[1, v // 2 :] /= magnitude
        logits[2] += 20 * magnitude
        target[1] = 3
        actual = spherical(library, logits, target, kind, reduction="none")
        x = logits.double().requires_grad_()
        expected = spherical_reference(x, target, kind, {"a": 1.5, "b": 0.25, "eps": 1e-3})["loss_rows"]
        (gradient,) = torch.autograd.grad((expected * actual["upstream"].double()).sum(), x)
        close_value(f"{kind} loss, large", actual["loss_rows"], expected, 1e-5)
        close_gradient(f"{kind} gradient, large", actual["gradient"] * magnitude, gradient * magnitude, 2e-5)


# ---- the emulator itself


WRONG = [
    *[(0, "barrier"), (1, "shuffle"), (2, "misaligned"), (3, "past its shared memory")],
    *[(4, "more than the 99 KiB"), (5, "more than the 227 KiB")],
]


@pytest.mark.parametrize("which, message", WRONG)
def test_the_emulator_finds_what_a_gpu_leaves_undefined(library, which, message):
    assert message in library.wrong_kernel(which).decode()
