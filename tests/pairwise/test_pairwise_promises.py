"""What the pairwise engine promises beside its numbers: strides, second backwards, threads, memory, any batch,
compiling, wrong arguments."""

import math

import contract  # noqa: F401  (marks this module for every backend)
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from contract import BACKEND, DEVICE, INTERPRETED
from pairwise_problems import LOSSES, PUBLIC, REDUCTIONS, TOLERANCE, WIDE, batch, call, leaves, number, truth

import tilewise
from tilewise.testing import allocated_bytes, relative_error


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
    scale=st.floats(-20, 20).filter(lambda s: s == 0 or abs(s) > 1e-30),  # below, different similarities round to one
    offset=st.one_of(st.none(), st.integers(-3, 15), st.sampled_from([-(2**63), 2**63 - 1])),
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


@pytest.mark.parametrize("name", ["hinge", "", "Softmax", "softmax "])
def test_unknown_losses_are_refused(name):
    arguments = [t.to(DEVICE) for t in (X, X, LABELS, LABELS, torch.tensor(1.0))]
    with pytest.raises((RuntimeError, ValueError), match=f"expected loss to be the name of a loss, got '{name}'"):
        torch.ops.tilewise.pairwise_loss(*arguments, loss=name, parameters=[])


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
