"""The Triton kernels in Triton's interpreter (CPU tensors, no GPU) against float64 formulas written here.

Triton decides at import whether it interprets, so unless TRITON_INTERPRET=1 is set this file runs itself in a process
where it is. The interpreter truncates where the GPU rounds to bfloat16: half-precision gradients get one unit of slack.
"""

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    pytest.importorskip("triton")
    from tilewise.triton_kernels import cross_entropy, z_loss

    OPS = {**cross_entropy.OPS, **z_loss.OPS}
else:

    @pytest.mark.slow
    def test_under_the_interpreter():
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# NumPy warns about the infinities and NaNs that the tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN = float("nan")
INF = float("inf")
DEFAULTS = {
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "lse_square_scale": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
    "reduction": "mean",
}
GRADIENT_RTOL = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty returns NaN (integers: the largest), so an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def close(got, expected, rtol=1e-5, atol=2e-6):
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def reference_cross_entropy(raw, target, weight, row_weight, options):
    """Row losses, lse, entropy and total in float64, differentiable in `raw`."""
    V = raw.shape[1]
    x = raw * options["logit_scale"]
    if options["softcap"] is not None:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    x = torch.where(x == -INF, -1e6, x)  # exp(-1e6) is 0, and no derivative is NaN
    w = torch.ones(V, dtype=torch.float64) if weight is None else weight.double()
    r = torch.ones(raw.shape[0], dtype=torch.float64) if row_weight is None else row_weight.double()
    eps = options["label_smoothing"]
    if target.is_floating_point():
        c = w * ((1 - eps) * target.double() + eps / V)
        total = torch.tensor(float(raw.shape[0]))
    else:
        kept = target != options["ignore_index"]
        y = torch.where(kept, target, 0)
        c = (1 - eps) * w[y, None] * torch.nn.functional.one_hot(y, V) + eps / V * w
        r = r * kept
        total = (w[y] * kept).sum()
    log_p = x - torch.logsumexp(x, 1, keepdim=True)
    lse = torch.logsumexp(x, 1)
    loss = r * (-(c * log_p).sum(1) + options["lse_square_scale"] * lse**2)
    return loss, lse, -(log_p.exp() * log_p).sum(1), total


def reduce(loss, total, reduction):
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / total


def check_cross_entropy(
    logits, target, weight=None, row_weight=None, *, stats=False, inplace=False, loss_grad=True, **changed
):
    """Forward and backward of one call against autograd through the reference."""
    options = {**DEFAULTS, **changed}
    outputs = OPS["cross_entropy"](logits, target, weight, row_weight, return_stats=stats, **options)
    loss, lse, entropy, argmax, row_state, total = outputs
    raw = logits.detach().double().requires_grad_()
    expected_rows, expected_lse, expected_entropy, expected_total = reference_cross_entropy(
        raw, target, weight, row_weight, options
    )
    expected = reduce(expected_rows, expected_total, options["reduction"])
    close(loss, expected)
    close(total, expected_total)
    assert row_state.shape == (3, logits.shape[0])

    grad_loss = torch.randn(loss.shape) if loss_grad else None
    objective = (expected * grad_loss).sum() if loss_grad else 0.0
    grad_lse = grad_entropy = None
    if stats:
        close(lse, expected_lse)
        close(entropy, expected_entropy)
        grad_lse, grad_entropy = torch.randn(2, logits.shape[0])
        objective = objective + (expected_lse * grad_lse).sum() + (expected_entropy * grad_entropy).sum()
        if options["softcap"] is None and options["logit_scale"] > 0:
            assert torch.equal(argmax, logits.float().argmax(1))
    else:
        assert lse.shape == entropy.shape == argmax.shape == (0,)
    objective.backward()

    saved = (logits, target, weight, row_weight, entropy if stats else None, row_state, total)
    if inplace:
        assert OPS["cross_entropy_backward_"](grad_loss, grad_lse, grad_entropy, *saved, **options) is None
        grad = logits
    else:
        grad = OPS["cross_entropy_backward"](grad_loss, grad_lse, grad_entropy, *saved, **options)
        assert grad.is_contiguous()
    assert grad.dtype == logits.dtype
    close(grad, raw.grad, rtol=GRADIENT_RTOL[logits.dtype], atol=1e-6)


def class_targets(N, V, ignored=True):
    target = torch.randint(V, (N,))
    if ignored:
        target[N // 2] = -100
    return target


class TestCrossEntropy:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(7, 5), (3, 1), (5, 1030), (2, 9001)])
    def test_plain(self, shape, dtype, reduction):
        check_cross_entropy(3 * torch.randn(shape).to(dtype), class_targets(*shape), reduction=reduction)

    def test_vocabulary(self):
        check_cross_entropy(3 * torch.randn(2, 50257), class_targets(2, 50257, ignored=False), stats=True)

    @pytest.mark.parametrize("V", [5, 1030])
    @pytest.mark.parametrize(
        "options",
        [
            {"label_smoothing": 0.1},
            {"label_smoothing": 1.0},
            {"lse_square_scale": 0.01},
            {"softcap": 2.0},
            {"logit_scale": -0.7},
            {"softcap": 5.0, "logit_scale": 3.0, "label_smoothing": 0.2, "lse_square_scale": 0.01, "reduction": "none"},
        ],
        ids=str,
    )
    def test_options(self, V, options):
        target, weight, row_weight = class_targets(5, V), torch.rand(V), torch.rand(5)
        check_cross_entropy(3 * torch.randn(5, V), target, **options)
        check_cross_entropy(3 * torch.randn(5, V), target, weight, row_weight, stats=True, **options)

    @pytest.mark.parametrize("V", [5, 1030, 9001])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_probabilities(self, V, weighted, smoothing):
        target = torch.softmax(torch.randn(3, V), 1)
        weight, row_weight = (torch.rand(V), torch.rand(3)) if weighted else (None, None)
        check_cross_entropy(3 * torch.randn(3, V), target, weight, row_weight, label_smoothing=smoothing)
        check_cross_entropy(torch.randn(3, V).bfloat16(), target.bfloat16(), reduction="sum", stats=True)
        transposed = target.t().contiguous().t()
        check_cross_entropy(3 * torch.randn(3, V), transposed, weight, label_smoothing=smoothing, reduction="none")

    def test_statistics_only(self):
        check_cross_entropy(torch.randn(4, 9), class_targets(4, 9), stats=True, loss_grad=False)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_strides(self, inplace):
        for make in (
            lambda: torch.randn(1030, 5).t(),
            lambda: torch.randn(5, 2060)[:, ::2],
            lambda: torch.randn(9, 1100)[::2, 30:1060],
        ):
            check_cross_entropy(make(), class_targets(5, 1030), stats=True, inplace=inplace, label_smoothing=0.1)

    def test_in_place_leaves_the_rest_of_the_storage(self):
        storage = torch.full((6, 40), 7.0)
        logits = storage[1:5, 3:33:2]
        logits.copy_(torch.randn(4, 15))
        untouched = torch.ones_like(storage, dtype=torch.bool)
        untouched[1:5, 3:33:2] = False
        check_cross_entropy(logits, class_targets(4, 15), inplace=True)
        assert (storage[untouched] == 7.0).all()

    @pytest.mark.parametrize("stats", [False, True])
    def test_masked_logits(self, stats):
        """-inf where c_k = 0; the first tiles of a long row hold nothing else."""
        logits = torch.randn(3, 20000)
        logits[:, :17000] = -INF
        logits[1, 17001:] = -INF
        check_cross_entropy(logits, torch.tensor([17000, 17000, 19999]), stats=stats, reduction="none")
        check_cross_entropy(logits[:, 16990:17010], torch.tensor([10, 10, 15]), stats=stats)
        target = torch.zeros(3, 20000)
        target[:, 17000] = 1.0
        check_cross_entropy(logits, target, stats=stats)

    def test_large_logits(self):
        logits = torch.randn(4, 3000) + torch.tensor([[1e4], [-1e4], [0.0], [1e4]])
        expected = reference_cross_entropy(logits.double(), torch.arange(4), None, None, DEFAULTS)[0]
        close(OPS["cross_entropy"](logits, torch.arange(4), reduction="none")[0], expected, rtol=1e-6)
        probabilities = torch.softmax(torch.randn(4, 3000), 1)
        options = {**DEFAULTS, "label_smoothing": 0.1}
        expected = reference_cross_entropy(logits.double(), probabilities, None, None, options)[0]
        close(
            OPS["cross_entropy"](logits, probabilities, label_smoothing=0.1, reduction="none")[0], expected, rtol=1e-6
        )

    def test_confident_rows(self):
        """p - 1 is formed before rounding to half precision."""
        logits = torch.zeros(3, 8)
        logits[:, 2] = torch.tensor([8.0, 12.0, 14.0])
        check_cross_entropy(logits.bfloat16(), torch.tensor([2, 2, 2]), reduction="sum")

    def test_ties_take_the_first_index(self):
        logits = torch.zeros(2, 9001)
        logits[1, [5, 8999]] = 1.0
        assert OPS["cross_entropy"](logits, torch.tensor([0, 0]), return_stats=True)[3].tolist() == [0, 5]

    @pytest.mark.parametrize("weighted", [False, True])
    def test_targets_that_do_not_exist(self, weighted):
        target = torch.tensor([1, 7, -1, 2**40, -(2**40), -100])
        logits = torch.randn(6, 7)
        weight = torch.rand(7) if weighted else None
        loss, *_, row_state, total = OPS["cross_entropy"](logits, target, weight, reduction="none")
        assert loss.isnan().tolist() == [False, True, True, True, True, False]
        assert loss[5] == 0
        saved = (logits, target, weight, None, None, row_state, total)
        options = {**DEFAULTS, "reduction": "none"}
        grad = OPS["cross_entropy_backward"](torch.ones(6), None, None, *saved, **options)
        assert grad[1:5].isnan().all()
        assert grad[0].isfinite().all() and (grad[5] == 0).all()
        # The statistics do not depend on the target, nor do their gradients.
        assert OPS["cross_entropy_backward"](None, torch.ones(6), None, *saved, **options).isfinite().all()
        assert OPS["cross_entropy"](logits, target, weight)[0].isnan()

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_ignored_rows_are_not_read(self, reduction):
        """Nor are rows of weight 0: their gradient is 0 whatever the logits hold."""
        logits = torch.full((3, 6), NAN)
        logits[2] = -INF
        options = {**DEFAULTS, "reduction": reduction, "ignore_index": 1}
        target = torch.tensor([1, 1, 1])
        loss, *_, row_state, total = OPS["cross_entropy"](logits, target, **options)
        assert loss == 0 and total == 0
        saved = (logits, target, None, None, None, row_state, total)
        assert (OPS["cross_entropy_backward"](torch.tensor(3.0), None, None, *saved, **options) == 0).all()
        options["ignore_index"] = -100
        saved = (logits, target, None, torch.zeros(3), None, row_state, torch.tensor(3.0))
        assert (OPS["cross_entropy_backward"](torch.tensor(3.0), None, None, *saved, **options) == 0).all()

    def test_broadcast_gradient(self):
        logits, target = torch.randn(4, 6), torch.arange(4)
        options = {**DEFAULTS, "reduction": "none"}
        row_state, total = OPS["cross_entropy"](logits, target, **options)[4:]
        saved = (logits, target, None, None, None, row_state, total)
        broadcast = OPS["cross_entropy_backward"](torch.tensor(2.0).expand(4), None, None, *saved, **options)
        dense = OPS["cross_entropy_backward"](torch.full((8,), 2.0)[::2], None, None, *saved, **options)
        assert torch.equal(broadcast, dense)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("probabilities", [False, True])
    def test_no_rows(self, reduction, probabilities):
        logits = torch.empty(0, 6)
        target = torch.empty(0, 6) if probabilities else torch.empty(0, dtype=torch.int64)
        options = {**DEFAULTS, "reduction": reduction}
        loss, *stats, row_state, total = OPS["cross_entropy"](logits, target, return_stats=True, **options)
        assert loss.shape == ((0,) if reduction == "none" else ()) and (loss == 0).all() and total == 0
        assert [s.shape for s in stats] == [(0,)] * 3 and row_state.shape == (3, 0)
        saved = (logits, target, None, None, None, row_state, total)
        assert OPS["cross_entropy_backward"](loss, None, None, *saved, **options).shape == (0, 6)

    def test_float64_is_refused(self):
        with pytest.raises(TypeError, match="float64"):
            OPS["cross_entropy"](torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1]))


def reference_spherical_family(op, o, target, ignore_index, constants):
    """Row losses in float64, differentiable in `o`."""
    D = o.shape[1]
    kept = target != ignore_index
    o_c = o.gather(1, torch.where(kept, target, 0)[:, None])[:, 0]
    if op == "z_loss":
        a, b = constants["a"], constants["b"]
        z = (o_c - o.mean(1)) / o.var(1, correction=0).sqrt()
        loss = torch.nn.functional.softplus(a * (b - z), threshold=1000.0) / a
    elif op == "taylor_softmax_loss":
        loss = (D + o.sum(1) + (o**2).sum(1) / 2).log() - (1 + o_c + o_c**2 / 2).log()
    else:
        eps = constants.get("eps", 1e-6)
        loss = ((o**2).sum(1) + D * eps).log() - (o_c**2 + eps).log()
    return torch.where(kept, loss, 0.0), kept.sum().double()


FAMILY = [
    ("z_loss", {"a": 1.0, "b": 0.0}),
    ("z_loss", {"a": 0.1, "b": 28.0}),
    ("z_loss", {"a": 20.0, "b": -3.0}),
    ("taylor_softmax_loss", {}),
    ("spherical_softmax_loss", {}),
    ("spherical_softmax_loss", {"eps": 0.5}),
]


def check_spherical_family(op, constants, logits, target, reduction="mean", ignore_index=-100, rtol=1e-5):
    loss, row_state, total = OPS[op](logits, target, ignore_index=ignore_index, reduction=reduction, **constants)
    o = logits.detach().double().requires_grad_()
    rows, kept = reference_spherical_family(op, o, target, ignore_index, constants)
    expected = reduce(rows, kept, reduction)
    close(loss, expected, rtol=rtol)
    close(total, kept)
    assert row_state.shape == (4, logits.shape[0])
    grad_loss = torch.randn(loss.shape)
    (expected * grad_loss).sum().backward()
    options = {"ignore_index": ignore_index, "reduction": reduction}
    grad = OPS["spherical_family_backward"](grad_loss, logits, target, row_state, total, **options)
    assert grad.dtype == logits.dtype and grad.is_contiguous()
    close(grad, o.grad, rtol=max(rtol, GRADIENT_RTOL[logits.dtype]), atol=1e-6)


class TestSphericalFamily:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("shape", [(7, 5), (5, 1030), (2, 9001)])
    @pytest.mark.parametrize(("op", "constants"), FAMILY, ids=str)
    def test_against_the_formula(self, op, constants, shape, reduction):
        check_spherical_family(op, constants, 2 * torch.randn(shape), class_targets(*shape), reduction)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("op", "constants"), FAMILY, ids=str)
    def test_half_precision_and_strides(self, op, constants, dtype):
        check_spherical_family(op, constants, (2 * torch.randn(1030, 5)).to(dtype).t(), class_targets(5, 1030))
        check_spherical_family(
            op, constants, torch.randn(4, 90).to(dtype)[:, ::3], torch.tensor([24, 2, 3, 23]), "none", 3
        )

    def test_large_mean(self):
        """The deviation is not the difference of two large sums."""
        check_spherical_family("z_loss", {"a": 1.0, "b": 0.3}, torch.randn(3, 9001) + 100, torch.arange(3), rtol=1e-4)

    @pytest.mark.parametrize("V", [1, 7, 9001])
    def test_constant_rows(self, V):
        logits = torch.full((2, V), 0.1)
        target = torch.tensor([0, V - 1])
        loss, row_state, total = OPS["z_loss"](logits, target, a=2.0, b=0.3)
        close(loss, torch.nn.functional.softplus(torch.tensor(0.6)) / 2.0)
        options = {"ignore_index": -100, "reduction": "mean"}
        assert (
            OPS["spherical_family_backward"](torch.ones(()), logits, target, row_state, total, **options) == 0
        ).all()

    @pytest.mark.parametrize(("op", "constants"), FAMILY, ids=str)
    def test_bad_and_ignored_targets(self, op, constants):
        target = torch.tensor([1, 7, -1, 2**40, -(2**40), -100])
        logits = torch.randn(6, 7)
        logits[5] = NAN
        loss, row_state, total = OPS[op](logits, target, reduction="none", **constants)
        assert loss.isnan().tolist() == [False, True, True, True, True, False]
        options = {"ignore_index": -100, "reduction": "none"}
        grad = OPS["spherical_family_backward"](torch.ones(6), logits, target, row_state, total, **options)
        assert grad[1:5].isnan().all()
        assert grad[0].isfinite().all() and (grad[5] == 0).all()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize(("op", "constants"), FAMILY, ids=str)
    def test_nothing_kept(self, op, constants, reduction):
        for N in (0, 3):
            logits, target = torch.randn(N, 6), torch.full((N,), -100)
            loss, row_state, total = OPS[op](logits, target, reduction=reduction, **constants)
            assert (loss == 0).all() and total == 0 and loss.shape == ((N,) if reduction == "none" else ())
            options = {"ignore_index": -100, "reduction": reduction}
            grad = OPS["spherical_family_backward"](loss, logits, target, row_state, total, **options)
            assert grad.shape == (N, 6) and (grad == 0).all()
