"""The CUDA kernels of mala, run on the emulator, against the reference in float64."""

import emulated
import pytest
import torch
from emulated import BFLOAT, FLOAT, HALF, ROUNDING, AttentionCall, Guards, TokenCall, checked, pointer

from tilewise.reference.mala import OPS as REFERENCE

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")

CASES = {  # B, H, Hk, N, M, D, Dv
    "one chunk": (1, 1, 1, 5, 5, 4, 3),
    "several chunks": (2, 2, 2, 70, 70, 16, 16),
    "grouped, odd tiles": (1, 4, 2, 37, 37, 36, 70),
    "several runs": (1, 1, 1, 270, 270, 6, 10),
    "cross": (1, 2, 1, 3, 600, 8, 8),
    "wide": (1, 1, 1, 33, 33, 256, 96),
    "wider than shared memory": (1, 1, 1, 9, 9, 640, 8),
}


@pytest.fixture(scope="module")
def library():
    return emulated.build()


def strided(guards, tensor):
    """The tensor as a view of (B, N, H, D), in guarded memory."""
    _, h, n, d = tensor.shape
    return guards.put(tensor, strides=(n * h * d, d, h * d, 1))


def run(library, q, k, v, grad, *, causal, rope=None, bounds=(None, None), state=None, seen=0):
    """Output, sums and gradients."""
    guards = Guards()
    dtype = q.dtype
    b, h, n, d = q.shape
    hk, m, dv = k.shape[1], k.shape[2], v.shape[3]
    sequences = b if bounds[0] is None else len(bounds[0]) - 1
    call = AttentionCall(dtype=emulated.DTYPES[dtype], sequences=sequences, heads=h, key_heads=hk, queries=n, keys=m)
    call.features, call.values, call.causal, call.seen, call.scale, call.eps = d, dv, causal, seen, d**-0.5, 1e-6
    held = {name: strided(guards, t) for name, t in {"q": q, "k": k, "v": v}.items()}
    out = strided(guards, torch.zeros(b, h, n, dv, dtype=dtype))
    sums = [guards.empty(sequences, hk, *size) for size in ((d, dv), (d,), (dv,))]
    for name, tensor in {**held, "out": out}.items():
        setattr(call, name, TokenCall.of(tensor))
    kept = [guards.put(t.float()) for t in rope] if rope else [None, None]
    call.cos, call.sin = map(pointer, kept)
    kept += [guards.put(t) if t is not None else None for t in bounds]
    call.q_bounds, call.k_bounds = map(pointer, kept[2:4])
    start = [guards.put(t.float()) for t in state] if state else [None] * 3
    call.start_s, call.start_z, call.start_u = map(pointer, start)
    call.s, call.z, call.u = map(pointer, sums)
    checked(library.attention(call))
    grads = [guards.empty(*t.shape, dtype=dtype) for t in (q, k, v)]
    held_grad = strided(guards, grad)
    call.grad_out = TokenCall.of(held_grad)
    call.grad_q, call.grad_k, call.grad_v = map(TokenCall.of, grads)
    checked(library.attention(call))
    guards.check()
    return [out, *sums, *grads]


def expect(found, q, k, v, grad, *, causal, rope=None, bounds=(None, None), state=None, seen=0):
    def wide(t):
        return None if t is None else t.double() if t.is_floating_point() else t

    options = {"causal": causal, "scale": q.shape[3] ** -0.5, "eps": 1e-6, "seen": seen}
    arguments = [*map(wide, (q, k, v, *(rope or (None, None)))), *bounds, *map(wide, state or [None] * 3)]
    truth = [*REFERENCE["mala"](*arguments, **options), *REFERENCE["mala_backward"](wide(grad), *arguments, **options)]
    for name, value, exact in zip(("out", "s", "z", "u", "dq", "dk", "dv"), found, truth, strict=True):
        error = (value.double() - exact).norm() / (exact.norm() + 1e-30)
        assert error <= 2e-5 + ROUNDING[value.dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES])
def test_against_the_reference(library, name, causal, rope, dtype):
    if dtype != FLOAT and name not in ("one chunk", "grouped, odd tiles"):
        dtype = FLOAT  # the storage type does not depend on the sizes
    torch.manual_seed(0)
    b, h, hk, n, m, d, dv = CASES[name]
    m = n if causal else m
    q, k, v, grad = (torch.randn(s).to(dtype) for s in ((b, h, n, d), (b, hk, m, d), (b, hk, m, dv), (b, h, n, dv)))
    angle = torch.randn(max(n, m), d // 2)
    options = {"causal": causal, "rope": (angle.cos(), angle.sin()) if rope else None}
    expect(run(library, q, k, v, grad, **options), q, k, v, grad, **options)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_values_that_are_alike(library, causal, dtype):
    """The terms of the queries' gradient cancel: S has more bits than the values."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, 140, 8).to(dtype) for _ in range(4))
    v += 4
    expect(run(library, q, k, v, grad, causal=causal), q, k, v, grad, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(library, causal):
    torch.manual_seed(0)
    q_at = torch.tensor([0, 7, 7, 48])
    k_at = q_at if causal else torch.tensor([0, 40, 43, 50])
    q, grad = torch.randn(1, 4, 48, 8), torch.randn(1, 4, 48, 6)
    k, v = torch.randn(1, 2, int(k_at[-1]), 8), torch.randn(1, 2, int(k_at[-1]), 6)
    angle = torch.randn(50, 4)
    options = {"causal": causal, "rope": (angle.cos(), angle.sin()), "bounds": (q_at, k_at)}
    expect(run(library, q, k, v, grad, **options), q, k, v, grad, **options)


def test_after_a_state(library):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 40, 8) for _ in range(4))
    before = torch.randn(1, 2, 9, 8).abs()
    state = [before.transpose(2, 3) @ before, before.sum(2), torch.randn(1, 2, 8)]
    options = {"causal": True, "state": state, "seen": 9}
    expect(run(library, q, k, v, grad, **options), q, k, v, grad, **options)
