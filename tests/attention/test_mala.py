"""mala against the reference, and what is its own: decoding, packed sequences, strides, memory, the layers."""

import contract
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU

import tilewise
from tilewise.reference.mala import OPS as REFERENCE
from tilewise.testing import allocated_bytes, assert_accurate

WIDE = torch.float64 if NATIVE_CPU else torch.float32
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11} if NATIVE_CPU else {"rtol": 3e-4, "atol": 3e-5}
SHAPES = {  # B, H, Hk, N, M (None: causal needs M = N), D, Dv
    "plain": (2, 2, 2, 70, None, 16, 16),
    "grouped": (1, 4, 2, 37, 37, 12, 20),
    "cross": (2, 2, 1, 5, 150, 24, 8),
    "one token": (1, 2, 2, 1, 1, 16, 16),
    "wide": (1, 1, 1, 33, 33, 96, 40),
    "widest": (1, 1, 1, 17, 17, 256, 64),
}


def inputs(name="plain", dtype=WIDE, rope=False, causal=False):
    b, h, hk, n, m, d, dv = SHAPES[name]
    m = n if m is None or causal else m
    torch.manual_seed(0)
    q, k, v = (torch.randn(s).to(DEVICE, dtype) for s in ((b, h, n, d), (b, hk, m, d), (b, hk, m, dv)))
    angle = torch.randn(max(n, m), d // 2).to(DEVICE, dtype)
    return [t.requires_grad_() for t in (q, k, v)], (angle.cos(), angle.sin()) if rope else None


def truth(qkv, grad, causal, rope, scale=None, bounds=(None, None), state=(None,) * 3, seen=0, eps=1e-6):
    """Output and gradients of the reference in float64."""

    def wide(t):
        return None if t is None else t.detach().cpu().double() if t.is_floating_point() else t.cpu()

    options = {"causal": causal, "scale": scale or qkv[0].shape[3] ** -0.5, "eps": eps, "seen": seen}
    arguments = [*map(wide, qkv), *map(wide, rope or (None, None)), *map(wide, bounds), *map(wide, state)]
    out = REFERENCE["mala"](*arguments, **options)[0]
    return out, *REFERENCE["mala_backward"](wide(grad), *arguments, **options)


def value_and_gradients(qkv, grad, **options):
    out = tilewise.mala(*qkv, **options)
    return out, *torch.autograd.grad(out, qkv, grad)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_reference(name, causal, rope):
    qkv, angles = inputs(name, rope=rope, causal=causal)
    grad = torch.randn(*qkv[0].shape[:3], qkv[2].shape[3]).to(qkv[0])
    found = value_and_gradients(qkv, grad, causal=causal, rope=angles)
    for value, expected in zip(found, truth(qkv, grad, causal, angles), strict=True):
        torch.testing.assert_close(value.cpu().double(), expected, **TOLERANCE)


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal, rope):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 5, d, dtype=torch.float64, requires_grad=True) for h, d in ((2, 4), (1, 4), (1, 3)))
    angle = torch.randn(5, 2, dtype=torch.float64)
    angles = (angle.cos(), angle.sin()) if rope else None
    assert torch.autograd.gradcheck(lambda *qkv: tilewise.mala(*qkv, causal=causal, rope=angles, eps=1e-2), (q, k, v))


def test_weights_of_a_row_sum_to_one():
    """Values that are all one come back, without rotation."""
    (q, k, v), _ = inputs("cross")
    for causal in (False, True):
        keys, values = (k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]) if causal else (k, v)
        out = tilewise.mala(q, keys, torch.ones_like(values), causal=causal, eps=0.0)
        torch.testing.assert_close(out, torch.ones_like(out), **TOLERANCE)


@pytest.mark.parametrize("rope", [False, True])
def test_last_causal_row_sees_everything(rope):
    qkv, angles = inputs(rope=rope)
    both = [tilewise.mala(*qkv, causal=causal, rope=angles)[:, :, -1] for causal in (False, True)]
    torch.testing.assert_close(*both, **TOLERANCE)


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_decoding_step_by_step(name):
    """Tokens one at a time, and in pieces, from the state of those before."""
    qkv, _ = inputs(name, causal=True)
    qkv = [t.detach() for t in qkv]
    whole, last = tilewise.mala(*qkv, causal=True, return_state=True)
    n = whole.shape[2]
    for sizes in ([1] * min(n, 9), [min(20, n - 1), 1, 5]):
        state, begin = None, 0
        for size in sizes:
            part = [t[:, :, begin : begin + size] for t in qkv]
            out, state = tilewise.mala(*part, causal=True, state=state, return_state=True)
            torch.testing.assert_close(
                out, whole[:, :, begin : begin + size], rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"] * 10
            )
            begin += size
        assert state[3] == begin
    rest = tilewise.mala(*(t[:, :, begin:] for t in qkv), causal=True, state=state, return_state=True)[1]
    torch.testing.assert_close(rest[:3], last[:3], **TOLERANCE)


def test_gradients_after_a_state():
    qkv, _ = inputs(causal=True)
    first, second = ([t.detach()[:, :, part].requires_grad_() for t in qkv] for part in (slice(0, 30), slice(30, 70)))
    _, state = tilewise.mala(*first, causal=True, return_state=True)
    grad = torch.randn(2, 2, 40, 16).to(qkv[0])
    found = value_and_gradients(second, grad, causal=True, state=tuple(t.detach() for t in state[:3]) + (30,))
    expected = truth(second, grad, True, None, state=state[:3], seen=30)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value.cpu().double(), exact, **TOLERANCE)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal, rope):
    """As each sequence alone; empty ones too. Cross attention has lengths of its own for the keys."""
    torch.manual_seed(0)
    q_at = torch.tensor([0, 7, 7, 40, 41], dtype=torch.int32)
    k_at = q_at if causal else torch.tensor([0, 5, 9, 30, 50], dtype=torch.int32)
    q, k, v = (
        torch.randn(1, h, n, 8).to(DEVICE, WIDE).requires_grad_() for h, n in ((4, 41), (2, k_at[-1]), (2, k_at[-1]))
    )
    angle = torch.randn(max(q.shape[2], k.shape[2]), 4).to(q)
    angles = (angle.cos().detach(), angle.sin().detach()) if rope else None
    grad = torch.randn(1, 4, 41, 8).to(q)
    lengths = {"cu_seqlens": q_at.to(DEVICE), "cu_seqlens_k": None if causal else k_at.to(DEVICE)}
    found = value_and_gradients((q, k, v), grad, causal=causal, rope=angles, **lengths)
    expected = [torch.zeros_like(t) for t in found]
    for i in range(4):
        queries, keys = slice(q_at[i], q_at[i + 1]), slice(k_at[i], k_at[i + 1])
        part = [q.detach()[:, :, queries], k.detach()[:, :, keys], v.detach()[:, :, keys]]
        part = [t.requires_grad_() for t in part]
        own = None
        if rope:
            n = max(part[0].shape[2], part[1].shape[2])
            own = tuple(a[:n] for a in angles)
        alone = value_and_gradients(part, grad[:, :, queries], causal=causal, rope=own)
        for total, value, place in zip(expected, alone, (queries, queries, keys, keys), strict=True):
            total[:, :, place] = value
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, **TOLERANCE)


@pytest.mark.parametrize("causal", [False, True])
def test_strides(causal):
    """Views of (B, N, H, D), and features that do not lie side by side."""
    base = torch.randn(3, 2, 40, 4, 16, device=DEVICE)
    view = [t.transpose(1, 2).detach().requires_grad_() for t in base]
    odd = [t.transpose(1, 2).transpose(2, 3).contiguous().transpose(2, 3).detach().requires_grad_() for t in base]
    packed = [t.detach().contiguous().requires_grad_() for t in view]
    grad = torch.randn(2, 40, 4, 16, device=DEVICE).transpose(1, 2)
    expected = value_and_gradients(packed, grad.contiguous(), causal=causal)
    for qkv in (view, odd):
        for value, exact in zip(value_and_gradients(qkv, grad, causal=causal), expected, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)
    expanded = torch.autograd.grad(tilewise.mala(*packed, causal=causal).sum(), packed)
    ones = torch.autograd.grad(tilewise.mala(*packed, causal=causal), packed, torch.ones(2, 4, 40, 16, device=DEVICE))
    torch.testing.assert_close(expanded, ones, rtol=0, atol=0)


# elu(x) + 1 in 16 bits is all wrong at -12; of values that are alike the terms of a query's gradient cancel.
@pytest.mark.parametrize("shifts", [(0.0, 0.5), (-8.0, 0.5), (-12.0, 0.5), (0.0, 4.0)], ids=str)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_accuracy(dtype, shifts):
    """Against float64, judged by PyTorch's own operations in float32."""
    torch.manual_seed(0)
    n, (of_keys, of_values) = 40 if INTERPRETED else 300, shifts
    qkv = [(torch.randn(1, 2, n, 32) + shift).to(dtype) for shift in (of_keys, of_keys, of_values)]
    grad = torch.randn(1, 2, n, 32).to(dtype)
    for causal in (False, True):
        ours = value_and_gradients([t.to(DEVICE).requires_grad_() for t in qkv], grad.to(DEVICE), causal=causal)
        exact = truth(qkv, grad, causal, None)
        options = {"causal": causal, "scale": 32**-0.5, "eps": 1e-6}
        empty = (None,) * 7
        eager = [
            REFERENCE["mala"](*(t.float() for t in qkv), *empty, **options)[0].to(dtype),
            *REFERENCE["mala_backward"](grad.float(), *(t.float() for t in qkv), *empty, **options, seen=0),
        ]
        for what, mine, expected, theirs in zip("oqkv", ours, exact, eager, strict=True):
            assert mine.dtype == dtype
            assert_accurate(mine, expected, theirs.to(dtype), dtype, f"{what} causal={causal}", slack=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_empty(causal):
    for b, n, h in ((0, 5, 2), (2, 0, 2)):
        q, k, v = (torch.randn(b, h, n, 8, device=DEVICE, requires_grad=True) for _ in range(3))
        out = tilewise.mala(q, k, v, causal=causal)
        assert out.shape == (b, h, n, 8)
        assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [(b, h, n, 8)] * 3
    q, k = torch.randn(1, 2, 3, 8, device=DEVICE), torch.randn(1, 2, 0, 8, device=DEVICE)
    assert tilewise.mala(q, k, k).count_nonzero() == 0  # nothing to see


def test_same_bits_every_time():
    qkv = [torch.randn(2, 3, 50 if INTERPRETED else 5000, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    threads = torch.get_num_threads()
    for causal in (False, True):
        results = []
        for count in (threads, 1):
            torch.set_num_threads(count)
            out = tilewise.mala(*qkv, causal=causal)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_output_is_written():
    torch.use_deterministic_algorithms(True)
    try:
        for causal in (False, True):
            qkv, angles = inputs("grouped", dtype=torch.float32, rope=True)
            out = tilewise.mala(*qkv, causal=causal, rope=angles)
            grads = torch.autograd.grad(out.sum(), qkv)
            assert all(t.isfinite().all() for t in (out, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("causal", [False, True])
def test_saved_for_the_backward(causal):
    """The inputs, and per head the sums of the keys."""
    qkv, _ = inputs(dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tilewise.mala(*qkv, causal=causal)
    storages = {t.untyped_storage().data_ptr() for t in qkv}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in storages]
    assert sum(t.numel() for t in extra) <= (0 if causal else 2 * 2 * (16 * 16 + 16 + 16))


@pytest.mark.skipif(BACKEND == "reference", reason="the reference holds all weights")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's own tensors are not the kernel's")
@pytest.mark.parametrize("causal", [False, True])
def test_memory(causal):
    """Forward: the output and the sums. Backward: three gradients, and three numbers per token when causal."""
    n, d = 4096, 32
    qkv = [torch.randn(1, 2, n, d, device=DEVICE, requires_grad=True) for _ in range(3)]
    out = tilewise.mala(*qkv, causal=causal)
    tokens, sums = 4 * 2 * n * d, 4 * 2 * (d * d + 2 * d)
    assert allocated_bytes(lambda: tilewise.mala(*qkv, causal=causal), DEVICE) <= tokens + 4 * sums
    backward = allocated_bytes(lambda: torch.autograd.grad(out, qkv, out.detach(), retain_graph=True), DEVICE)
    assert backward <= 3 * tokens + 8 * sums + 4 * 2 * 3 * n * causal


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
@pytest.mark.skipif(BACKEND == "reference", reason="the reference's gradients are torch.func's, which is not traced")
@pytest.mark.parametrize("causal", [False, True])
def test_compile_and_export(causal):
    def step(q, k, v):
        return tilewise.mala(2 * q, k, v, causal=causal)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (20, 33):
        qkv = [torch.randn(2, 3, n, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
        results = []
        for function in (compiled, step):
            out = function(*qkv)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        torch.testing.assert_close(*results)

    class Step(torch.nn.Module):
        def forward(self, q, k, v):
            return step(q, k, v)

    qkv = tuple(t.detach() for t in qkv)
    torch.testing.assert_close(torch.export.export(Step(), qkv).module()(*qkv), step(*qkv))


@pytest.mark.skipif(INTERPRETED or BACKEND == "reference", reason="neither makes fake tensors")
def test_opcheck():
    qkv, _ = inputs(dtype=torch.float32)
    torch.library.opcheck(torch.ops.tilewise.mala.default, tuple(qkv), {"causal": False, "scale": 0.25, "eps": 1e-6})


def test_second_derivative_is_refused():
    qkv, _ = inputs(dtype=torch.float32)
    (gradient,) = torch.autograd.grad(tilewise.mala(*qkv).sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"tilewise\.mala: .*got a second"):
        gradient.sum().backward()


Q = torch.randn(1, 4, 6, 8)
SUMS = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((Q[0], Q, Q), {}, ValueError, r"q to have shape \(batch, heads, tokens, features\), got \(4, 6, 8\)"),
        ((Q, Q[..., :4], Q), {}, ValueError, r"k to have shape \(1, heads, tokens, 8\) like q"),
        ((Q, Q, Q[:, :, :3]), {}, ValueError, r"v to have shape \(1, 4, 6, 'Dv'\) like k, got \(1, 4, 3, 8\)"),
        ((Q, Q[:, :3], Q[:, :3]), {}, ValueError, "multiple of those of k, got 4 and 3"),
        ((Q, Q[:, :, :3], Q[:, :, :3]), {"causal": True}, ValueError, "as many queries as keys when causal, got 6"),
        ((Q, Q.double(), Q), {}, TypeError, "k to be torch.float32 like q, got torch.float64"),
        ((Q.long(), Q, Q), {}, TypeError, "q to be float64"),
        ((Q, Q, [Q]), {}, TypeError, "v to be a tensor, got list"),
        ((Q, Q, Q), {"eps": -1.0}, ValueError, r"eps to be a finite number in \[0, inf\], got -1.0"),
        ((Q, Q, Q), {"scale": float("nan")}, ValueError, "scale to be a finite number"),
        ((Q, Q, Q), {"rope": Q}, TypeError, r"rope to be a tuple \(cos, sin\)"),
        ((Q, Q, Q), {"rope": (Q[0, 0], Q[0, 0])}, ValueError, r"cos of rope to have shape \(6, 4\)"),
        ((Q, Q, Q), {"return_state": True}, ValueError, "causal=True with a state"),
        ((Q, Q, Q), {"cu_seqlens": torch.tensor([0.0, 6.0])}, ValueError, "cu_seqlens to be int64 or int32"),
        ((Q, Q, Q), {"cu_seqlens_k": torch.tensor([0, 6])}, ValueError, "cu_seqlens with cu_seqlens_k"),
        (
            (Q, Q, Q),
            {"causal": True, "cu_seqlens": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 6])},
            ValueError,
            "no cu_seqlens_k when causal",
        ),
        ((Q.expand(2, 4, 6, 8),) * 3, {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "a batch of 1"),
        ((Q, Q, Q), {"causal": True, "state": (Q, Q, Q, 3)}, ValueError, r"S of state to be torch.float32 of shape"),
        ((Q, Q, Q), {"causal": True, "state": (*SUMS, -1)}, ValueError, r"count below 2\^62, got -1"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        tilewise.mala(*arguments, **options)


@pytest.mark.skipif(BACKEND != "cpu", reason="a GPU's sequence bounds are not read by the host")
def test_bad_bounds():
    messages = {(0, 5): "to run from 0 to 6, got 0 to 5", (0, 4, 3, 6): "not to decrease, got 4 before 3"}
    for bounds, message in messages.items():
        with pytest.raises(RuntimeError, match=rf"tilewise\.mala: expected q_bounds {message}"):
            tilewise.mala(Q, Q, Q, cu_seqlens=torch.tensor(bounds))
    bounds = [torch.tensor([0, 1, 6]), torch.tensor([0, 5, 6])]
    with pytest.raises(RuntimeError, match="q_bounds and k_bounds to be equal when causal"):
        torch.ops.tilewise.mala(Q, Q, Q, None, None, *bounds, causal=True, scale=1.0, eps=0.0)


def test_attention_layer():
    """Shapes of nn.MultiheadAttention, and the function between the projections."""
    torch.manual_seed(0)
    layer = tilewise.nn.MALAttention(16, 2, batch_first=True, kdim=6, vdim=7).to(DEVICE)
    x, key, value = torch.randn(3, 5, 16), torch.randn(3, 9, 6), torch.randn(3, 9, 7)
    out, weights = layer(x.to(DEVICE), key.to(DEVICE), value.to(DEVICE))
    assert out.shape == (3, 5, 16) and weights is None
    heads = [
        projection(t.to(DEVICE)).unflatten(-1, (2, 8)).transpose(1, 2)
        for projection, t in ((layer.q_proj, x), (layer.k_proj, key), (layer.v_proj, value))
    ]
    expected = layer.out_proj(tilewise.mala(*heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)
    flipped = tilewise.nn.MALAttention(16, 2, kdim=6, vdim=7).to(DEVICE)
    flipped.load_state_dict(layer.state_dict())
    again = flipped(*(t.to(DEVICE).transpose(0, 1) for t in (x, key, value)))[0].transpose(0, 1)
    torch.testing.assert_close(again, out)
    causal = tilewise.nn.MALAttention(16, 4, causal=True, batch_first=True).to(DEVICE)
    x = x.to(DEVICE)
    torch.testing.assert_close(causal(x)[0][:, :3], causal(x[:, :3])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(causal(x[0])[0], causal(x)[0][0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no masks"):
        layer(x, attn_mask=torch.ones(5, 5))
    with pytest.raises(ValueError, match="num_heads to divide embed_dim, got 3 and 16"):
        tilewise.nn.MALAttention(16, 3)


def test_vision_layer():
    """The rotation knows the place: shifting an image by a row does not change what the attention compares."""
    torch.manual_seed(0)
    layer = tilewise.nn.MALA(16, 2).to(DEVICE)
    x = torch.randn(2, 6, 5, 16, device=DEVICE, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
    cos, sin = tilewise.nn.rotation_2d(6, 5, 8)
    angle = torch.atan2(sin, cos).unflatten(0, (6, 5))
    assert torch.equal(angle[:, :, :2], angle[:, :1, :2].expand(6, 5, 2)), "the first pairs turn with the row"
    torch.testing.assert_close(angle[1, :, 0], torch.ones(5))
    torch.testing.assert_close(angle[:, 2, 2], torch.full((6,), 2.0))
    with pytest.raises(ValueError, match=r"shape \(batch, height, width, 16\), got \(2, 16\)"):
        layer(x[0, 0, :2])
    with pytest.raises(ValueError, match="multiple of 4 channels"):
        tilewise.nn.MALA(12, 2)
