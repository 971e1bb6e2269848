"""Predicted times: their model on small samples, and that no case is predicted to be faster than it can be."""

import json

import emulated
import pytest
import torch
from bench_modules import bench_modules
from recorded import Launch, Phase, Product, Sizes, Torch

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")

devices, kernels, predict, predicted, report, results, run = bench_modules(
    "devices", "kernels", "predict", "predicted", "report", "results", "run"
)

H100 = devices.GPUS["H100"]
SM = H100.multiprocessors


@pytest.fixture(scope="module")
def traces():
    return predict.all_traces()


def launch(blocks: int, **sizes) -> Launch:
    return Launch("some_kernel<float>", (blocks, 1, 1), (256, 1, 1), 0, Sizes(**sizes))


def seconds(step: Launch, gpu=H100, **work) -> tuple[float, str]:
    """Without what a launch takes, of a kernel of this work."""
    zero = dict.fromkeys(kernels.Work._fields, 0.0)
    table = {"some_kernel": kernels.Kernel(32, lambda s: kernels.Work(**(zero | work)))}
    taken = predict.of_launch(gpu, step, table)
    return taken.seconds - devices.LAUNCH, taken.limit


def test_a_launch_takes_what_is_scarce():
    full = launch(64 * SM)
    assert seconds(full, bytes=3e9) == (pytest.approx(1e-3), "memory")
    assert seconds(full, flop=67e9) == (pytest.approx(1e-3), "float32")
    special = 16 * SM * H100.clock * 1e-3
    assert seconds(full, special=special) == (pytest.approx(1e-3), "special functions")
    instructions = 0.75 * 4 * 32 * SM * H100.clock * 1e-3
    assert seconds(full, instructions=instructions) == (pytest.approx(1e-3), "instructions")
    assert seconds(full, instructions=instructions, bytes=3e9, flop=67e10) == (pytest.approx(1e-2), "float32")
    assert seconds(full)[1] == "launch"


def test_idle_multiprocessors_cost():
    """The same work in few blocks: on eight multiprocessors, with one block's warps on each; or one block too many."""
    work = 0.75 * 4 * 32 * SM * H100.clock * 1e-3
    assert seconds(launch(SM * 4), instructions=work)[0] == pytest.approx(1e-3)
    alone = seconds(launch(8), instructions=work)[0]
    assert alone == pytest.approx(1e-3 * SM / 8 * 0.75 / (2 / devices.PACE))  # two warps for each scheduler
    whole, more = (seconds(launch(n), flop=1e9)[0] for n in (SM, SM + 1))
    assert more == pytest.approx(2 * whole * SM / (SM + 1))
    assert seconds(launch(33), bytes=3e9)[0] == pytest.approx(2e-3)  # a quarter of them draws half of the bandwidth
    # Accesses one after the other, in two turns: eight blocks of 256 threads stay at a time.
    assert seconds(launch(9 * SM), rounds=1000)[0] == pytest.approx(2 * 1000 * devices.LATENCY / H100.clock)


def test_blocks_that_a_multiprocessor_holds():
    def held(threads, shared, registers, gpu=H100):
        return predict.resident(gpu, Launch("k", (1, 1, 1), (threads, 1, 1), shared, Sizes()), registers)

    assert held(256, 0, 32) == 8  # threads
    assert held(256, 0, 128) == 2  # registers
    assert held(256, 51712, 32) == 4  # shared memory, with 1 KiB of each block's own
    assert held(256, 51712, 32, devices.GPUS["A100"]) == 3
    assert held(32, 0, 16) == 32
    assert held(1024, 0, 80) == 1


def test_products_are_bound_by_operations_or_bytes():
    taken = predict.of_product(H100, Product(8192, 8192, 8192, 2, 2))
    assert taken.seconds == pytest.approx(devices.LAUNCH + 2 * 8192**3 / 800e12) and taken.limit == "product"
    rest = predict.of_product(H100, Product(1025, 8192, 8192, 2, 2))  # a ninth block of 128 rows
    assert rest.seconds == pytest.approx(devices.LAUNCH + 2 * 9 * 128 * 8192**2 / 800e12)
    thin = predict.of_product(H100, Product(65536, 65536, 16, 2, 4))
    assert thin.limit == "memory" and thin.seconds > 65536**2 * 4 / 3e12
    of_torch = predict.of_step(H100, Torch("sum", 3e9, 4))
    assert of_torch.seconds == pytest.approx(4 * devices.LAUNCH + 1e-3)


def test_a_kernel_that_is_not_listed_is_an_error():
    with pytest.raises(KeyError, match="some_kernel"):
        predict.of_launch(H100, launch(1))


def test_a_phase_says_what_takes_most():
    phase = Phase.of([Torch("sum", 3e9), Torch("sum", 3e9), Product(128, 128, 128, 2, 2)], 0)
    figures = predict.of_phase(H100, phase)
    assert figures["predicted_ms"] == pytest.approx(2.0, rel=0.01)
    assert (figures["most"], figures["limit"]) == ("torch operations", "memory") and figures["share"] > 0.99


@pytest.fixture(scope="module")
def bounds():
    """The bytes and operations of every case of bench/cases."""
    modules = bench_modules(*(f"cases.{op}" for op in run.OPERATORS))
    cases = [case for module in modules for case in module.cases("cuda")]
    keys = [(case.op, case.shape, case.dtype_name) for case in cases]
    return [dict(zip(keys, (getattr(c, name) for c in cases), strict=True)) for name in ("traffic", "flops")]


# What has none of the case's products, or not all: the point of the operator.
SAMPLED = "wta_crs_linear"


@pytest.mark.parametrize("gpu", devices.GPUS)
def test_no_prediction_is_faster_than_its_bytes_and_products(traces, bounds, gpu):
    traffic, flops = bounds
    flops = {key: {"both": 0} if key[0] == SAMPLED else of for key, of in flops.items()}
    found = predict.predictions(devices.GPUS[gpu], traces)
    assert len(found) == 3 * len(traces)
    wrong = predict.too_fast(found, devices.GPUS[gpu], traffic, flops)
    assert not wrong, "\n".join(wrong)


def test_a_formula_that_forgets_bytes_is_found(traces, bounds):
    """Statistics that read half of the logits."""
    half = {"row_statistics_kernel": kernels.Kernel(56, lambda s: kernels.each(s.cells, 7, bytes=s.read / 2))}
    chosen = [trace for trace in traces if trace.case == "cross_entropy"]
    wrong = predict.too_fast(predict.predictions(H100, chosen, half | kernels.KERNELS), H100, *bounds)
    assert len(wrong) == 5
    assert wrong[0].startswith("('cross_entropy', (8192, 128256), 'bfloat16'): predicted 1.7")
    assert wrong[0].endswith("ms, its bytes and products take 2.1 ms")


@pytest.mark.parametrize("gpu", devices.GPUS)
def test_committed_predictions_are_those_of_the_code(traces, gpu):
    assert predicted.load(gpu) == predict.predictions(devices.GPUS[gpu], traces), "make predict"


def measurement(**changes) -> dict:
    row = {"case": "cross_entropy", "shape": [8192, 128256], "dtype": "bfloat16", "contender": "tilewise cuda"}
    return row | {"phase": "both", "median_ms": 4.2} | changes


def test_predicted_and_measured_stand_side_by_side():
    rows = [measurement(), measurement(phase="forward", median_ms=1.0), measurement(contender="torch eager")]
    text = predicted.side_by_side("NVIDIA H100 80GB HBM3", rows)
    head, both, forward, last = text.splitlines()
    assert head.split() == ["case", "phase", "predicted", "ms", "measured", "ms", "ratio"]
    expected = next(row for row in predicted.load("H100") if predicted.key_of(row) == predicted.key_of(rows[0]))
    assert both.split()[-3:] == [f"{expected['predicted_ms']:.3g}", "4.2", f"{4.2 / expected['predicted_ms']:.2f}"]
    assert forward.split()[3] == "forward" and last == "ratio: measured by predicted"
    assert predicted.side_by_side("NVIDIA H100 PCIe", rows) == predicted.side_by_side("NVIDIA L4", rows) == ""
    assert predicted.side_by_side("NVIDIA H100", [measurement(shape=[1, 1])]) == ""


def test_the_report_names_both():
    environment = results.environment("cpu") | {"device": "NVIDIA H200"}
    content = {"environment": environment, "results": [measurement(phase="forward")], "absent": {}, "ceilings": {}}
    card = report.predicted_card(content)
    assert "Predicted and measured" in card and "predicted ms" in card and "measured ms" in card
    assert "<td>4.20</td>" in card
    assert card in report.operator_section("cross_entropy", content, {})
    assert report.predicted_card(content | {"environment": {"device": "Test CPU"}}) == ""


def test_predictions_are_no_measurements(tmp_path):
    """They have a name of their own, and what loads measurements does not see them."""
    predicted.save(tmp_path / "h100.json", "H100", predicted.load("H100"))
    content = json.loads((tmp_path / "h100.json").read_text())
    assert content["note"].endswith("not measured")
    assert not any("median_ms" in row for row in content["predictions"])
    assert results.load(tmp_path) == {} and predicted.measured(tmp_path) == []
    assert (predicted.FOLDER / "h100.json").read_text() == (tmp_path / "h100.json").read_text()


def test_all_predictions_in_a_table():
    lines = predicted.table("H100").splitlines()
    assert len(lines) == 1 + len(predicted.load("H100")) // 3
    assert lines[0].startswith("predicted for H100, ms") and "cross_entropy 8192x128256 bfloat16" in lines[1]
    assert predicted.of_device("NVIDIA A100-SXM4-80GB") == "A100" and predicted.of_device("Test") is None


def test_gpus_are_in_order():
    """What each generation is faster in, so that a slip of a power of ten shows."""
    a100, h100, h200, b200 = (devices.GPUS[name] for name in ("A100", "H100", "H200", "B200"))
    for name in ("copy", "bfloat16", "float32", "multiprocessors"):
        rates = [getattr(gpu, name) for gpu in (a100, h100, h200, b200)]
        assert rates == sorted(rates) and rates[-1] < 10 * rates[0]
    # 64 multiply-adds a clock and multiprocessor on A100, 128 later, at most: clocks are no higher than data sheets'
    for gpu, lanes in ((a100, 64), (h100, 128), (b200, 128)):
        assert gpu.float32 >= 0.99 * 2 * lanes * gpu.multiprocessors * gpu.clock
    assert torch.bfloat16.itemsize == 2 and h100.product(2) > h100.product(4)
