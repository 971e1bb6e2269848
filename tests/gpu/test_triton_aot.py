"""Compiles the Triton kernels ahead of time, without a GPU, exactly as the operators launch them on large inputs.

The operators run on meta tensors with kernel launches recorded instead of made; every recorded launch is compiled for
Hopper and Blackwell (`make aot`: for Ampere, too), and the machine code must not spill registers and must fit into
shared memory. Triton decides at
import whether it interprets, so the compilation happens in a process where TRITON_INTERPRET is not set: this file, run
as a script with the architecture as its argument, which prints one JSON line per kernel.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

pytestmark = pytest.mark.slow

ARCHITECTURES = tuple(map(int, os.environ.get("TILEWISE_AOT_ARCHS", "90,100").split(",")))
DTYPES = ("bfloat16", "float16", "float32")
SHARED_MEMORY_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of sm_86 and sm_89 for 80
ROWS = 8192
LOOSE_STACK_LIMIT = 320  # bytes, of any kernel for Ampere or by a Triton before 3.7; most have none
# Bytes that may lie on the stack: a few of the many addresses of attention with 96 features, rotated or causal, and of
# the problems of a batch, do; so do four of the statistics that cross entropy with all its options keeps lane by lane.
STACK_LIMIT = {
    "mala_key_gradient_kernel": 32,
    "mala_sum_kernel": 8,
    "sinkhorn_apply_kernel": 48,
    "sinkhorn_half_step_kernel": 8,
    "cross_entropy_forward_kernel": 16,
    "spherical_family_forward_kernel": 8,
    "spherical_family_backward_kernel": 8,
}
SPARSE = ["simplex_topk_kernel", "simplex_topk_backward_kernel"] + [
    f"sparse_{part}_kernel" for part in ("cut", "rows", "lists")
]
WTA_CRS = [f"wta_crs_{part}_kernel" for part in ("norms", "sample", "gather")]
SINKHORN = [f"sinkhorn_{part}_kernel" for part in ("apply", "half_step", "plan", "small", "unrolled_backward")]
ALL_OPTIONS = {"label_smoothing": 0.1, "lse_square_scale": 1e-4, "softcap": 30.0, "logit_scale": 0.5}
PLAIN = {"label_smoothing": 0.0, "lse_square_scale": 0.0, "softcap": None, "logit_scale": 1.0}


def run_cross_entropy(logits, *, options=PLAIN, probabilities=False, everything=False, reduction="mean"):
    """Forward and backward launches of cross entropy; `everything` adds weights and statistics to the options."""
    from tilewise.triton_kernels.cross_entropy import OPS

    N, V = logits.shape
    target = torch.empty_like(logits) if probabilities else torch.empty(N, dtype=torch.int64, device="meta")
    options = {**options, "ignore_index": -100, "reduction": reduction}
    weight, row_weight = (torch.empty(n, device="meta") if everything else None for n in (V, N))
    op = OPS["cross_entropy_with_stats" if everything else "cross_entropy"]
    loss, state, *stats = op(logits, target, weight, row_weight, **options)
    lse, entropy, _ = stats or (None, None, None)
    grads = torch.empty_like(loss), lse, entropy
    saved = (target, weight, row_weight, entropy, state)
    OPS["cross_entropy_backward"](*grads, logits, *saved, **options)


def run_spherical_family(logits, names):
    """Forward launches of the named losses and one backward launch."""
    from tilewise.triton_kernels.z_loss import OPS

    target = torch.empty(logits.shape[0], dtype=torch.int64, device="meta")
    for name in names:
        constants = {"a": 1.0, "b": 0.0} if name == "z_loss" else {}
        loss, state = OPS[name](logits, target, **constants)
    options = {"ignore_index": -100, "reduction": "mean"}
    OPS["spherical_family_backward"](loss, logits, target, state, **options)


def run_linear_cross_entropy(dtype, *, D, V, options=PLAIN, everything=False, probabilities=False):
    """The fused forward, and the row kernels over blocks of classes of the backward."""
    from tilewise.triton_kernels.linear_cross_entropy import OPS

    x, w = (torch.empty(n, D, dtype=dtype, device="meta") for n in (ROWS, V))
    target = torch.empty(ROWS, V, dtype=dtype, device="meta") if probabilities else torch.empty(
        ROWS, dtype=torch.int64, device="meta")  # fmt: skip
    bias = torch.empty(V, dtype=dtype, device="meta") if everything else None
    weight = torch.empty(V, device="meta") if everything else None
    options = {name: value for name, value in options.items() if name != "logit_scale"} | {"ignore_index": -100}
    saved = (x, w, target, bias, weight)
    loss, state, *_ = OPS["linear_cross_entropy"](*saved, **options, reduction="mean")
    flags = {f"{name}_grad": True for name in ("input", "weight", "bias")}
    OPS["linear_cross_entropy_backward"](
        torch.empty_like(loss), *saved, state, **options, reduction="mean", chunk_bytes=0, **flags
    )


def run_pairwise(dtype):
    """Every loss where the gradient is float32; the storage of 16-bit gradients with one of them, and a guide."""
    from tilewise.triton_kernels.pairwise import OPS, PROGRAMS

    x = torch.empty(ROWS, 128, dtype=dtype, device="meta")
    labels, number = torch.empty(ROWS, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
    flags = {"x_grad": True, "y_grad": True, "bias_grad": True, "reduction": "mean", "chunk_bytes": 0}
    for loss in PROGRAMS if dtype == torch.float32 else ("multi_similarity",):
        parameters = [2.0, 50.0, 0.5, 0.1][: PROGRAMS[loss].parameters]
        options = {"loss": loss, "parameters": parameters, "self_offset": 0, "guide_margin": 0.1}
        guides = (None, None) if dtype == torch.float32 else (x, x)
        OPS["pairwise_loss_backward"](number, x, x, labels, labels, number, number, *guides, number, **options, **flags)


def run_clip_loss(dtype):
    """A mean, whose rows have one upstream gradient, and losses of rows; two chunks, joined."""
    from tilewise.triton_kernels.clip_loss import OPS

    x, number = torch.empty(ROWS, 128, dtype=dtype, device="meta"), torch.empty((), device="meta")
    _, state = OPS["clip_loss"](x, x, number, chunk_bytes=2 * ROWS * ROWS)
    for grad_loss in (None, torch.empty(ROWS, device="meta")):
        OPS["clip_loss_backward"](x, x, number, state, grad_loss)


def run_mala(dtype, *, D, DV, causal, rope, packed):
    from tilewise.triton_kernels import mala, mala_backward

    OPS = mala.OPS | mala_backward.OPS
    q, k = (torch.empty(1 if packed else 4, h, 4096, D, dtype=dtype, device="meta") for h in (16, 8))
    v = torch.empty(*k.shape[:3], DV, dtype=dtype, device="meta")
    angles = (torch.empty(4096, D // 2, device="meta"),) * 2 if rope else (None, None)
    bounds = (torch.empty(5, dtype=torch.int64, device="meta"),) * 2 if packed else (None, None)
    options = {"causal": causal, "scale": 0.125, "eps": 1e-6, "seen": 0}
    out, *sums = OPS["mala"](q, k, v, *angles, *bounds, **options)
    OPS["mala_backward"](out, q, k, v, *angles, *bounds, *((None,) * 3 if causal else sums), **options)


def run_sinkhorn():
    """Matrices and points of few and of many features, all at once and one tile each, with and without penalties."""
    from tilewise.triton_kernels import sinkhorn, small_sinkhorn

    OPS = sinkhorn.OPS | small_sinkhorn.OPS

    def empty(*shape):
        return torch.empty(*shape, device="meta")

    def run(n, m, d, **options):
        a, b, epsilon, cost = empty(4, n), empty(4, m), empty(4), empty(4, n, m)
        x, y, solve = empty(4, n, d), empty(4, m, d), {"max_iter": 2, "tol": 1e-3, **options}
        f, g, *_ = OPS["sinkhorn"](cost, a, b, epsilon, **solve)
        OPS["sinkhorn_plan"](cost, a, b, epsilon, f, g)
        OPS["sinkhorn_apply"](cost, a, b, epsilon, f, g, empty(4, m, 1))
        for kind in ("sqeuclidean", "euclidean"):
            OPS["sinkhorn_points"](x, y, a, b, epsilon, cost=kind, **solve, symmetric=n == m, allow_tf32=n != m)
            OPS["sinkhorn_points_apply"](x, y, a, b, epsilon, f, g, empty(4, m, d + 1), cost=kind)
        h, k = empty(4, n, d + 2), empty(4, m, d + 2)
        OPS["sinkhorn_points_apply"](
            x, y, a, b, epsilon, f, g, empty(4, m, d + 1), h, k, cost="euclidean", over_distance=True
        )
        if max(n, m) <= 64:
            penalties = {name: rho for name, rho in options.items() if name.startswith("rho")}
            OPS["sinkhorn_unrolled_backward"](f, g, cost, a, b, epsilon, max_iter=2, **penalties)

    for n, m in ((4096, 4096), (3000, 2000), (8, 8), (64, 40)):
        for d in (3, 64):
            run(n, m, d)
            run(n, m, d, rho_a=1.0, rho_b=2.0)


def run_sparse():
    """Short and long rows; columns with and without given thresholds."""
    from tilewise.triton_kernels.simplex_topk import OPS
    from tilewise.triton_kernels.sparse_ot import sparse_ot_columns

    def empty(*shape):
        return torch.empty(*shape, device="meta")

    for n in (8, 256, 20000):
        p = OPS["simplex_topk"](empty(4096, n), k=8)
        OPS["simplex_topk_backward"](p, p)
    for batch, n, m in ((1, 64, 65536), (512, 16, 24)):
        for dual in (False, True):
            sparse_ot_columns(empty(batch, n, m), empty(batch, m), empty(batch, n), k=4, gamma=1.0, dual=dual)


def run_wta_crs(dtype):
    """Long and short rows, one place and many, every method, with and without norms of the gradients."""
    from tilewise.triton_kernels.wta_crs import OPS

    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for shape, k in (((1, 16384, 4096), 1639), ((8, 512, 33), 1)):
        x = torch.empty(shape, dtype=dtype, device="meta")
        norms = OPS["wta_crs_norms"](x)
        OPS["wta_crs_norms"](x.mT)
        for method in ("systematic", "wta", "crs"):
            indices, scales = OPS["wta_crs_sample"](norms, norms, seed, k=k, method=method)
        OPS["wta_crs_sample"](norms, None, seed, k=k, mix=0.0)
        OPS["wta_crs_gather"](x, indices, scales)
        OPS["wta_crs_gather"](x, indices)


def run_operators(dtype):
    """Long rows with 16-byte accesses, long rows without, short rows that share a program, V = 1, transposed rows."""

    def logits(V, rows=ROWS):
        return torch.empty(rows, V, dtype=dtype, device="meta")

    run_cross_entropy(logits(128256))
    run_cross_entropy(logits(128256), options=ALL_OPTIONS, everything=True)
    run_cross_entropy(logits(128256), options=ALL_OPTIONS, everything=True, probabilities=True)
    run_cross_entropy(logits(128256, rows=16))
    run_cross_entropy(logits(50257, rows=3), options=ALL_OPTIONS, everything=True)
    run_cross_entropy(logits(50257), reduction="sum")
    run_cross_entropy(logits(1000), options=ALL_OPTIONS, everything=True, reduction="none")
    run_cross_entropy(logits(1))
    run_cross_entropy(torch.empty(128256, ROWS, dtype=dtype, device="meta").t())
    run_spherical_family(logits(128256), ("z_loss", "taylor_softmax_loss", "spherical_softmax_loss"))
    run_spherical_family(logits(1000), ("z_loss",))
    run_linear_cross_entropy(dtype, D=2304, V=256000)
    run_linear_cross_entropy(dtype, D=512, V=50257, options=ALL_OPTIONS, everything=True)
    run_linear_cross_entropy(dtype, D=512, V=50257, options=ALL_OPTIONS, probabilities=True)
    run_pairwise(dtype)
    run_clip_loss(dtype)
    run_wta_crs(dtype)
    if dtype == torch.float32:
        run_sinkhorn()
        run_sparse()
    for causal in (False, True):
        run_mala(dtype, D=64, DV=64, causal=causal, rope=False, packed=False)
        run_mala(dtype, D=96, DV=96, causal=causal, rope=dtype == torch.bfloat16, packed=True)


def compile_launches(arch):
    """Prints a JSON line with the resources of every distinct kernel that run_operators launches."""
    import triton
    from triton._utils import find_paths_if, get_iterable_path
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    launches = []
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: launches.append((kernel, args, kwargs))

    def compile_launch(kernel, args, kwargs, target):
        """What JITFunction.run does on a cache miss, for a target that need not be present."""
        backend = make_backend(target)
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        types = [kind for kind, _ in specialization]
        keys = [key for _, key in specialization]
        values = list(bound.values())
        constants = {
            path: get_iterable_path(values, path) for path in find_paths_if(types, lambda _, kind: kind == "constexpr")
        }
        attributes = {
            path: backend.parse_attr(get_iterable_path(keys, path))
            for path in find_paths_if(keys, lambda _, key: isinstance(key, str))
        }
        source = ASTSource(kernel, dict(zip(bound, types, strict=True)), constants, attributes)
        return triton.compile(source, target=target, options=options)

    def resources(compiled):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name.lower(): int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}

    for dtype in DTYPES:
        launches.clear()
        run_operators(getattr(torch, dtype))
        seen = set()
        for kernel, args, kwargs in launches:
            compiled = compile_launch(kernel, args, kwargs, GPUTarget("cuda", arch, 32))
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            report = {"arch": arch, "dtype": dtype, "kernel": kernel.fn.__name__, **resources(compiled)}
            report |= {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared}
            report["async_copies"] = compiled.asm["ptx"].count("cp.async.cg")
            print(json.dumps(report), flush=True)


@pytest.fixture(scope="module")
def reports():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    commands = [[sys.executable, __file__, str(arch)] for arch in ARCHITECTURES]
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_fit(reports, arch, dtype):
    """Registers do not spill, shared memory is within the limit, every kernel is present."""
    compiled = [r for r in reports if (r["arch"], r["dtype"]) == (arch, dtype)]
    assert {r["kernel"] for r in compiled} == {
        *(f"clip_{part}_kernel" for part in ("statistics", "merge", "finish", "gradient")),
        "cross_entropy_forward_kernel",
        "cross_entropy_backward_kernel",
        "linear_cross_entropy_forward_kernel",
        "linear_cross_entropy_merge_kernel",
        "merge_parts_kernel",
        "mala_forward_kernel",
        "mala_key_gradient_kernel",
        "mala_query_gradient_kernel",
        "mala_sum_kernel",
        "pairwise_kernel",
        "spherical_family_forward_kernel",
        "spherical_family_backward_kernel",
        "reduce_rows_kernel",
        *WTA_CRS,
        *(SINKHORN + SPARSE if dtype == "float32" else ()),
    }
    assert [r for r in compiled if r["local"] or r["shared"] > SHARED_MEMORY_LIMIT[arch]] == []
    loose = arch == 80 or tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7)
    limits = {} if loose else STACK_LIMIT
    least = LOOSE_STACK_LIMIT if loose else 0
    assert [r for r in compiled if r["stack"] > limits.get(r["kernel"], least)] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_long_rows_stream_asynchronously(reports, arch, dtype):
    """The first kernel compiled is the plain forward over aligned rows: 16-byte asynchronous copies."""
    first = next(r for r in reports if (r["arch"], r["dtype"]) == (arch, dtype))
    assert first["kernel"] == "cross_entropy_forward_kernel" and first["async_copies"] > 0


if __name__ == "__main__":
    compile_launches(int(sys.argv[1]))
