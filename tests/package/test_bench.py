"""The benchmark suite reports what it claims to: numbers, errors, tables."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_modules import bench_modules

case, figures, measure, plots, report, results, run, train_lm = bench_modules(
    "case", "figures", "measure", "plots", "report", "results", "run", "train_lm"
)
z_loss, layers = bench_modules("cases.z_loss", "layers")

SETTING = {"device": "Test CPU", "instruction_set": "AVX2", "threads": 2}
TIMES = {"tilewise": 10.0, "torch eager": 40.0, "torch.compile": 20.0, "plain copy": 5.0}


def eager(logits, target):
    return torch.nn.functional.cross_entropy(logits, target)


def row_loss(logits, target):
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


def make_case(*contenders, rows=16, classes=50, dtype=torch.float32):
    return case.Case(
        op="cross_entropy",
        shape=(rows, classes),
        dtype=dtype,
        device="cpu",
        inputs=partial(case.row_inputs, rows, classes, dtype, "cpu"),
        reference=partial(case.row_reference, row_loss),
        contenders=list(contenders),
        traffic=case.row_traffic(rows, classes, dtype),
        flops=dict.fromkeys(case.PHASES, 8 * rows * classes),
        runs=4,
        seconds=1.0,
    )


def contenders():
    return [case.Contender(name, None if name == "plain copy" else eager, ours=name == "tilewise") for name in TIMES]


@pytest.fixture
def content():
    """A result file whose every figure follows from TIMES: at 2048 x 32000 float32 one matrix is 262.144 MB."""
    sized = make_case(*contenders(), rows=2048, classes=32000)
    found = []
    for contender in sized.contenders:
        middle = TIMES[contender.name]
        times = {"both": [middle * f for f in (0.8, 0.9, 1.0, 1.1, 1.2)]}
        if contender.loss:
            times |= {"forward": [middle * 0.4] * 5, "backward": [middle * 0.6] * 5}
        error = measure.Error(2e-8, 3e-6) if contender.loss else None
        peak = 2 * 262_144_000 if contender.loss else None
        found += results.rows(sized, contender, times, peak, error, copy=100.0)
    return {
        "environment": results.environment("cpu") | SETTING | {"date": "2026-01-02"},
        "ceilings": {"copy_gbs": 100.0},
        "results": found,
        "absent": {"quack": "not installed"},
    }


@pytest.fixture
def training():
    rows = [
        {"contender": name, "ours": ours, "median_ms": ms, "q25_ms": ms, "q75_ms": ms, "runs": 3}
        | {"losses": [8.0, 6.0, 5.0 + off], "largest_difference": off, "held_out_loss": 5.25}
        for name, ours, ms, off in [("torch eager", False, 50.0, 0.0), ("tilewise", True, 30.0, 1e-6)]
    ]
    return {"words": 1000, "classes": 90, "batch": 16, "steps": 3, "contenders": rows}


def test_quartiles_of_known_lists():
    assert measure.quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert measure.quartiles([1, 2, 3, 4]) == (1.75, 2.5, 3.25)
    assert measure.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_traffic_is_two_reads_and_one_write():
    assert case.row_traffic(2048, 32000, torch.float32) == {
        "forward": 262_144_000,
        "backward": 524_288_000,
        "both": 786_432_000,
    }
    assert case.row_traffic(8192, 128256, torch.bfloat16)["both"] == 3 * 8192 * 128256 * 2


def test_rows_hold_bandwidth_and_fractions(content):
    both = {row["contender"]: row for row in content["results"] if row["phase"] == "both"}
    ours, copy = both["tilewise"], both["plain copy"]
    assert (ours["q25_ms"], ours["median_ms"], ours["q75_ms"]) == (9.0, 10.0, 11.0)
    assert ours["gbs"] == pytest.approx(78.6432) and ours["copy_fraction"] == pytest.approx(0.786432)
    assert copy["gbs"] == pytest.approx(104.8576) and copy["error"] is None
    assert {row["phase"] for row in content["results"] if row["contender"] == "tilewise"} == set(case.PHASES)
    assert json.loads(json.dumps(content)) == content


def test_speedups_claim_nothing_for_a_wrong_result(content):
    (group,) = results.groups(content["results"]).values()
    expected = [("tilewise", "torch eager", 4.0), ("tilewise", "torch.compile", 2.0), ("tilewise", "plain copy", 0.5)]
    assert results.speedups(group) == expected
    group["tilewise"]["correct"] = False
    assert results.speedups(group) == []


def test_inputs_hold_confident_rows():
    (logits,), (target,) = case.row_inputs(64, 32000, torch.float32, "cpu")
    right = logits.softmax(-1).gather(-1, target[:, None]).squeeze(-1)[::8]
    assert right.min() > 0.98 and right.max() < 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_right_and_wrong_contenders(dtype):
    pytest.importorskip("tilewise")
    good = case.Contender("good", lambda x, y: eager(x.float(), y))
    doubled = case.Contender("doubled", lambda x, y: eager(2 * x, y))
    broken = case.Contender("broken", lambda x, y: eager(x * float("nan"), y), backend="cpu", ours=True)
    problem = measure.Problem(make_case(good, doubled, broken, dtype=dtype), measure.HostClock())
    reference = problem.case.reference(*problem.leaves, *problem.constants)
    assert measure.error(problem, good, reference).within(dtype)
    assert measure.error(problem, doubled, reference).gradient > 0.5
    assert math.isnan(measure.error(problem, broken, reference).loss)
    fit, errors = run.checked(problem, reference)
    assert [c.name for c in fit] == ["good", "doubled"] and not errors["broken"].within(dtype)


def test_reference_gradient_is_that_of_the_mean():
    (logits,), (target,) = case.row_inputs(100, 30, torch.float32, "cpu")
    loss, [(index, gradient)] = case.row_reference(row_loss, logits, target, checked=10)
    whole = logits.double().requires_grad_()
    expected = eager(whole, target)
    (rows,) = torch.autograd.grad(expected, whole)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert index.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    torch.testing.assert_close(gradient, rows[index], rtol=1e-12, atol=0)


def layer_eager(hidden, weight, target):
    return eager(hidden @ weight.T, target)


def make_layer_case(*contenders):
    flops = {"forward": 10**9, "backward": 2 * 10**9}
    arguments = ("linear_cross_entropy", (40, 6, 30), torch.float32, "cpu", row_loss, (list(contenders), {}), flops)
    return layers.layer_case(*arguments, runs=3, seconds=1.0)


def test_reference_of_a_layer_samples_both_gradients(monkeypatch):
    (hidden, weight), (target,) = layers.layer_inputs(40, 6, 30, torch.float32, "cpu")
    monkeypatch.setattr(layers, "BLOCK", 30 * 7)  # seven rows at a time
    loss, samples = layers.layer_reference(row_loss, hidden, weight, target, checked=10)
    leaves = [leaf.double().requires_grad_() for leaf in (hidden, weight)]
    expected = layer_eager(*leaves, target)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for (index, rows), whole in zip(samples, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(rows, whole[index], rtol=1e-10, atol=1e-14)
    assert samples[1][0].tolist() == [0, 7, 14, 22, 29, *target[[0, 10, 20, 29, 39]].tolist()]


def test_error_sees_either_gradient_of_a_layer():
    def wrong(which):
        def loss(*inputs):
            changed = [x * 1.0 for x in inputs[:2]]
            changed[which].register_hook(lambda gradient: 1.5 * gradient)
            return layer_eager(*changed, inputs[2])

        return loss

    contenders = [case.Contender("good", layer_eager), *(case.Contender(f"bad {i}", wrong(i)) for i in (0, 1))]
    problem = measure.Problem(make_layer_case(*contenders), measure.HostClock())
    reference = problem.case.reference(*problem.leaves, *problem.constants)
    errors = [measure.error(problem, contender, reference).gradient for contender in contenders]
    assert errors == [pytest.approx(0.0, abs=1e-4), pytest.approx(0.5, rel=1e-3), pytest.approx(0.5, rel=1e-3)]


def test_inputs_of_a_layer_hold_confident_rows():
    (hidden, weight), (target,) = layers.layer_inputs(64, 128, 5000, torch.float32, "cpu")
    right = (hidden @ weight.T).softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    assert right[::8].min() > 0.8 and right[::8].max() < 0.96 and right[1::8].max() < 0.1


@pytest.mark.skipif(not measure.CLEAR_REFS.exists(), reason="no resident high-water mark on this system")
def test_peak_memory_of_a_layer_leaves_out_its_gradients():
    def by_hand(hidden, weight, target):
        return hidden.square().mean() + weight.square().mean()

    contender = case.Contender("squares", by_hand)
    inputs = [torch.ones(4 << 18), torch.ones(64 << 18)]  # 68 MiB
    layer = replace(make_layer_case(contender), inputs=lambda: (inputs, [torch.zeros(1)]))
    problems = [measure.Problem(c, measure.HostClock()) for c in (layer, replace(layer, op="cross_entropy"))]
    without, with_gradients = (measure.peak_extra_bytes(problem, contender) / 2**20 for problem in problems)
    assert with_gradients - without == pytest.approx(68, abs=6)


def test_z_loss_composition_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    z = 1.0 / math.sqrt(2.0 / 3.0)
    expected = math.log1p(math.exp(z_loss.A * (z_loss.B - z))) / z_loss.A
    assert z_loss.row_loss(logits, torch.tensor([2])).item() == pytest.approx(expected, rel=1e-12)


def test_inputs_are_restored_and_turns_rotate():
    calls = []

    def destructive(name, logits, target):
        calls.append((name, logits.sum().item()))
        loss = eager(logits, target)
        with torch.no_grad():
            logits.detach().fill_(0.0)
        return loss

    names = ("a", "b", "c")
    problem = measure.Problem(
        make_case(*(case.Contender(name, partial(destructive, name)) for name in names)), measure.HostClock()
    )
    times = measure.interleave(problem, problem.case.contenders, 4, 10.0, lambda _: None)
    assert "".join(name for name, _ in calls) == "abcbcacababc"
    assert len({total for _, total in calls}) == 1 and calls[0][1] != 0.0
    assert all(len(times[name][phase]) == 4 for name in names for phase in case.PHASES)


@pytest.mark.skipif(not measure.CLEAR_REFS.exists(), reason="no resident high-water mark on this system")
def test_peak_memory_sees_what_was_taken_and_freed():
    def work():
        held = torch.ones(64 << 18)  # 64 MiB
        return held.sum().item()

    work()
    assert measure.resident_peak(work) / 2**20 == pytest.approx(64, abs=4)


def test_ticks_and_numbers():
    assert plots.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert plots.ticks(4.4, 8.3) == [5, 6, 7, 8]
    assert [plots.number(v) for v in (0, 0.01234, 1.2345, 48.06, 319.4, 12345.6)] == [
        "0",
        "0.0123",
        "1.23",
        "48.1",
        "319",
        "12,346",
    ]


def test_report_shows_the_figures(content, training, tmp_path):
    machine = {"cross_entropy": content, "train_lm": {"environment": content["environment"], "training": training}}
    page = report.write({"test-cpu": machine}, tmp_path / "index.html").read_text()
    for shown in (
        "Test CPU, AVX2, 2 threads",
        "2048 × 32000, float32",
        "10.0 ms, 4.0× eager, 79% of copy speed",
        "20.0 ms, 2.0× eager, 39% of copy speed",
        "500 MiB",
        "2.0e-08",
        "9.00 – 11.0",
        "quack: not installed",
        "30.0 ms, held-out loss 5.2500",
        "differ by at most 1.0e-06",
        "<b>4.0×</b><span>tilewise<br>against torch eager",
        "prefers-color-scheme: dark",
        "<dt>Inexact</dt><dd>an error of loss or gradient above 1e-06 and 1e-03 in float64",
        "<dt>Whiskers</dt><dd>quartiles.</dd>",
    ):
        assert shown in page
    assert page.count("<polyline") == 2 and "http" not in page and "<script" not in page


def layer_content(content):
    """One output layer at 3e9 operations, with the times of TIMES that are no copy's."""
    sized = make_layer_case(*(c for c in contenders() if c.loss))
    found = []
    for contender in sized.contenders:
        times = {phase: [TIMES[contender.name]] * 3 for phase in case.PHASES}
        found += results.rows(sized, contender, times, 3 << 20, measure.Error(2e-8, 3e-6), copy=100.0)
    return content | {"results": found, "ceilings": {"copy_gbs": 100.0, "gemm_float32_gflops": 1000.0}, "absent": {}}


def test_output_layers_are_told_apart(content, tmp_path):
    files = {"cross_entropy": content, "linear_cross_entropy": layer_content(content)}
    page = report.write({"test-cpu": files}, tmp_path / "index.html").read_text()
    card = page[page.index("<h3>linear_cross_entropy</h3>") :]
    for shown in ("40 × 6 × 30, float32", "10.0 ms, 4.0× eager<", "<td>300</td>", "its matrix products at full speed"):
        assert shown in card
    assert "beyond the inputs and the gradients returned" in card and "of copy speed" not in card
    rows, layer = (results.groups(files[op]["results"]).values() for op in files)
    (row_group,), (layer_group,) = rows, layer
    expected = report.bound("cross_entropy", row_group["tilewise"], content["ceilings"])
    assert expected[0] == pytest.approx(7.86432)
    assert report.bound("linear_cross_entropy", layer_group["tilewise"], {"gemm_float32_gflops": 1000.0})[0] == 3.0
    assert report.bound("linear_cross_entropy", layer_group["tilewise"], {}) is None
    table = figures.figures_page({"test-cpu": files})
    assert "### Row losses\n\n| operator | logits | runs, day |" in table
    assert "### Output layers\n\n| operator | rows × features × classes | runs, day |" in table
    assert "| `linear_cross_entropy` | 40 × 6 × 30 float32 | 3, 2026-01-02 | **tilewise** | 10.0 | 4.0 |" in table


def test_figures_hold_every_contender(content, training):
    """Time, speed beside eager, memory and errors of each; what is wrong has no speed."""
    rows = {row["contender"]: row for row in content["results"] if row["phase"] == "both"}
    rows["torch.compile"]["correct"] = False
    machine = {"cross_entropy": content, "train_lm": {"environment": content["environment"], "training": training}}
    page = figures.figures_page({"test-cpu": machine})
    for shown in (
        "| `cross_entropy` | 2048 × 32000 float32 | 5, 2026-01-02 | **tilewise** | 10.0 | 4.0 | 500 MiB | 2.0e-08 |",
        "|  |  |  | torch eager | 40.0 | 1.0 | 500 MiB | 2.0e-08 | 3.0e-06 |",
        "|  |  |  | torch.compile (inexact) | 20.0 | – | 500 MiB | 2.0e-08 | 3.0e-06 |",
        "|  |  |  | plain copy | 5.00 | – | – | – | – |",
        f"## Test CPU, AVX2, 2 threads, torch {torch.__version__}, 2026-01-02\n",
        "torch eager 50.0 ms, tilewise 30.0 ms; loss curves within 1e-06",
        "GPU: not measured yet",
        "1e-05 and 1e-03 in float32",
    ):
        assert shown in page
    gpu = content | {"environment": content["environment"] | {"gpu": True}}
    assert "not measured yet" not in figures.figures_page({"test-cpu": machine, "test-gpu": {"cross_entropy": gpu}})


def test_quick_run_end_to_end(tmp_path):
    pytest.importorskip("tilewise")
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "quick")]) == 0
    (files,) = results.load(tmp_path).values()
    assert set(files) == {*run.OPERATORS, "roofline", "train_lm"}
    assert files["roofline"]["ceilings"]["copy_gbs"] > 0
    for op, names in {
        "cross_entropy": ["tilewise", "tilewise in place", "torch eager", "plain copy"],
        "z_loss": ["tilewise", "torch eager", "plain copy"],
        "linear_cross_entropy": ["tilewise", "torch eager", "torch chunked"],
        "linear_z_loss": ["tilewise", "tilewise z_loss(F.linear)", "torch eager"],
    }.items():
        (group,) = results.groups(files[op]["results"]).values()
        absent = files[op]["absent"]
        assert list(group) == [name for name in names if name not in absent]
        for row in group.values():
            assert 0 < row["q25_ms"] <= row["median_ms"] <= row["q75_ms"] and row["runs"] >= 3
            assert row["error"] is None or row["error"]["gradient"] < 1e-3
    training = files["train_lm"]["training"]
    curves = {row["contender"]: torch.tensor(row["losses"]) for row in training["contenders"]}
    assert list(curves) == ["torch eager", "tilewise", "tilewise in place"]
    for curve in curves.values():
        torch.testing.assert_close(curve, curves["torch eager"], rtol=0, atol=1e-5)
    assert curves["tilewise"][0].item() == pytest.approx(math.log(training["classes"]), rel=0.1)
    assert "tilewise in place" in (tmp_path / "quick" / "report.html").read_text()


def test_a_spent_budget_leaves_every_operator_its_first_case(tmp_path, capsys):
    options = ["--quick", "--no-train", "--no-report", "--device", "cpu", "--out", str(tmp_path), "--budget", "0"]
    operators = ["cross_entropy", "z_loss"]
    assert run.main(options + [word for op in operators for word in ("--op", op)]) == 0
    (files,) = results.load(tmp_path).values()
    said = capsys.readouterr().out
    for op in operators:
        assert {row["runs"] for row in files[op]["results"]} == {1}
        assert f"shortened to fit the time budget, 1 of 5 rounds: {op} 64 x 1000 float32" in said


def test_first_cases_come_first():
    cases = [iter("ab"), iter("c"), iter("def")]
    assert list(run.in_turn(cases)) == [(0, "a"), (0, "c"), (0, "d"), (1, "b"), (1, "e"), (2, "f")]


def test_settings_are_not_mixed(content, tmp_path):
    """One folder with files of two instruction sets: two sections, each with its own figures."""
    other = content | {"environment": content["environment"] | {"instruction_set": "AVX-512", "date": "2026-01-05"}}
    for name, one in (("cross_entropy", content), ("mala", content), ("z_loss", other)):
        results.save(tmp_path / "machine" / f"{name}.json", one)
    machines = results.load(tmp_path)
    torch_version = content["environment"]["torch"]
    assert {setting: sorted(files) for setting, files in machines.items()} == {
        f"Test CPU, AVX2, 2 threads, torch {torch_version}": ["cross_entropy", "mala"],
        f"Test CPU, AVX-512, 2 threads, torch {torch_version}": ["z_loss"],
    }
    assert f"## Test CPU, AVX-512, 2 threads, torch {torch_version}, 2026-01-05\n" in figures.figures_page(machines)
    page = report.page(machines)
    assert page.count("<h2>") == 2 and "<h2>Test CPU, AVX-512, 2 threads</h2>" in page


def test_files_of_other_dates_say_theirs(content):
    later = content | {"environment": content["environment"] | {"date": "2026-01-05", "revision": "abc"}}
    machines = {"a": {"cross_entropy": content, "z_loss": later}}
    page = report.page(machines)
    assert "date 2026-01-05" in page and "revision abc" in page
    assert ", 2026-01-02 to 2026-01-05\n" in figures.figures_page(machines)


def test_corpus_is_english_and_split():
    seen, held, vocabulary = train_lm.corpus()
    assert len(seen) > 80_000 and len(held) == pytest.approx(len(seen) / 19, rel=0.01)
    assert vocabulary[0] == "<unknown>" and {"the", "statement", "expression"} <= set(vocabulary)
    assert seen.max() == len(vocabulary) - 1 and (seen == 0).sum() == 0
    context, target = train_lm.examples(seen, torch.tensor([0, 5]))
    assert context.shape == (2, 8) and target.tolist() == [seen[8], seen[13]]


def test_a_case_can_be_quickened():
    short = replace(make_case(case.Contender("eager", eager)), runs=3)
    found, right = run.measured(short, copy_gbs=10.0)
    assert right and {row["runs"] for row in found} == {3}


def test_log_axes_place_points_and_part_names():
    line = [(10.0, 1.0), (1000.0, 100.0)]
    chart = plots.loglog("t", ("x", "ms"), {"a": line, "b": line}, {"a": "ours", "b": "peer"})
    (left, low), (right, high) = (map(float, p.split(",")) for p in chart.split('points="')[1].split('"')[0].split())
    assert left < right and low > high
    middle = plots.loglog("t", ("x", "ms"), {"a": [*line, (100.0, 10.0)]}, {"a": "ours"})
    assert f'cx="{(left + right) / 2:.2f}" cy="{(low + high) / 2:.2f}"' in middle
    heights = [float(part.split('y="')[1].split('"')[0]) for part in chart.split('class="name')[1:]]
    assert heights[1] - heights[0] == pytest.approx(16)
