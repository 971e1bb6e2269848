"""Launches at benchmark sizes fill a GPU and fit in it: recorded on the emulator, run by nobody."""

import emulated
import pytest
import torch
from bench_modules import bench_modules
from recorded import Launch, Phase, Product, Recorder, Sizes, short

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")

kernels, launch_trace, run, traced = bench_modules("kernels", "launch_trace", "run", "traced")


@pytest.fixture(scope="module")
def record():
    return Recorder(emulated.build())


@pytest.fixture(scope="module")
def found(record):
    return traced.traces(record)


def trace_of(*launches: Launch) -> traced.Trace:
    return traced.Trace("case", (1,), torch.float32, Phase.of(launches), Phase.of([]))


def launch(blocks: int, shared: int = 0) -> Launch:
    return Launch("some_kernel<float>", (blocks, 1, 1), (256, 1, 1), shared, Sizes())


def test_no_launch_leaves_most_of_a_gpu_idle(found):
    wrong = launch_trace.faults(found)
    assert not wrong, "\n".join(wrong)


def test_faults_are_found():
    """Too few blocks, too much shared memory, and an exception that nothing needs."""
    good = trace_of(launch(66), launch(133, 227 << 10))
    assert launch_trace.faults([good], []) == []
    [few] = launch_trace.faults([trace_of(launch(8))], [])
    assert few == "case 1 float32: some_kernel<float> has 8 blocks: 94% of the multiprocessors are idle"
    [large] = launch_trace.faults([trace_of(launch(200, 228 << 10))], [])
    assert "asks for 233472 bytes of shared memory, more than 232448" in large
    allowed = launch_trace.Idle("case", "some_kernel", "a test")
    assert launch_trace.faults([trace_of(launch(8))], [allowed]) == []
    assert launch_trace.faults([good], [allowed]) == ["no launch needs the exception of some_kernel in case"]


def test_every_case_is_traced(found):
    """Every size of bench/cases, by the key of its results, and every kernel in it is known to the predictions."""
    keys = {(trace.case, trace.shape, trace.dtype) for trace in found}
    modules = bench_modules(*(f"cases.{op}" for op in run.OPERATORS))
    cases = [(case.op, case.shape, case.dtype) for module in modules for case in module.cases("cuda")]
    assert len(cases) > 20
    assert set(cases) <= keys
    unknown = {
        step.kernel for trace in found for step in launch_trace.launches_of(trace) if not kernels.kernel_of(step)
    }
    assert unknown == set()


def test_chunks_are_those_of_the_bindings(record):
    """As csrc/pairwise/chunks.h and csrc/linear_cross_entropy/chunks.h have them: 128 MiB of float32 similarities, and
    up to 4,096 rows of 16-bit gradients within 512 MiB; a 22nd of the logits, from 128 to 512 MiB, in blocks of one
    size and whole tiles."""
    library = record.library
    assert library.pair_rows(65536, 65536) == 512
    assert library.pair_rows(100, 65536) == 100
    assert library.pair_rows(65537, 65536) == 509  # 129 chunks, none of which is a rest of one row
    assert library.pair_gradient_rows(512, 65536, 2) == 4096
    assert library.pair_gradient_rows(509, 65536, 2) == 8 * 509
    assert library.pair_gradient_rows(128, 262144, 2) == 1024
    assert library.pair_gradient_rows(2048, 16384, 2) == 4096
    assert library.pair_gradient_rows(96, 10**9, 2) == 96
    assert library.logit_rows(8192, 256000, 2) == 512
    assert library.logit_classes(8192, 256000, 2) == 11776
    assert library.logit_rows(64, 1000, 4) == 64
    steps = traced.siglip_loss(record, (65536, 768), torch.bfloat16).forward.steps
    assert {step: count for step, count in steps.items() if type(step) is Product} == {
        Product(512, 65536, 768, 2, 4): 128,
        Product(4096, 768, 65536, 2, 2): 16,
        Product(65536, 768, 4096, 2, 2): 16,
    }


def test_a_recording_is_what_runs(record):
    """The launches of a small call, and that the same call runs when nothing is recorded."""
    torch.manual_seed(0)
    logits, target = torch.randn(9, 33), torch.randint(33, (9,))
    call = traced.row_call(9, 33, torch.float32)
    call.logits = call.gradient = emulated.Matrix.of(logits)
    call.target, call.ignore_index = target.data_ptr(), -100
    outputs = {name: torch.full((27,), torch.nan) for name in ("loss_rows", "share_rows", "row_state", "loss", "total")}
    for name, tensor in outputs.items():
        setattr(call, name, tensor.data_ptr())
    statistics, reduction = record("cross_entropy_forward", emulated.ctypes.byref(call), sizes=Sizes())
    assert statistics.grid == (2, 1, 1) and statistics.block == (32, 8, 1)
    assert reduction[:4] == ("row_reduction_kernel", (1, 1, 1), (512, 1, 1), 256)
    assert outputs["loss"].isnan().all()
    emulated.checked(record.library.cross_entropy_forward(emulated.ctypes.byref(call)))
    torch.testing.assert_close(outputs["loss"][0], torch.nn.functional.cross_entropy(logits, target))


def test_scratch_memory_is_counted(record):
    """S, Z and U of 16 runs of 256 tokens, and of 16 shares."""
    state = 4 * 8 * 16 * (64 * 64 + 2 * 64)
    size = (8, 16, 4096, 64)
    assert traced.mala_causal(record, size, torch.bfloat16).forward.scratch == 16 * state
    assert traced.attention(record, size, torch.bfloat16).forward.scratch == 16 * state


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("void tilewise::(anonymous namespace)::a_kernel<tilewise::Cost>(int)", "a_kernel<Cost>"),
        ("tilewise::(anonymous namespace)::plan_kernel(tilewise::SinkhornApply<float>)", "plan_kernel"),
        ("void tilewise::a_kernel<F<float>, 4>(tilewise::F<float>) [clone .isra.0]", "a_kernel<F<float>, 4>"),
    ],
)  # fmt: skip
def test_names_of_kernels(symbol, name):
    assert short(symbol) == name


def test_the_table_shows_every_case(found):
    text = launch_trace.table(found)
    assert all(trace.label in text for trace in found)
    line = next(line for line in text.splitlines() if "sparse_lists_kernel" in line and line.endswith("52%"))
    assert line.split()[:5] == ["1", "sparse_lists_kernel", "64", "1024", "256"]
    assert "64 blocks: sparse_(guess|long_cut|lists)_kernel" in launch_trace.exceptions(found)


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize(("rows", "classes"), [(8192, 256000), (8192, 128256), (5000, 50257), (300, 900), (40, 10**7)])
def test_chunks_of_logits_are_whole_tiles(record, rows, classes, item):
    """Of rows and of classes: within 512 MiB but for the least of each, and the same with Triton."""
    for count, length, least, function in (
        (rows, classes, 64, record.library.logit_rows),
        (classes, rows, 256, record.library.logit_classes),
    ):
        held = function(rows, classes, item)
        assert held == count or held % 256 == 0 or 256 * length * item > 512 << 20
        assert held * length * item <= 512 << 20 or held <= least
        twin = pytest.importorskip("tilewise.triton_kernels.linear_cross_entropy")
        assert held == twin.lines_at_a_time(count, length, item, 0, least)
