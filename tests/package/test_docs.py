"""Every example in the public docstrings and in the README runs and gives what it says."""

import ast
import doctest
import importlib
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tilewise

ROOT = Path(__file__).resolve().parents[2]
README, FIGURES, RESULTS = ROOT / "README.md", ROOT / "docs" / "figures.md", ROOT / "bench" / "results"
in_source_tree = pytest.mark.skipif(not README.exists(), reason="the README is not part of an installed package")
DOCUMENTED = ["backend", *(name for name in tilewise.__all__ if inspect.isfunction(getattr(tilewise, name)))]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_example(name):
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(tilewise, name), name, globs={})
    assert test.examples, f"tilewise.{name} shows no example"
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


@pytest.mark.parametrize("name", ["FactoredSphericalOutput", "SampledGroup", "WTACRSLinear", "convert_linear"])
def test_docstring_example_of_a_module(name):
    test = doctest.DocTestFinder(recurse=False).find(getattr(tilewise.nn, name), name, globs={})[0]
    assert test.examples and doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


class Block(torch.nn.Module):
    """Layers with the names that the README's last example has."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.head = (torch.nn.Linear(8, 8) for _ in range(4))


def readme_names():
    """What the README's second block takes as given."""
    names = {name: torch.randn(32, 8, requires_grad=True) for name in ("embeddings", "query", "key", "x", "y")}
    names |= {name: torch.randn(1, 2, 12, 8) for name in "qkv"}
    names |= {name: torch.full((16,), 1 / 16) for name in "ab"}
    rest = {"labels": torch.arange(32) // 4, "bias": torch.randn(1000), "log_t": torch.zeros(())}
    return names | rest | {"cost": torch.rand(16, 16), "model": Block()}


@in_source_tree
def test_readme_examples(capsys):
    """The first block's numbers are PyTorch's; the second one runs, one statement after the other."""
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = readme_names()
    exec(first.replace("32000", "1000").replace("256", "64"), names)
    logits, target, rows = names["logits"], names["target"], names["hidden"] @ names["weight"].T
    (expected,) = torch.autograd.grad(F.cross_entropy(rows, target), names["hidden"])
    torch.testing.assert_close(names["hidden"].grad, expected, rtol=1e-4, atol=1e-6)
    printed = [float(number) for number in re.findall(r"tensor\(([\d.]+)", capsys.readouterr().out)]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    correct = (logits.argmax(-1) == target).float().mean().item()
    expected = [F.cross_entropy(logits, target, label_smoothing=0.1).item(), entropy, correct]
    assert printed == pytest.approx(expected, abs=1e-3)

    found = {}
    for statement in ast.parse(second).body:
        code = ast.unparse(statement)
        exec(code, names)
        if code.startswith("loss = "):
            found[re.search(r"tilewise\.([\w.]+)", code)[1]] = names["loss"].item()
    assert set(found) == {
        "linear_cross_entropy",
        "linear_z_loss",
        "cross_entropy",
        "multi_similarity_loss",
        "info_nce",
        "nn.SamplesLoss",
    }
    assert found["linear_cross_entropy"] == pytest.approx(F.cross_entropy(rows + names["bias"], target).item(), 1e-5)
    assert found["cross_entropy"] == pytest.approx(F.cross_entropy(logits, target).item(), 1e-5)
    assert all(math.isfinite(value) for value in found.values())
    assert names["out"].shape == names["q"].shape and names["result"].converged
    assert isinstance(names["model"].head, torch.nn.Linear)
    assert isinstance(names["model"].q_proj, tilewise.nn.WTACRSLinear)
    assert not isinstance(names["model"].head, tilewise.nn.WTACRSLinear)


@in_source_tree
def test_every_public_function_stands_in_the_readme():
    text = README.read_text()
    functions = {*DOCUMENTED, "nn.FactoredSphericalOutput", "nn.SampledGroup", "nn.WTACRSLinear", "nn.convert_linear"}
    table = text[text.index("| operator | what") : text.index("## Use")]
    assert {name for name in functions if f"`{name}`" not in table} == {"backend"}


@in_source_tree
def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert "docs/figures.md" in links
    manifest = (README.parent / "MANIFEST.in").read_text().split()
    for link in links:
        assert (README.parent / link).exists() and link in manifest


def measured():
    """Folder -> the files of a machine that hold results."""
    files = [(path.parent.name, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/*.json"))]
    folders = dict.fromkeys(name for name, content in files if "results" in content)
    return {name: [content for folder, content in files if folder == name and "results" in content] for name in folders}


def cases(contents):
    """(operator, shape, dtype) -> contender -> its result of forward + backward."""
    found = {}
    for row in (row for content in contents for row in content["results"] if row["phase"] == "both"):
        key = row["case"], " × ".join(map(str, row["shape"])), row["dtype"]
        found.setdefault(key, {})[row["contender"]] = row
    return found


def table_rows(text, first):
    """The cells of the lines of the table whose first column is `first`."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def digits(cell):
    """The first number of a cell."""
    return float(re.search(r"[\d,]*\.?\d+", cell)[0].replace(",", ""))


@in_source_tree
def test_rows_of_the_readme_are_those_of_the_newest_results():
    contents = max(measured().values(), key=lambda found: max(content["environment"]["date"] for content in found))
    environment, found = contents[0]["environment"], cases(contents)
    block = README.read_text().split("<!-- bench:begin -->")[1].split("<!-- bench:end -->")[0]
    assert f"{environment['device']}, {environment['instruction_set']}, {environment['threads']} threads" in block
    rows = table_rows(block, "operator | size")
    assert len({row[0] for row in rows}) == len(rows) == 3
    for op, size, ours, fastest, eager, faster, runs in rows:
        shape, dtype = size.rsplit(" ", 1)
        group = found[op.strip("`"), shape, dtype]
        right = [row for row in group.values() if row["correct"] and not row["ours"]]
        mine = min((row for row in group.values() if row["ours"] and row["correct"]), key=lambda row: row["median_ms"])
        rival = min(right, key=lambda row: row["median_ms"])
        assert fastest.startswith(f"{rival['contender']}: ") and int(runs) == mine["runs"]
        for cell, row in ((ours, mine), (fastest.split(": ")[1], rival), (eager, group["torch eager"])):
            time, memory = cell.split(" ms, ")
            assert digits(time) == pytest.approx(row["median_ms"], rel=5e-3)
            assert memory.endswith("MiB") and digits(memory) == pytest.approx(row["peak_extra_bytes"] / 2**20, rel=5e-3)
        ratios = [digits(part) for part in faster.split(",")]
        expected = [row["median_ms"] / mine["median_ms"] for row in (rival, group["torch eager"])]
        assert ratios == pytest.approx(expected, abs=0.051) and ratios[0] > 1


@in_source_tree
def test_the_readme_hides_no_loss():
    """Whatever a right contender, or one beside the case, does faster on any machine is named with its operator."""
    losses = README.read_text().split("Where it does not win")[1].split("- Memory")[0]
    slower = set()
    for (op, *_), group in (case for contents in measured().values() for case in cases(contents).items()):
        mine = min(row["median_ms"] for row in group.values() if row["ours"] and row["correct"])
        others = [row for row in group.values() if not row["ours"] and row["correct"] is not False]
        if any(row["median_ms"] < mine for row in others if row["contender"] != "plain copy"):
            slower.add(op)
    assert slower and set(re.findall(r"`(\w+)`", losses)) == slower


@in_source_tree
def test_figures_are_those_of_the_results():
    """Each machine's section names its instruction set and holds each of its results."""
    sections = FIGURES.read_text().split("\n## ")[1:]
    machines = measured()
    assert len(sections) == len(machines)
    for contents in machines.values():
        environment = contents[0]["environment"]
        title = f"{environment['device']}, {environment['instruction_set']}, {environment['threads']} threads"
        (section,) = (section for section in sections if section.startswith(f"{title}, torch {environment['torch']}"))
        lines = [
            line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ") and "---" not in line
        ]
        shown = [[cell.strip(" *") for cell in line] for line in lines if line[0].strip() != "operator"]
        rows = [row for group in cases(contents).values() for row in group.values()]
        assert len(shown) == len(rows)
        times = sorted((cells[3].removesuffix(" (inexact)"), digits(cells[4])) for cells in shown)
        expected = sorted((row["contender"], row["median_ms"]) for row in rows)
        for (name, time), (contender, median) in zip(times, expected, strict=True):
            assert name == contender and time == pytest.approx(median, rel=5e-3)
    assert ("GPU: not measured yet" in FIGURES.read_text()) == (
        not any(c[0]["environment"]["gpu"] for c in machines.values())
    )


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("figures")


def timed(op, times, runs=5, date="2026-01-02"):
    """A result file with these medians: ours have names that begin with tilewise, (name) computes another function."""
    rows = []
    for name, median in times.items():
        other = name.startswith("(")
        row = {"case": op, "shape": [8, 8], "dtype": "float32", "contender": name.strip("()"), "phase": "both"}
        row |= {
            "ours": name.startswith("tilewise"),
            "median_ms": median,
            "runs": runs,
            "correct": None if other else True,
        }
        row |= {
            "peak_extra_bytes": median * 2**20,
            "error": None if other else {"gradient": median / 1e6},
        }
        rows.append(row)
    machine = {"device": "Test CPU", "instruction_set": "AVX2", "threads": 2, "torch": "2.13", "gpu": False}
    return {"environment": machine | {"date": date}, "results": rows}


@in_source_tree
def test_strongest_cases_are_one_a_family_and_exact(figures):
    files = {
        op: timed(op, {"tilewise": 10.0, "torch eager": eager, "torch.compile": compiled})
        for op, eager, compiled in [
            ("cross_entropy", 900.0, 20.0),  # by the fastest other, not by eager
            ("z_loss", 50.0, 40.0),
            ("supcon", 30.0, 31.0),
            ("mala", 25.0, 9.0),
            ("sinkhorn", 50.0, 60.0),
            ("wta_crs_linear", 990.0, 990.0),
        ]
    }
    assert [contest.op for contest in figures.results.strongest(files)] == ["sinkhorn", "z_loss", "supcon"]
    assert [round(contest.advantage, 6) for contest in figures.results.strongest(files)] == [5.0, 4.0, 3.0]
    for row in files["sinkhorn"]["results"]:
        row["correct"] = not row["ours"] and row["contender"] != "torch eager"  # ours is wrong
    assert [contest.op for contest in figures.results.strongest(files)] == ["z_loss", "supcon", "mala"]


@in_source_tree
def test_readme_tells_gains_and_losses(figures, tmp_path):
    old = {
        "mala": timed("mala", {"tilewise": 40.0, "torch eager": 20.0, "(softmax)": 10.0}),
        "supcon": timed("supcon", {"tilewise": 1.0, "torch eager": 99.0}),
    }
    new = {
        "mala": timed("mala", {"tilewise": 10.0, "tilewise b": 30.0, "torch eager": 8.0}, date="2026-01-09"),
        "z_loss": timed("z_loss", {"tilewise": 10.0, "torch eager": 45.0, "torch.compile": 30.0}, runs=1),
    }
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    machines = {"old": old, "new": new}
    figures.update_readme(readme, machines)
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\nForward + backward on Test CPU, AVX2, 2 threads, torch")
    assert text.endswith("<!-- bench:end -->\nafter\n") and "old" not in text and "supcon" not in text
    for shown in (
        "2026-01-02 to 2026-01-09, against",
        "- Time: less in 1 of 2 cases.",
        "- Memory: less in 1 of 2 cases; the most is saved by `z_loss`: 10.0 MiB where torch eager takes 45.0 MiB.",
        "worst row is 1.0e-05 to 1.0e-05, torch eager's 8.0e-06 to 4.5e-05; it is no larger",
        "| `z_loss` | 8 × 8 float32 | 10.0 ms, 10.0 MiB | torch.compile: 30.0 ms, 30.0 MiB | 45.0 ms",
        "45.0 ms, 45.0 MiB | 3.0×, 4.5× | 1 |",
        "- Time: `mala` 4.00 × softmax (another function).",
        "- Memory, where above 1.05: `mala` 4.00 × softmax (another function).",
        "GPU: not measured yet",
    ):
        assert shown in text
    figures.update_readme(readme, machines)
    assert readme.read_text() == text
    figures.update_readme(readme, {})
    assert "| operator |" not in readme.read_text()
    with pytest.raises(SystemExit, match="lacks the marks"):
        readme.write_text("no marks")
        figures.update_readme(readme, {})


@in_source_tree
def test_readme_and_figures_of_the_project_are_up_to_date(figures):
    machines = figures.results.load(RESULTS)
    assert f"{figures.MARKS[0]}\n{figures.readme_figures(machines)}{figures.MARKS[1]}" in figures.README.read_text()
    assert figures.PAGE.read_text() == figures.figures_page(machines)
