"""What every public operator launches on a GPU at the sizes of bench/cases and at some more, forward and backward.

Launches come from the .cu files, recorded; what the binding files and PyTorch do around them stands here: chunks of
rows, matrix products, and operations whose bytes count.
"""

import importlib
from ctypes import byref
from typing import NamedTuple

import emulated
import torch
from emulated import AttentionCall, Call, ClipCall, Matrix, PairCall, RowsCall, SparseCall, TokenCall, TransportCall
from recorded import SOMEWHERE, Launch, Phase, Product, Recorder, Sizes, Step, Torch

FEW_BYTES = 512 << 20  # of bfloat16 logits that are held at once (pysrc/ops/linear_cross_entropy.py)
BFLOAT, FLOAT = torch.bfloat16, torch.float32


class Trace(NamedTuple):
    """A call of an operator; its key is that of a benchmark's results."""

    case: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    forward: Phase
    backward: Phase
    variant: str = ""  # of the contender: what stands after "tilewise cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return " ".join(filter(None, [self.case, "x".join(map(str, self.shape)), self.dtype_name, self.variant]))


def parts(count: int, size: int) -> list[int]:
    """The sizes of blocks of `size`, the last one smaller."""
    return [min(size, count - begin) for begin in range(0, count, size)]


# ---- rows of logits


def row_call(rows: int, columns: int, dtype: torch.dtype) -> Call:
    matrix = Matrix(SOMEWHERE, emulated.DTYPES[dtype], columns, 1)
    call = Call(rows=rows, columns=columns, logits=matrix, gradient=matrix, target=SOMEWHERE, scale=1.0, reduction=1)
    call.grad_loss = SOMEWHERE
    return call


def row_phases(record: Recorder, name: str, rows: int, columns: int, dtype: torch.dtype) -> list[list[Launch]]:
    call, sizes = row_call(rows, columns, dtype), Sizes(rows=rows, columns=columns, item=dtype.itemsize)
    call.parts, call.part_memory = record.library.row_parts(rows, columns), SOMEWHERE
    return [record(f"{name}_{phase}", byref(call), sizes=sizes) for phase in ("forward", "backward")]


def row_loss(record: Recorder, name: str, rows: int, columns: int, dtype: torch.dtype) -> Trace:
    phases = row_phases(record, name, rows, columns, dtype)
    return Trace(
        name, (rows, columns), dtype, *(Phase.of(steps, 8 * rows * (i == 0)) for i, steps in enumerate(phases))
    )


def cross_entropy(record, rows, classes, dtype, *_):
    return row_loss(record, "cross_entropy", rows, classes, dtype)


def z_loss(record, rows, classes, dtype, *_):
    return row_loss(record, "z_loss", rows, classes, dtype)


def linear_cross_entropy(record, size, dtype, *_):
    rows, features, classes = size
    item, few = dtype.itemsize, rows * classes * dtype.itemsize <= FEW_BYTES
    formed = dtype == FLOAT or (dtype == BFLOAT and few)  # gradients, in the forward
    held = rows if formed and dtype == BFLOAT else record.library.logit_rows(rows, classes, item)
    forward: list[Step] = []
    for count in parts(rows, held):
        statistics, gradient = row_phases(record, "cross_entropy", count, classes, dtype)
        forward += [Product(count, classes, features, item, item), statistics[0]]
        if formed:
            forward += [*gradient, Product(count, features, classes, item, item)]
            forward += [Product(classes, features, count, item, 2 * item if held < rows else item)]  # or added
    forward += record("row_reduction", rows, sizes=Sizes(rows=rows))
    scratch = held * classes * item
    if formed:
        gradients = 2 * item * (rows + classes) * features
        backward = Phase.of([Torch("times the upstream gradient", gradients, 2)])
        return Trace("linear_cross_entropy", size, dtype, Phase.of(forward, scratch), backward)
    at_a_time, steps = record.library.logit_classes(rows, classes, item), []
    for count in parts(classes, at_a_time):
        steps += [
            Product(rows, count, features, item, item),
            *row_phases(record, "cross_entropy", rows, count, dtype)[1],
        ]
        steps += [Product(rows, features, count, item, item), *accumulate(record, rows * features, dtype)]
        steps += [Product(count, features, rows, item, item)]
    backward = Phase.of(steps, rows * at_a_time * item + rows * features * (item + 4))
    return Trace("linear_cross_entropy", size, dtype, Phase.of(forward, scratch), backward)


def accumulate(record: Recorder, count: int, dtype: torch.dtype) -> list[Launch]:
    sizes = Sizes(rows=count, item=dtype.itemsize)
    return record("accumulate", emulated.DTYPES[dtype], None, None, None, count, 0, 0, sizes=sizes)


def linear_z_loss(record, size, dtype, *_):
    """pysrc/ops/logits_free.py, 2^20 elements of the weight at a time: it has no kernel of its own."""
    rows, features, classes = size
    item, chunk = dtype.itemsize, max(features, 2**20 // features)
    forward: list[Step] = [Torch("mean row", 2 * item * classes * features, 2 * (classes // chunk))]
    for count in parts(classes, chunk):
        forward += [
            Torch("less the mean", 2 * item * count * features),
            Product(features, features, count, item, 2 * item),
        ]
    forward += [Product(rows, features, features, item, item), Torch("of rows", 8 * item * rows * features, 12)]
    backward: list[Step] = [
        Product(rows, features, features, item, item),
        Product(features, features, rows, item, item),
    ]
    for count in parts(classes, chunk):
        backward += [
            Torch("less the mean", 2 * item * count * features),
            Product(count, features, features, item, item),
        ]
    backward += [Torch("of rows", 8 * item * rows * features, 12)]
    return Trace("linear_z_loss", size, dtype, Phase.of(forward), Phase.of(backward))


# ---- pairs of vectors


def pair_kernels(record, loss: str, sizes: Sizes, dtype: torch.dtype, first: bool) -> list[Launch]:
    """Of a chunk; before the first one labels are shortened."""
    stride = -(-sizes.columns // 8) * 8
    call = PairCall(rows=sizes.rows, columns=sizes.columns, row_stride=stride, loss=loss.encode())
    call.similarities, call.short_labels = SOMEWHERE, SOMEWHERE if first else None
    call.gradient, call.gradient_dtype = SOMEWHERE if sizes.gradient else None, emulated.DTYPES[dtype]
    return record("pairwise", byref(call), sizes=sizes)


def pair_steps(record, loss: str, size: tuple[int, int, int], dtype: torch.dtype, gradient: bool) -> list[Step]:
    """Chunks of rows; with `gradient` those of both sides, of 16 bits for several chunks together and the columns' in a
    sum apart."""
    rows, columns, features = size
    item, steps = dtype.itemsize, [Torch("zero", 4)]
    for i, count in enumerate(parts(rows, record.library.pair_rows(rows, columns))):
        sizes = Sizes(rows=count, columns=columns, item=item, gradient=gradient)
        steps += [Product(count, columns, features, item, 4), *pair_kernels(record, loss, sizes, dtype, i == 0)]
    return [*steps, *gradient_products(record, size, dtype)] if gradient else steps


def gradient_products(record, size: tuple[int, int, int], dtype: torch.dtype) -> list[Step]:
    """As csrc/pairwise/gradient_products.h takes them."""
    rows, columns, features = size
    item, narrow, steps = dtype.itemsize, dtype != FLOAT, []
    at_a_time = record.library.pair_rows(rows, columns)
    for kept in parts(rows, record.library.pair_gradient_rows(at_a_time, columns, item) if narrow else at_a_time):
        steps += [Product(kept, features, columns, item, item)]
        steps += [Product(columns, features, kept, item, item if narrow else 2 * item)]
        steps += accumulate(record, columns * features, dtype) if narrow else []
    return steps


def gradient_bytes(record, size: tuple[int, int, int], dtype: torch.dtype) -> int:
    """What is held between these products."""
    rows, columns, features = size
    item, at_a_time = dtype.itemsize, record.library.pair_rows(rows, columns)
    if dtype == FLOAT:
        return 0
    kept = min(rows, record.library.pair_gradient_rows(at_a_time, columns, item))
    return item * kept * columns + columns * features * (item + 4)


def pairs(record, case: str, loss: str, size: tuple[int, int, int], dtype: torch.dtype) -> Trace:
    """Between the rows themselves, or of as many, that are normalised first. Gradients come with the forward."""
    rows, columns, features = size
    item, cells = dtype.itemsize, 4 * (rows if case != "siglip_loss" else rows + columns) * features
    reduction = record("row_reduction", rows, sizes=Sizes(rows=rows))
    forward = [Torch("unit rows", 5 * cells, 7), *pair_steps(record, loss, size, dtype, True), *reduction]
    backward = [Torch("times the upstream gradient", 2 * item * (rows + columns) * features, 3)]
    backward += [Torch("unit rows", 8 * cells, 12)]
    scratch = 4 * record.library.pair_rows(rows, columns) * columns + gradient_bytes(record, size, dtype)
    return Trace(case, (rows, features), dtype, Phase.of(forward, scratch), Phase.of(backward))


def multi_similarity_loss(record, size, dtype, *_):
    return pairs(record, "multi_similarity_loss", "multi_similarity", (size[0], size[0], size[1]), dtype)


def supcon(record, size, dtype, *_):
    return pairs(record, "supcon", "softmax", (size[0], size[0], size[1]), dtype)


def siglip_loss(record, size, dtype, *_):
    return pairs(record, "siglip_loss", "sigmoid", (size[0], size[0], size[1]), dtype)


def clip_loss(record, size, dtype, *_):
    """A product forward, three backward; gradients are scaled once they are formed."""
    rows, features = size
    item, held, forward, backward = dtype.itemsize, record.library.pair_rows(rows, rows), [], []
    for count in parts(rows, held):
        call = ClipCall(rows=count, columns=rows, gradient_dtype=emulated.DTYPES[dtype], gradient=SOMEWHERE)
        call.similarities = SOMEWHERE
        sizes = Sizes(rows=count, columns=rows, item=item, gradient=True)
        formed = Product(count, rows, features, item, 4)
        forward += [formed, *record("clip_statistics", byref(call), sizes=sizes)]
        backward += [formed, *record("clip_gradient", byref(call), sizes=sizes)]
    backward += gradient_products(record, (rows, rows, features), dtype)
    forward += record("clip_finish", byref(ClipCall(columns=rows)), sizes=Sizes(rows=rows))
    backward += [Torch("times the upstream gradient", 4 * item * rows * features, 4)]
    tiles = 8 * (held * (rows // 256) + rows * (held // 32))
    scratch = 4 * held * rows + tiles, 4 * held * rows + gradient_bytes(record, (rows, rows, features), dtype)
    return Trace("clip_loss", size, dtype, *map(Phase.of, (forward, backward), scratch))


# ---- attention


def attention(record, size, dtype, *_, causal=False):
    batch, heads, tokens, features = size
    call = AttentionCall(dtype=emulated.DTYPES[dtype], sequences=batch, heads=heads, key_heads=heads, causal=causal)
    call.queries = call.keys = tokens
    call.features = call.values = features
    for name in ("q", "k", "v", "out", "grad_q", "grad_k", "grad_v"):
        setattr(call, name, TokenCall(SOMEWHERE, heads * tokens * features, tokens * features, features))
    sums = Sizes(batch=batch * heads, rows=tokens, columns=features, width=features, item=dtype.itemsize, causal=causal)
    shares = (tokens + 255) // 256 if causal else min(16, (tokens + 63) // 64)
    sizes, tensor = sums._replace(steps=shares), batch * heads * tokens * features * dtype.itemsize
    state = 4 * batch * heads * features * (features + 2)
    forward = [Torch("zeros", 2 * state, 6), *record("attention", byref(call), sizes=sizes)]
    forward = Phase.of([*forward, Torch("weighted sum", 4 * tensor, 2)], record.scratch)
    call.grad_out = call.out
    backward = [Torch("weighted sum", 2 * tensor, 2), Torch("zeros", state, 6)]
    backward = Phase.of([*backward, *record("attention", byref(call), sizes=sizes)], record.scratch)
    return Trace("mala causal" if causal else "mala", size, dtype, forward, backward)


def mala_causal(record, size, dtype, *_):
    return attention(record, size, dtype, causal=True)


# ---- transport


def solve(record: Recorder, call: TransportCall, sizes: Sizes) -> list[Launch]:
    for name in ("f", "g", "a", "b", "epsilon", "matrix", "x", "y"):
        setattr(call, name, SOMEWHERE)
    return record("transport_solve", byref(call), sizes=sizes)


def sinkhorn(record, shape, *_):
    transport = importlib.import_module("transport")
    if len(shape) == 3:
        return small_sinkhorn(record, shape, importlib.import_module("cases.sinkhorn").SMALL_ITERATIONS)
    rows, columns = shape
    call = TransportCall(batch=1, rows=rows, columns=columns, row_stride=columns, column_stride=1)
    call.max_iter, sizes = transport.ITERATIONS, Sizes(rows=rows, columns=columns)
    forward = Phase.of(solve(record, call, sizes), record.scratch)
    plan = record("transport_apply", byref(call), 1, sizes=sizes)
    return Trace("sinkhorn", shape, FLOAT, forward, Phase.of([*plan, Torch("times the upstream", 8 * sizes.cells)]))


def small_sinkhorn(record, shape, iterations):
    """Differentiated through its iterations: of the plan, a weighted sum."""
    batch, rows, columns = shape
    call = TransportCall(batch=batch, rows=rows, columns=columns, batch_stride=rows * columns, row_stride=columns)
    call.column_stride, call.max_iter = 1, iterations
    sizes = Sizes(batch=batch, rows=rows, columns=columns, steps=iterations)
    cells, forward = 4 * sizes.cells, [Torch("zeros", 8 * batch * (rows + columns), 2), *solve(record, call, sizes)]
    forward += [
        Torch("value and error", 12 * cells, 25),
        Torch("plan", 10 * cells, 8),
        Torch("weighted sum", 4 * cells, 2),
    ]
    backward = [Torch("weighted sum", 2 * cells, 2), Torch("plan", 8 * cells, 12)]
    backward += record("transport_unrolled", byref(call), sizes=sizes)
    return Trace("sinkhorn", shape, FLOAT, Phase.of(forward), Phase.of(backward, record.scratch))


def sinkhorn_points(record, shape, *_, allow_tf32=False):
    rows, columns, features = shape
    call = TransportCall(cost=1, batch=1, rows=rows, columns=columns, features=features)
    call.max_iter, call.allow_tf32 = importlib.import_module("transport").ITERATIONS, allow_tf32
    sizes = Sizes(rows=rows, columns=columns, width=features)
    points = 4 * (rows + columns) * features
    forward = Phase.of([Torch("centred", 4 * points, 10), *solve(record, call, sizes)], record.scratch)
    call.values, backward, scratch = 1 + features, [], 0  # with a column of ones
    for n, m in ((rows, columns), (columns, rows)):
        call.rows, call.columns = n, m
        backward += [Torch("ones and points", points, 2)]
        backward += record("transport_apply", byref(call), 0, sizes=sizes._replace(rows=n, columns=m))
        backward += [Torch("of points", 3 * points, 4)]
        scratch += record.scratch
    variant = "allow_tf32" if allow_tf32 else ""
    return Trace("sinkhorn_points", shape, FLOAT, forward, Phase.of(backward, scratch), variant)


SEMI_DUAL, ADAM = 0, 2


def sparse(record: Recorder, batch: int, rows: int, columns: int, k: int, method: int, iterations: int) -> list[Launch]:
    call = SparseCall(batch=batch, rows=rows, columns=columns, k=k, method=method, max_iter=iterations, gamma=1.0)
    call.a, call.rate = SOMEWHERE, 0.01
    sizes = Sizes(batch=batch, rows=rows, columns=columns, k=k, steps=iterations)
    return record("sparse_transport", byref(call), sizes=sizes)


def sparse_ot(record, rows, columns, k, *_):
    """All evaluations are launched; those after the end of the search return at once."""
    steps, cells = sparse(record, 1, rows, columns, k, SEMI_DUAL, 500), 4 * rows * columns
    forward = Phase.of([Torch("costs by columns", 2 * cells), *steps], record.scratch)
    return Trace("sparse_ot", (rows, columns, k), FLOAT, forward, Phase.of([Torch("scattered", 3 * cells, 8)]))


def sparse_ot_router(record, tokens, experts, capacity, *_):
    steps = importlib.import_module("cases.sparse_ot_router").STEPS
    cells = 4 * tokens * experts
    solved = sparse(record, 1, tokens, experts, capacity, ADAM, steps)
    forward = Phase.of([Torch("softmax, costs", 6 * cells, 6), *solved, Torch("weights", 0, 5)], record.scratch)
    backward = Phase.of([Torch("scattered, softmax", 6 * cells, 8)])
    return Trace("sparse_ot_router", (tokens, experts, capacity), FLOAT, forward, backward)


def simplex_topk(record, rows, columns, k, *_):
    sizes, cells = Sizes(rows=rows, columns=columns, k=k), 4 * rows * columns
    forward = record("simplex_topk", None, None, None, rows, columns, k, 1.0, sizes=sizes)
    backward = record("simplex_topk", None, SOMEWHERE, None, rows, columns, k, 1.0, sizes=sizes)
    forward = Phase.of([*forward, Torch("weighted sum", 4 * cells, 2)])
    backward = Phase.of([Torch("weighted sum", 2 * cells, 2), *backward])
    return Trace("simplex_topk", (rows, columns, k), FLOAT, forward, backward)


# ---- sampled products


def wta_crs_linear(record, dtype, rows, width, layers, *_, ratio):
    """A chain of layers; the gradient of each weight from ratio of its rows."""
    dtype = getattr(torch, dtype)
    item, k = dtype.itemsize, round(ratio * rows)
    call = RowsCall(batch=1, rows=rows, columns=width, k=k, dtype=emulated.DTYPES[dtype], row_stride=width)
    call.column_stride = 1
    sizes = Sizes(rows=rows, columns=width, item=item, k=k)
    whole, gather = Product(rows, width, width, item, item), record("wta_crs_gather", byref(call), sizes=sizes)
    layer: list[Step] = [*record("wta_crs_norms", byref(call), sizes=sizes)]
    layer += record("wta_crs_sample", byref(call), None, None, None, 0, 3277, sizes=sizes)
    layer += [*gather, whole]
    back = [*gather, whole, Product(width, width, k, item, item)]
    cells = rows * width * item
    forward = Phase.of([*layers * layer, Torch("mean square", cells, 3)], 8 * rows)
    backward = Phase.of([Torch("mean square", 2 * cells, 4), *layers * back])
    return Trace("wta_crs_linear", (rows, width, layers), dtype, forward, backward, f"ratio {ratio}")


# ---- all


MORE = {  # beside the sizes of bench/cases
    cross_entropy: [(16, 128256, BFLOAT)],
    linear_cross_entropy: [((2048, 4096, 128256), BFLOAT)],
    multi_similarity_loss: [((65536, 512), BFLOAT), ((65536, 512), FLOAT)],
    siglip_loss: [((65536, 768), BFLOAT)],
    mala_causal: [((8, 16, 4096, 64), BFLOAT)],
    simplex_topk: [(65536, 256, 8)],
}
BENCHED = [
    cross_entropy, z_loss, linear_cross_entropy, linear_z_loss, multi_similarity_loss, supcon, clip_loss, attention,
    sinkhorn, sinkhorn_points, sparse_ot, sparse_ot_router, simplex_topk, wta_crs_linear,
]  # fmt: skip


def traces(record: Recorder) -> list[Trace]:
    """The cases of bench/cases in their order, then the others."""
    found = []
    for make in BENCHED:
        name = "mala" if make is attention else make.__name__
        cases = importlib.import_module(f"cases.{name}")
        variants = {wta_crs_linear: [{"ratio": ratio} for ratio in getattr(cases, "RATIOS", ())]}
        variants[sinkhorn_points] = [{}, {"allow_tf32": True}]
        found += [make(record, *size, **more) for size in cases.SIZES["cuda"] for more in variants.get(make, [{}])]
    return found + [make(record, *size) for make, sizes in MORE.items() for size in sizes]
