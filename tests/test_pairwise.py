"""The pairwise engine: every loss against the reference that holds the whole matrix, and what is its own: memory,
learnable scales, second backwards, threads, hard batches, wrong arguments."""

import math

import contract
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU

import tilewise
from tilewise.reference.pairwise import OPS as REFERENCE
from tilewise.testing import allocated_bytes, assert_accurate, relative_error

LOSSES = {
    "softmax": [],
    "decoupled_softmax": [],
    "sigmoid": [],
    "multi_similarity": [2.0, 50.0, 0.5, 0.1],
    "multi_similarity of all pairs": [2.0, 50.0, 0.5, math.inf],
    "binomial_deviance": [2.0, 10.0, 0.4],
    "lifted_structure": [1.0, 0.2],
    "contrastive": [0.9, 0.1],
    "triplet": [0.2],
    "log_sum_exp": [],
    "positive_sum": [],
    "least_positive": [],
    "most_negative": [],
    "window_log_sum_exp": [-2.0, 0.3, 1.0],
}
REDUCTIONS = ("none", "sum", "mean", "mean_active")
WIDE = torch.float64 if NATIVE_CPU else torch.float32
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11} if NATIVE_CPU else {"rtol": 2e-4, "atol": 2e-5}


def batch(n=7 if INTERPRETED else 23, m=None, d=7, dtype=WIDE, classes=6):
    """x, y (x itself without m), and labels with classes of one member and classes that y lacks."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d), dim=1)
    y = x if m is None else F.normalize(torch.randn(m, d), dim=1)
    x_labels = torch.randint(0, classes, (n,))
    y_labels = x_labels if m is None else torch.randint(1, classes + 1, (m,))
    if n > 2 and m is None:
        x_labels[2] = 99
    return [t.to(DEVICE, dtype) for t in (x, y)] + [t.to(DEVICE) for t in (x_labels, y_labels)]


def number(value, dtype=WIDE):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def call(arguments, *, loss, **options):
    return torch.ops.tilewise.pairwise_loss(
        *arguments, loss=loss.removesuffix(" of all pairs"), parameters=LOSSES[loss], **options
    )


def truth(arguments, *, loss, **options):
    wide = [
        t.cpu().double() if t is not None and t.is_floating_point() else None if t is None else t.cpu()
        for t in arguments
    ]
    return REFERENCE["pairwise_loss"](
        *wide, loss=loss.removesuffix(" of all pairs"), parameters=LOSSES[loss], **options
    )


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("columns", [None, 40, 3])
@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_active"])
@pytest.mark.parametrize("loss", LOSSES)
def test_formed_gradients(loss, reduction, columns, guided):
    """The forward's own: losses, active rows, gradients of the sum; several chunks of rows, the last of them short."""
    x, y, x_labels, y_labels = batch(m=columns)
    guide = [torch.randn(len(t), 3).to(x) for t in (x, y)] if guided else [None, None]
    arguments = [x, y, x_labels, y_labels, number(4.0), number(-0.3), *guide]
    options = {
        "loss": loss,
        "reduction": reduction,
        "self_offset": 0 if columns is None else None,
        "guide_margin": 0.1,
        **{f"form_{name}_grad": True for name in ("x", "y", "bias")},
    }
    found = call(arguments, chunk_bytes=5 * len(y) * x.element_size(), **options)
    for value, expected in zip(found, truth(arguments, **options), strict=True):
        torch.testing.assert_close(value.cpu().double(), expected, **TOLERANCE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_backward_operator(loss, reduction):
    x, y, x_labels, y_labels = batch()
    grad = torch.randn(len(x)).to(x) if reduction == "none" else number(-1.7)
    arguments = [x, y, x_labels, y_labels, number(4.0), None, None, None]
    forward = call(arguments, loss=loss, reduction=reduction, self_offset=0)
    expected = truth(arguments, loss=loss, reduction=reduction, self_offset=0)
    torch.testing.assert_close(forward[0].cpu().double(), expected[0], **TOLERANCE)
    assert [g.shape for g in forward[2:]] == [(0,)] * 3
    options = {
        "loss": loss.removesuffix(" of all pairs"),
        "parameters": LOSSES[loss],
        "self_offset": 0,
        "guide_margin": 0.0,
        "reduction": reduction,
        "chunk_bytes": 700,
    }
    options |= {"x_grad": True, "y_grad": True, "bias_grad": True}
    found = torch.ops.tilewise.pairwise_loss_backward(grad, *arguments, forward[1], **options)
    wide = [None if t is None else t.cpu().double() if t.is_floating_point() else t.cpu() for t in arguments]
    want = REFERENCE["pairwise_loss_backward"](grad.cpu().double(), *wide, forward[1].cpu().double(), **options)
    for value, exact in zip(found, want, strict=True):
        torch.testing.assert_close(value.cpu().double(), exact, **TOLERANCE)


PUBLIC = {
    "multi_similarity_loss": lambda x, y, labels, **o: tilewise.multi_similarity_loss(x, labels, **o),
    "references": lambda x, y, labels, **o: tilewise.multi_similarity_loss(
        x, labels, ref_embeddings=y, ref_labels=labels, epsilon=0.3, **o
    ),
    "supcon": lambda x, y, labels, **o: tilewise.supcon(x, labels, **o),
    "decoupled": lambda x, y, labels, **o: tilewise.supcon(x, labels, decoupled=True, temperature=0.3, **o),
    "info_nce": lambda x, y, labels, **o: tilewise.info_nce(x, y, temperature=0.2, **o),
    "nt_xent": lambda x, y, labels, **o: tilewise.nt_xent(x, y, **o),
    "clip_loss": lambda x, y, labels, **o: tilewise.clip_loss(x, y, 3.0, **o),
    "siglip_loss": lambda x, y, labels, **o: tilewise.siglip_loss(x, y, 3.0, -1.0, **o),
    "binomial_deviance": lambda x, y, labels, **o: tilewise.pair_weighted_loss(
        x, labels, tilewise.weighting.BinomialDeviance(), **o
    ),
    "contrastive": lambda x, y, labels, **o: tilewise.pair_weighted_loss(
        x, labels, tilewise.weighting.Contrastive(), **o
    ),
    "triplet": lambda x, y, labels, **o: tilewise.pair_weighted_loss(x, labels, tilewise.weighting.Triplet(), **o),
    "lifted_structure": lambda x, y, labels, **o: tilewise.pair_weighted_loss(
        x, labels, tilewise.weighting.LiftedStructure(), **o
    ),
}


def leaves(n=11, d=5, dtype=WIDE):
    torch.manual_seed(1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5])[torch.arange(n) % 11].to(DEVICE)
    return (
        torch.randn(n, d).to(DEVICE, dtype).requires_grad_(),
        torch.randn(n, d).to(DEVICE, dtype).requires_grad_(),
        labels,
    )


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("reduction", ["none", "mean", "mean_active"])
@pytest.mark.parametrize("name", PUBLIC)
def test_gradcheck(name, reduction):
    x, y, labels = leaves()

    def function(x, y):
        return PUBLIC[name](x, y, labels, reduction=reduction) + 0 * y.sum()

    # What the forward formed and what a later backward forms are sums in another order.
    assert torch.autograd.gradcheck(function, (x, y), nondet_tol=1e-12)


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_scale_bias_and_temperature(frozen):
    x, y, labels = leaves()
    if frozen:
        x, y = x.detach(), y.detach()
    two = torch.tensor([2.0, -0.7], dtype=torch.float64, requires_grad=True)
    functions = [
        lambda t: tilewise.siglip_loss(x, y, t[0], t[1]),
        lambda t: tilewise.siglip_loss(x, y, t[0], t[1], reduction="none"),
        lambda t: tilewise.clip_loss(x, y, t[0]) + t[1],
        lambda t: tilewise.info_nce(x, y, temperature=t[0]) + t[1],
        lambda t: tilewise.supcon(x, labels, temperature=t[0], reduction="mean_active") + t[1],
        lambda t: tilewise.nt_xent(x, y, temperature=t[0]) + t[1],
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (two,), nondet_tol=1e-12)


def test_formulas():
    """The public functions against what a user would write with the matrix in hand."""
    x, y, _ = leaves(dtype=torch.float32)
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    index = torch.arange(len(x), device=DEVICE)
    both = torch.cat([u, v])
    views = (both @ both.t() / 0.5).fill_diagonal_(-math.inf)
    sign = 2 * torch.eye(len(x), device=DEVICE) - 1
    pairs = [
        (tilewise.info_nce(x, y, temperature=0.2), F.cross_entropy(u @ v.t() / 0.2, index)),
        (tilewise.info_nce(x[:5], y, temperature=0.2), F.cross_entropy(u[:5] @ v.t() / 0.2, index[:5])),
        (tilewise.nt_xent(x, y), F.cross_entropy(views, torch.cat([index + len(x), index]))),
        (
            tilewise.clip_loss(x, y, 3.0),
            (F.cross_entropy(3 * x @ y.t(), index) + F.cross_entropy(3 * y @ x.t(), index)) / 2,
        ),
        (tilewise.siglip_loss(x, y, 3.0, -1.0), F.softplus(-sign * (3 * x @ y.t() - 1)).sum() / len(x)),
    ]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)
        for mine, theirs in zip(
            torch.autograd.grad(ours, (x, y)), torch.autograd.grad(expected, (x, y), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)


def test_guide_masks_false_negatives():
    x, y, _ = leaves(dtype=torch.float32)
    guide_x, guide_y = torch.randn(2, len(x), 4, device=DEVICE).unbind()
    s = F.normalize(x, dim=1) @ F.normalize(y, dim=1).t() / 0.07
    guide = F.normalize(guide_x, dim=1) @ F.normalize(guide_y, dim=1).t()
    own = torch.eye(len(x), dtype=torch.bool, device=DEVICE)
    s = s.masked_fill((guide > guide.diagonal()[:, None] - 0.1) & ~own, -math.inf)
    ours = tilewise.info_nce(x, y, guide_query=guide_x, guide_key=guide_y, guide_margin=0.1)
    torch.testing.assert_close(ours, F.cross_entropy(s, torch.arange(len(x), device=DEVICE)), rtol=1e-5, atol=1e-6)


def test_a_function_as_weighting():
    """What a user writes with PyTorch equals the kernels', in chunks of one anchor too."""
    x, _, labels = leaves(n=11 if INTERPRETED else 44, dtype=torch.float32)

    def contrastive(s, positive, negative):
        def mean(gap, mask):
            return (torch.relu(gap) * mask).sum(1) / mask.sum(1).clamp(min=1)

        return mean(1.0 - s, positive) + mean(s - 0.5, negative)

    for reduction in REDUCTIONS:
        for size in (2**20, 1):
            tilewise.ops.pair_weighted_loss.CHUNK, kept = size, tilewise.ops.pair_weighted_loss.CHUNK
            ours = tilewise.pair_weighted_loss(x, labels, contrastive, reduction=reduction)
            tilewise.ops.pair_weighted_loss.CHUNK = kept
            built_in = tilewise.pair_weighted_loss(x, labels, tilewise.weighting.Contrastive(), reduction=reduction)
            torch.testing.assert_close(ours, built_in, rtol=1e-5, atol=1e-6)
            grads = [torch.autograd.grad(loss.square().sum(), x)[0] for loss in (ours, built_in)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"weighting to return losses of shape \(\d+,\), got \(\)"):
        tilewise.pair_weighted_loss(x, labels, lambda s, p, n: s.sum())


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["multi_similarity_loss", "supcon", "info_nce", "siglip_loss"])
def test_accuracy(name, dtype):
    """Against float64, judged by the same composition of PyTorch's operations in the type."""
    torch.manual_seed(2)
    n, d = (16, 16) if INTERPRETED else (300, 32)
    labels = torch.arange(n) // 4
    base = torch.randn(n, d) + 2 * torch.randn(n // 4, d).repeat_interleave(4, 0)
    other = base + torch.randn(n, d)

    def run(dtype, device, wide=None):
        x, y = (t.to(dtype).to(wide or dtype).to(device).requires_grad_() for t in (base, other))
        loss = PUBLIC[name](x, y, labels.to(device), reduction="mean")
        return loss, *torch.autograd.grad(loss, (x, y), allow_unused=True, materialize_grads=True)

    with tilewise.backend("reference"):
        exact = run(dtype, "cpu", torch.float64)
        eager = run(dtype, "cpu")
    ours = run(dtype, DEVICE)
    for what, mine, expected, theirs in zip(("loss", "x", "y"), ours, exact, eager, strict=True):
        if expected.count_nonzero():
            assert_accurate(mine, expected, theirs, dtype, what)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_types_and_hard_batches(name, dtype):
    """One class, all distinct, equal embeddings, one row: finite, in the type of the embeddings."""
    for kind in ("one class", "distinct", "equal", "one row"):
        n = 1 if kind == "one row" else 8
        x, y = (torch.randn(n, 4, device=DEVICE).to(dtype).requires_grad_() for _ in range(2))
        labels = torch.zeros(n, dtype=torch.int32) if kind == "one class" else torch.arange(n, dtype=torch.int32)
        if kind == "equal":
            x = torch.ones(n, 4, device=DEVICE, dtype=dtype, requires_grad=True)
        loss = PUBLIC[name](x, y, labels.to(DEVICE))
        grads = torch.autograd.grad(loss, (x, y), allow_unused=True)
        assert loss.isfinite() and loss.dtype == torch.float32
        assert all(g is None or (g.dtype == dtype and g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("name", PUBLIC)
def test_no_rows(name):
    x, y = (torch.randn(0, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for reduction in ("mean", "mean_active", "sum"):
        loss = PUBLIC[name](x, y, labels, reduction=reduction)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, x)[0].shape == (0, 4)
    assert PUBLIC[name](x, y, labels, reduction="none").shape == (0,)


def test_no_columns():
    x, labels = torch.randn(3, 4, device=DEVICE, requires_grad=True), torch.arange(3, device=DEVICE)
    y = torch.randn(0, 4, device=DEVICE, requires_grad=True)
    for function in (tilewise.supcon, tilewise.multi_similarity_loss):
        loss = function(x, labels, ref_embeddings=y, ref_labels=labels[:0])
        dx, dy = torch.autograd.grad(loss, (x, y))
        assert loss.item() == 0 and dx.count_nonzero() == 0 and dy.shape == (0, 4)


def test_duplicates_are_pairs():
    """An anchor is left out by its index: equal embeddings of one label are positives at similarity 1."""
    x = torch.ones(3, 4, device=DEVICE)
    loss = tilewise.multi_similarity_loss(x, torch.tensor([0, 0, 1], device=DEVICE), reduction="none")
    pull, push = math.log1p(math.exp(-1.0)) / 2, math.log1p(math.exp(25.0)) / 50
    torch.testing.assert_close(loss, torch.tensor([pull + push, pull + push, 0.0], device=DEVICE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "positives, negatives, pulled, pushed",
    [((1.0, 0.25), (0.5,), 0.25, 0.5), ((0.75,), (0.25, 0.5), 0.75, 0.5)],
)
def test_mining_is_strict(positives, negatives, pulled, pushed):
    """A pair exactly epsilon from the hardest of the other kind is not kept."""
    similarities = torch.tensor([[*positives, *negatives]], device=DEVICE)
    labels = torch.tensor([1] * len(positives) + [2] * len(negatives), device=DEVICE)
    options = {"ref_embeddings": similarities.t(), "ref_labels": labels, "epsilon": 0.5, "normalize": False}
    arguments = torch.ones(1, 1, device=DEVICE), torch.tensor([1], device=DEVICE)
    expected = math.log1p(math.exp(-2 * (pulled - 0.5))) / 2 + math.log1p(math.exp(2 * (pushed - 0.5))) / 2
    assert tilewise.multi_similarity_loss(*arguments, beta=2.0, **options).item() == pytest.approx(expected, rel=1e-5)
    assert [len(t) for t in tilewise.multi_similarity_mine(*arguments, **options)] == [1] * 4


def test_nan_stays_nan():
    x, labels = torch.randn(6, 4, device=DEVICE), torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE)
    x[1] = math.nan
    assert tilewise.supcon(x, labels).isnan() and tilewise.nt_xent(x[:3], x[3:]).isnan()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(layout):
    base = torch.randn(16, 16, device=DEVICE)
    x = {"transposed": base.t()[:9, :7], "sliced": base[1:10, 2:9], "expanded": base[:1, :7].expand(9, 7)}[layout]
    labels = torch.arange(9, device=DEVICE) // 2

    def run(x):
        x = x.detach().requires_grad_()
        loss = tilewise.supcon(x, labels, normalize=False)
        return loss, torch.autograd.grad(loss, x)[0]

    torch.testing.assert_close(run(x), run(x.contiguous()), rtol=1e-5, atol=5e-5)  # equal rows: gradients cancel


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward(reduction):
    """The first backward hands out what the forward formed, later ones form it again; nothing handed out changes."""
    x, y, _ = leaves(dtype=torch.float32)
    scale, bias = (torch.tensor(v, device=DEVICE, requires_grad=True) for v in (2.0, -1.0))
    inputs = (x, y, scale, bias)
    loss = tilewise.siglip_loss(*inputs, reduction=reduction).sum()
    first = torch.autograd.grad(loss, inputs, torch.tensor(2.0).to(DEVICE), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, inputs, torch.tensor(-6.0).to(DEVICE), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(relative_error(a, -3 * b) < 1e-5 for a, b in zip(second, first, strict=True))
    for leaf, expected in zip(inputs, first, strict=True):
        alone = torch.autograd.grad(tilewise.siglip_loss(*inputs, reduction=reduction).sum(), leaf)[0]
        assert relative_error(2 * alone, expected) < 1e-5


def test_second_derivative_is_refused():
    x, _, labels = leaves(dtype=torch.float32)
    (gradient,) = torch.autograd.grad(tilewise.supcon(x, labels), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tilewise\.pairwise_loss: .*got a second"):
        gradient.sum().backward()


def test_same_bits_every_time():
    x, _, labels = leaves(n=700, d=33, dtype=torch.float32) if not INTERPRETED else leaves(dtype=torch.float32)
    for function in (tilewise.multi_similarity_loss, tilewise.supcon):
        results = []
        threads = torch.get_num_threads()
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            loss = function(x, labels)
            results.append((loss, torch.autograd.grad(loss, x)[0]))
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_every_output_is_written():
    """Deterministic mode fills fresh memory with NaN: an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        for name in PUBLIC:
            x, y, labels = leaves(dtype=torch.float32)
            for reduction in ("none", "mean"):
                loss = PUBLIC[name](x, y, labels, reduction=reduction)
                grads = torch.autograd.grad(loss.sum(), (x, y), allow_unused=True)
                assert loss.isfinite().all() and all(g is None or g.isfinite().all() for g in grads), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(BACKEND == "reference", reason="the reference holds the big matrix")
@pytest.mark.skipif(INTERPRETED, reason="thousands of programs, one after the other")
@pytest.mark.parametrize("name", ["multi_similarity_loss", "supcon", "siglip_loss"])
def test_memory(name):
    """A chunk of rows and a few vectors per embedding, not (N, N): 36 MB here."""
    n, d = 3000, 16
    x, y = (torch.randn(n, d, device=DEVICE, requires_grad=True) for _ in range(2))
    labels = torch.arange(n, device=DEVICE) // 4
    chunk = 4 * 2**20 if DEVICE == "cpu" else 4 * n * n
    run = lambda: PUBLIC[name](x, y, labels).backward()  # noqa: E731
    assert allocated_bytes(run, DEVICE) <= chunk + 4 * n * (8 * d + 24)


def test_frozen_side_costs_nothing():
    x, y, _ = leaves(dtype=torch.float32)
    wanted = {}
    for name, inputs in {"x": (x, y.detach()), "y": (x.detach(), y)}.items():
        loss = tilewise.info_nce(*inputs, normalize=False)
        node = loss.grad_fn
        while not hasattr(node, "formed"):
            node = node.next_functions[0][0]
        wanted[name] = [g is not None for g in node.formed]
    assert wanted == {"x": [True, False, False], "y": [False, True, False]}


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
@pytest.mark.parametrize("name", ["multi_similarity_loss", "siglip_loss", "clip_loss"])
def test_compile_and_export(name):
    x, y, labels = leaves(dtype=torch.float32)

    def step(x, y, labels):
        return PUBLIC[name](2 * x, y, labels)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (11, 7):
        inputs = x[:n].detach().requires_grad_(), y[:n].detach().requires_grad_()
        results = []
        for function in (compiled, step):
            loss = function(*inputs, labels[:n])
            results.append((loss, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)))
        torch.testing.assert_close(*results)

    class Step(torch.nn.Module):
        def forward(self, x, y, labels):
            return step(x, y, labels)

    exported = torch.export.export(Step(), (x.detach(), y.detach(), labels)).module()
    torch.testing.assert_close(exported(x, y, labels), step(x, y, labels))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter makes no fake tensors")
@pytest.mark.parametrize("reduction", ["none", "mean_active"])
def test_opcheck(reduction):
    x, y, x_labels, y_labels = batch(dtype=torch.float32)
    arguments = (x.requires_grad_(), y.detach().requires_grad_(), x_labels, y_labels, number(2.0, torch.float32))
    options = {"loss": "softmax", "parameters": [], "self_offset": 0, "reduction": reduction}
    torch.library.opcheck(torch.ops.tilewise.pairwise_loss.default, arguments, options)


def test_autocast():
    """Under autocast the embeddings take its type on a GPU; on a CPU nothing is lost."""
    x, _, labels = leaves(dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = tilewise.supcon(x, labels)
    expected = tilewise.supcon(x, labels)
    torch.testing.assert_close(loss, expected, rtol=2e-2 if DEVICE == "cuda" else 0, atol=0)


def test_a_function_runs_once_for_a_reduced_loss():
    x, _, labels = leaves(dtype=torch.float32)
    calls = []

    def function(s, positive, negative):
        calls.append(s.requires_grad)
        return (torch.relu(1 - s) * positive).sum(1)

    tilewise.pair_weighted_loss(x, labels, function).backward()
    assert calls == [True]
    tilewise.pair_weighted_loss(x, labels, function, reduction="none").sum().backward()
    assert calls == [True, False, True]


def test_miners_and_functions_under_autocast():
    """Similarities are float32 there too: the same pairs, the same loss."""
    x, _, labels = leaves(n=40, dtype=torch.float32)
    loss = lambda: tilewise.pair_weighted_loss(x, labels, lambda s, p, n: (s * p - s.abs() * n).sum(1))  # noqa: E731
    expected = tilewise.multi_similarity_mine(x, labels, epsilon=0.01), loss().detach()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = tilewise.multi_similarity_mine(x, labels, epsilon=0.01), loss().detach()
    if DEVICE == "cpu":  # a GPU's embeddings take autocast's type
        torch.testing.assert_close(found, expected)


@hypothesis.settings(deadline=None, max_examples=10 if INTERPRETED else 60)
@hypothesis.given(
    loss=st.sampled_from(list(LOSSES)),
    n=st.integers(1, 12),
    m=st.integers(1, 40),
    classes=st.integers(1, 8),
    scale=st.floats(-20, 20),
    offset=st.one_of(st.none(), st.integers(-3, 15)),
    seed=st.integers(0, 1000),
)
def test_any_batch(loss, n, m, classes, scale, offset, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(n, 3).to(DEVICE, WIDE), torch.randn(m, 3).to(DEVICE, WIDE)
    labels = [torch.randint(0, classes, (k,)).to(DEVICE) for k in (n, m)]
    arguments = [x, y, *labels, number(scale), None, None, None]
    options = {"loss": loss, "reduction": "sum", "self_offset": offset, "form_x_grad": True, "form_y_grad": True}
    for value, expected in zip(call(arguments, **options), truth(arguments, **options), strict=True):
        torch.testing.assert_close(
            value.cpu().double(), expected, rtol=TOLERANCE["rtol"] * 10, atol=TOLERANCE["atol"] * 100
        )


X, LABELS = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    "function, error, message",
    [
        (lambda: tilewise.supcon(X[0], LABELS), ValueError, r"supcon: expected embeddings to be 2-D, got shape \(3,\)"),
        (lambda: tilewise.supcon(X.long(), LABELS), TypeError, "embeddings to be float64.*got torch.int64"),
        (lambda: tilewise.supcon(X, LABELS[:3]), ValueError, r"labels to have shape \(4,\), got \(3,\)"),
        (lambda: tilewise.supcon(X, LABELS.float()), TypeError, "labels to hold integers, got torch.float32"),
        (lambda: tilewise.supcon(X, [0, 0, 1, 1]), TypeError, "labels to be a tensor, got list"),
        (lambda: tilewise.supcon(X, LABELS, temperature=0.0), ValueError, "temperature to be a finite number above 0"),
        (lambda: tilewise.supcon(X, LABELS, temperature=X), ValueError, "temperature to be a number or a floating"),
        (lambda: tilewise.supcon(X, LABELS, reduction="median"), ValueError, "'mean_active', got 'median'"),
        (lambda: tilewise.supcon(X, LABELS, ref_embeddings=X), ValueError, "together, got no ref_labels"),
        (
            lambda: tilewise.supcon(X, LABELS, ref_embeddings=X[:, :2], ref_labels=LABELS),
            ValueError,
            r"ref_embeddings to have shape \(M, 3\) like embeddings, got \(4, 2\)",
        ),
        (
            lambda: tilewise.supcon(X, LABELS, ref_embeddings=X.double(), ref_labels=LABELS),
            TypeError,
            "ref_embeddings to be torch.float32 like embeddings, got torch.float64",
        ),
        (lambda: tilewise.multi_similarity_loss(X, LABELS, alpha=0), ValueError, "alpha to be a finite number above 0"),
        (lambda: tilewise.multi_similarity_loss(X, LABELS, epsilon=math.nan), ValueError, "epsilon to be a finite"),
        (lambda: tilewise.info_nce(X, X[:3]), ValueError, r"at least as many rows as query, got \(3, 3\) and \(4, 3\)"),
        (lambda: tilewise.info_nce(X, X, guide_query=X), ValueError, "together, got no guide_key"),
        (
            lambda: tilewise.info_nce(X, X, guide_query=X[:3], guide_key=X),
            ValueError,
            "guide_query to have as many rows as query",
        ),
        (lambda: tilewise.nt_xent(X, X[:3]), ValueError, r"z2 to have shape \(4, 3\) like z1, got \(3, 3\)"),
        (lambda: tilewise.clip_loss(X, X[:3], 1.0), ValueError, r"text to have shape \(4, 3\) like image"),
        (lambda: tilewise.siglip_loss(X, X, math.inf), ValueError, "logit_scale to be a finite number"),
        (lambda: tilewise.pair_weighted_loss(X, LABELS, "triplet"), TypeError, "weighting to be of .*got str"),
        (lambda: tilewise.weighting.MultiSimilarity(alpha=-1), ValueError, "alpha to be a finite number above 0"),
        (lambda: tilewise.multi_similarity_mine(X, LABELS, epsilon=math.inf), ValueError, "epsilon to be a finite"),
    ],
)
def test_bad_arguments(function, error, message):
    with pytest.raises(error, match=message):
        function()


@pytest.mark.skipif(BACKEND != "cpu", reason="the checks of the C++ operator itself")
def test_bad_arguments_of_the_operator():
    good = dict(x=X, y=X, x_labels=LABELS, y_labels=LABELS, scale=torch.tensor(1.0), loss="softmax", parameters=[])
    for change, message in [
        ({"loss": "hinge"}, "loss to be the name of a loss, got 'hinge'"),
        ({"parameters": [1.0]}, "expected 0 parameters of loss 'softmax', got 1"),
        ({"y": X[:, :2]}, r"expected y to have shape \(4, 3\), got \(4, 2\)"),
        ({"y": X.double()}, "expected y to have dtype Float, got Double"),
        ({"x": X.half(), "y": X.half()}, "x to be float32 or float64 on a CPU, got Half"),
        ({"x_labels": LABELS[:2]}, r"expected x_labels to have shape \(4,\), got \(2,\)"),
        ({"y_labels": LABELS.int()}, "expected y_labels to have dtype Long, got Int"),
        ({"scale": torch.ones(2)}, r"expected scale to have shape \(\), got \(2,\)"),
        ({"guide_x": X}, "guide_x and guide_y together"),
        ({"guide_x": X, "guide_y": X[:2]}, "as many rows in guide_x and guide_y"),
        ({"reduction": "median"}, "'none', 'sum', 'mean' or 'mean_active', got 'median'"),
        ({"chunk_bytes": -1}, "chunk_bytes not below 0, got -1"),
    ]:
        with pytest.raises(RuntimeError, match=r"tilewise\.pairwise_loss: .*" + message):
            torch.ops.tilewise.pairwise_loss(**good | change)


def test_semihard_against_loops():
    torch.manual_seed(3)
    x, labels = F.one_hot(torch.randint(0, 4, (14,))).float().to(DEVICE) + 0.1, torch.arange(14, device=DEVICE) % 4
    u = F.normalize(x, dim=1)
    s = (u @ u.t()).cpu()
    expected = []
    for a in range(14):
        for p in range(14):
            if a == p or a % 4 != p % 4:
                continue
            below = [(s[a, n].item(), -n) for n in range(14) if n % 4 != a % 4 and s[a, n] < s[a, p]]
            if below:
                expected.append((a, p, -max(below)[1]))
    found = tilewise.semihard_mine(x, labels)
    assert list(zip(*(t.tolist() for t in found), strict=True)) == expected


def test_miners_in_chunks(monkeypatch):
    x, _, labels = leaves(dtype=torch.float32)
    for mine in (tilewise.multi_similarity_mine, tilewise.batch_hard_mine, tilewise.semihard_mine):
        whole = mine(x, labels)
        monkeypatch.setattr("tilewise.ops.mining.CHUNK", 30)
        assert all(torch.equal(a, b) for a, b in zip(whole, mine(x, labels), strict=True))
        monkeypatch.undo()
        assert all(t.shape == (0,) and t.dtype == torch.int64 for t in mine(x[:0], labels[:0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative_of_a_function_is_refused(reduction):
    """Also where the upstream gradient is a constant: the first gradient must not pass for one."""
    x = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    loss = tilewise.pair_weighted_loss(
        x, torch.arange(6, device=DEVICE) // 2, lambda s, p, n: (s * s * n - s * p).sum(1), reduction=reduction
    )
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient.detach(), plain)
    with pytest.raises(RuntimeError, match=r"tilewise\.pair_weighted_loss: expected one differentiation"):
        gradient.square().sum().backward()
