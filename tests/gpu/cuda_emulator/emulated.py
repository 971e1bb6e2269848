"""Builds the .cu files for the CPU emulator and calls their launch functions on CPU tensors through ctypes.

Every tensor a kernel sees lies inside a larger buffer of NaNs (floating) or a sentinel (integers), so a read outside
it shows in the result and a write outside it is found by `check_guards`.
"""

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
SOURCES = [*sorted(ROOT.glob("csrc/*/*_cuda.cu")), *sorted(HERE.glob("driver*.cpp"))]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", "-Wno-pragmas", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]

GUARD = 64  # elements around every tensor
SENTINEL = -(2**62) + 12345
SENTINEL_32 = -(2**30) + 12345
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
KINDS = {"z": 0, "taylor": 1, "spherical": 2}


class Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int64), ("row_stride", c_int64), ("column_stride", c_int64)]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Matrix":
        return cls(0, 1, 0, 0) if tensor is None else cls(tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.stride())


class Call(ctypes.Structure):
    """Mirrors `Call` of calls.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("rows", "columns")],
        *[(name, Matrix) for name in ("logits", "gradient", "probabilities")],
        *[(name, c_void_p) for name in ("target", "weight", "row_weight")],
        *[(name, c_int64) for name in ("ignore_index", "reduction", "details", "kind")],
        *[(name, c_double) for name in ("scale", "softcap", "label_smoothing", "lse_square_scale", "a", "b", "eps")],
        *[(name, c_void_p) for name in ("loss_rows", "share_rows", "row_state", "loss", "total", "lse", "entropy")],
        *[(name, c_void_p) for name in ("argmax", "grad_loss", "grad_lse", "grad_entropy")],
        *[(name, c_int64) for name in ("grad_loss_stride", "grad_lse_stride", "grad_entropy_stride")],
        *[(name, c_int64) for name in ("all_rows", "first_class", "all_classes", "parts")],
        ("part_memory", c_void_p),
    ]


class PairCall(ctypes.Structure):
    """Mirrors `PairCall` of calls.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("rows", "columns", "row_stride")],
        *[(name, c_void_p) for name in ("similarities", "x_labels", "y_labels", "short_labels", "too_long")],
        *[(name, c_int64) for name in ("self_offset", "excludes_self")],
        ("guide", c_void_p),
        ("guide_stride", c_int64),
        ("guide_margin", c_double),
        ("loss", c_char_p),
        ("parameters", c_double * 4),
        *[(name, c_void_p) for name in ("scale", "bias", "loss_rows", "active_rows")],
        ("gradient_dtype", c_int64),
        *[(name, c_void_p) for name in ("gradient", "grad_loss")],
        ("grad_loss_stride", c_int64),
        ("bias_rows", c_void_p),
    ]


class ClipCall(ctypes.Structure):
    """Mirrors `ClipCall` of calls.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("first", "rows", "columns")],
        *[(name, c_void_p) for name in ("similarities", "scale", "state", "parts", "loss_rows", "share_rows", "loss")],
        *[(name, c_void_p) for name in ("total", "grad_loss")],
        ("gradient_dtype", c_int64),
        ("gradient", c_void_p),
    ]


class TokenCall(ctypes.Structure):
    _fields_ = [("data", c_void_p), *[(name, c_int64) for name in ("batch", "head", "token")]]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "TokenCall":
        return cls(0, 0, 0, 0) if tensor is None else cls(tensor.data_ptr(), *tensor.stride()[:3])


class AttentionCall(ctypes.Structure):
    """Mirrors `AttentionCall` of calls.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("dtype", "sequences", "heads", "key_heads", "queries", "keys", "features")],
        *[(name, c_int64) for name in ("values", "causal", "seen")],
        *[(name, c_double) for name in ("scale", "eps")],
        *[(name, TokenCall) for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")],
        *[(name, c_void_p) for name in ("cos", "sin", "q_bounds", "k_bounds")],
        *[(name, c_void_p) for name in ("start_s", "start_z", "start_u", "s", "z", "u")],
    ]


class TransportCall(ctypes.Structure):
    """Mirrors `TransportCall` of calls.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("cost", "batch", "rows", "columns", "features")],
        *[(name, c_void_p) for name in ("matrix", "x", "y", "a", "b", "epsilon", "start", "f", "g")],
        *[(name, c_int64) for name in ("batch_stride", "row_stride", "column_stride", "max_iter", "symmetric")],
        *[(name, c_double) for name in ("scaling", "rho_a", "rho_b", "tol")],
        *[(name, c_void_p) for name in ("value", "error", "n_iter")],
        *[(name, c_int64) for name in ("values", "weights", "over_distance", "allow_tf32")],
        *[(name, c_void_p) for name in ("v", "h", "k", "out", "grad_f", "grad_g", "grad_cost", "grad_a", "grad_b")],
        ("grad_epsilon", c_void_p),
    ]


class SparseCall(ctypes.Structure):
    """Mirrors `SparseCall` of calls.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("batch", "rows", "columns", "k", "method", "max_iter")],
        *[(name, c_double) for name in ("gamma", "tol", "rate")],
        *[(name, c_void_p) for name in ("costs", "a", "b", "level", "alpha", "values", "indices", "beta", "row_sums")],
        *[(name, c_void_p) for name in ("margin", "value", "row_error", "column_error", "n_iter")],
    ]


class RowsCall(ctypes.Structure):
    """Mirrors `RowsCall` of calls.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("batch", "rows", "columns", "k", "dtype")],
        ("data", c_void_p),
        *[(name, c_int64) for name in ("batch_stride", "row_stride", "column_stride")],
        *[(name, c_void_p) for name in ("indices", "scales", "out")],
    ]


def build() -> ctypes.CDLL:
    """Compiles once per content of the sources, into build/cuda_emulator."""
    digest = hashlib.sha256(" ".join([str(COMPILER), *FLAGS]).encode())
    inputs = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cu*"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]
    for file in sorted(inputs):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "cuda_emulator"
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        objects = [folder / f"{source.name}.o" for source in SOURCES]
        pairs = zip(SOURCES, objects, strict=True)
        jobs = [subprocess.Popen([COMPILER, *FLAGS, "-x", "c++", "-c", source, "-o", out]) for source, out in pairs]
        if any([job.wait() for job in jobs]):
            raise RuntimeError("the .cu files do not compile for the emulator (the compiler's output is above)")
        unfinished = library.with_suffix(".tmp")
        subprocess.run([COMPILER, *FLAGS, "-shared", *objects, "-o", unfinished], check=True)
        unfinished.rename(library)
    loaded = ctypes.CDLL(str(library))
    for name in ("cross_entropy_forward", "cross_entropy_backward", "z_loss_forward", "z_loss_backward"):
        getattr(loaded, name).argtypes = [ctypes.POINTER(Call)]
        getattr(loaded, name).restype = c_char_p
    loaded.attention.argtypes = [ctypes.POINTER(AttentionCall)]
    loaded.attention.restype = c_char_p
    loaded.transport_solve.argtypes = loaded.transport_unrolled.argtypes = [ctypes.POINTER(TransportCall)]
    loaded.transport_apply.argtypes = [ctypes.POINTER(TransportCall), c_int]
    for function in (loaded.transport_solve, loaded.transport_apply, loaded.transport_unrolled):
        function.restype = c_char_p
    loaded.simplex_topk.argtypes = [c_void_p] * 3 + [c_int64] * 3 + [c_double]
    loaded.sparse_transport.argtypes = [ctypes.POINTER(SparseCall)]
    loaded.simplex_topk.restype = loaded.sparse_transport.restype = c_char_p
    for function in (loaded.wta_crs_norms, loaded.wta_crs_gather, loaded.wta_crs_sample):
        function.argtypes, function.restype = [ctypes.POINTER(RowsCall)], c_char_p
    loaded.wta_crs_sample.argtypes += [c_void_p] * 3 + [c_int64] * 2
    for function in (loaded.clip_statistics, loaded.clip_finish, loaded.clip_gradient):
        function.argtypes, function.restype = [ctypes.POINTER(ClipCall)], c_char_p
    loaded.pairwise.argtypes = [ctypes.POINTER(PairCall)]
    loaded.pairwise.restype = c_char_p
    loaded.accumulate.argtypes = [c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int]
    loaded.accumulate.restype = c_char_p
    loaded.wrong_kernel.restype = c_char_p
    return loaded


class Guards:
    """Allocates tensors inside poisoned buffers and checks afterwards that nothing around them was written."""

    def __init__(self):
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def empty(self, *shape: int, dtype=torch.float32, strides: tuple | None = None, offset: int = 0) -> Tensor:
        """A poisoned tensor whose first element lies `offset` elements past a 64-byte boundary."""
        if strides is None:
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        poison = math.nan if dtype.is_floating_point else SENTINEL_32 if dtype == torch.int32 else SENTINEL
        buffer = torch.full((extent + 3 * GUARD + offset,), poison, dtype=dtype)
        first = (-buffer.data_ptr() % 64) // buffer.element_size() + GUARD + offset
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        distinct = [1 if s == 0 else n for n, s in zip(shape, strides, strict=True)]  # a broadcast dimension once
        inside.as_strided(distinct, strides, first).fill_(True)
        self.kept.append((buffer, inside, buffer.clone()))
        return buffer.as_strided(shape, strides, first)

    def put(self, values: Tensor | None, strides: tuple | None = None, offset: int = 0) -> Tensor | None:
        if values is None:
            return None
        out = self.empty(*values.shape, dtype=values.dtype, strides=strides, offset=offset)
        if strides is not None and strides[0] == 0:
            out[:1] = values[:1]
            return out
        return out.copy_(values)

    def check(self) -> None:
        for buffer, inside, before in self.kept:
            same = torch.eq(buffer, before) | (buffer.isnan() & before.isnan())
            assert bool((same | inside).all()), "written outside a tensor"


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def checked(message: bytes | None) -> None:
    assert message is None, message.decode()


# ---- errors

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
# Half a unit in the last place of what is stored, and the arithmetic in float32 before.
ROUNDING = {FLOAT: 0.0, BFLOAT: 2.0**-8, HALF: 2.0**-11}
ARITHMETIC = 8e-6  # most of it where the terms of the entropy's gradient cancel
WORST: dict[str, float] = {}  # largest relative error seen by name; printed with -s


def close(name: str, actual: Tensor, expected: Tensor, relative: float, absolute: float) -> None:
    """|actual - expected| <= relative * |expected| + absolute; equal infinities and NaNs."""
    actual, expected = actual.double(), expected.detach().double()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in different places"
    assert torch.equal(actual[expected.isinf()], expected[expected.isinf()]), f"{name}: other infinities"
    finite = expected.isfinite()
    error = ((actual - expected).abs() / (expected.abs() + absolute / relative))[finite]
    worst = float(error.max()) if error.numel() else 0.0
    WORST[name] = max(WORST.get(name, 0.0), worst)
    assert worst <= relative, f"{name}: relative error {worst:.2e}"


def close_value(name: str, actual: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    close(name, actual, expected, relative, relative)


def close_gradient(name: str, actual: Tensor, expected: Tensor, arithmetic: float = ARITHMETIC) -> None:
    # Absolutely, p - 1 of a confident row cannot be better than float32's unit; half has no smaller step than 6e-8.
    absolute = 2e-7 * float(expected.abs().max()) + (4e-8 if actual.dtype == HALF else 1e-9)
    close(f"{name} {str(actual.dtype)[6:]}", actual, expected, ROUNDING[actual.dtype] + arithmetic, absolute)
