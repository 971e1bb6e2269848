"""Build the HTML report, or with --readme docs/figures.md and the figures of README.md, from bench/results."""

from __future__ import annotations

import argparse
import importlib
from html import escape
from pathlib import Path

import figures
import plots
import predicted
import results
from case import TRANSPORT, family, forms_products
from plots import Bar, number, shape_text, size
from results import COPY, EAGER, ROOT

STYLE = Path(__file__).with_name("report.css")
REPORT = ROOT / "bench" / "report" / "index.html"
CEILINGS = {
    "copy_gbs": ("copy, read + written", "GB/s"),
    "gemm_float32_gflops": ("float32 matrix product", "GFLOP/s"),
    "gemm_tf32_gflops": ("tf32 matrix product", "GFLOP/s"),
    "gemm_bfloat16_gflops": ("bfloat16 matrix product", "GFLOP/s"),
    "launch_us": ("launch of a tiny operation", "µs"),
    "exp_giga": ("float32 exp", "billion/s"),
}
RATES = {
    "Whiskers": "quartiles.",
    "GB/s": "one traffic for all contenders, that of the case; transport counts a pass over its pairs each iteration.",
    "GFLOP/s": "one count of operations for all: the matrix products of an exact implementation.",
    "Predicted": "by bench/predict.py from what every launch takes and the GPU's data sheet; not measured.",
}


def kind(row: dict) -> str:
    return "ours" if row["ours"] else "floor" if row["contender"] == COPY else "peer"


def shared_facts(environments: list[dict]) -> dict[str, str]:
    """What is the same in all of them."""
    names = ("clocks", "python", "torch", "triton", "tilewise", "revision", "date")
    return {name: environments[0][name] for name in names if len({e[name] for e in environments}) == 1}


def environment_facts(shared: dict[str, str], ceilings: dict) -> str:
    named = shared | {name: f"{number(ceilings[k])} {unit}" for k, (name, unit) in CEILINGS.items() if k in ceilings}
    cells = "".join(f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in named.items() if v is not None)
    return f'<dl class="facts">{cells}</dl>'


def tiles(content: dict) -> str:
    """The first case's speed-ups over torch, the figures a reader looks for first."""
    first = next(iter(results.groups(content["results"]).items()), None)
    if first is None:
        return ""
    (op, shape, dtype), group = first
    found = [
        f'<div class="tile"><b>{ratio:.1f}×</b><span>{escape(ours)}<br>against {escape(other)}</span></div>'
        for ours, other, ratio in results.speedups(group)
        if other in (EAGER, "torch.compile")
    ]
    title = f"{op}, {shape_text(shape)} {dtype}, forward + backward: how many times faster"
    return f'<p class="tiles-title">{title}</p><div class="tiles">{"".join(found)}</div>'


def bound(op: str, row: dict, ceilings: dict[str, float]) -> tuple[float, str] | None:
    """The least time in ms that the case's work takes on this machine, and what it is; None without that ceiling."""
    if not forms_products(op):
        what = "a pass over the pairs for every iteration" if family(op) == TRANSPORT else "its reads and writes"
        return row["traffic_bytes"] / ceilings["copy_gbs"] / 1e6, f"{what} at copy speed"
    gemm = ceilings.get(f"gemm_{row['dtype']}_gflops")
    return (row["flops"] / gemm / 1e6, "its matrix products at full speed") if gemm else None


def case_card(op: str, title: str, group: dict[str, dict], forward: dict[str, dict], ceilings: dict[str, float]) -> str:
    rows = list(group.values())
    layer = forms_products(op)
    model = next((row for row in rows if row["contender"] != COPY), None)
    marker = bound(op, model, ceilings) if model else None
    times = []
    for row in rows:
        parts = [f"{number(row['median_ms'])} ms"]
        if EAGER in group and row["contender"] not in (EAGER, COPY):
            parts.append(f"{group[EAGER]['median_ms'] / row['median_ms']:.1f}× eager")
        if not layer:
            parts.append(f"{row['copy_fraction']:.0%} of copy speed")
        first = forward[row["contender"]]["median_ms"] if row["contender"] in forward else None
        times.append(
            Bar(row["contender"], row["median_ms"], ", ".join(parts), kind(row), row["q25_ms"], row["q75_ms"], first)
        )
    chart = plots.bars(f"{title}: forward and backward in milliseconds", "ms", times, marker=marker)
    held = [row for row in rows if row["peak_extra_bytes"] is not None]
    memory = ""
    if held:
        items = [
            Bar(row["contender"], row["peak_extra_bytes"] / 2**20, size(row["peak_extra_bytes"]), kind(row))
            for row in held
        ]
        beyond = "the inputs and the gradients returned" if layer else "the inputs"
        memory = f"<h5>Peak memory beyond {beyond}</h5>" + plots.bars(f"{title}: peak extra memory", "MiB", items)
    body = [
        [
            row["contender"] + (" (inexact)" if row["correct"] is False else ""),
            number(forward[row["contender"]]["median_ms"]) if row["contender"] in forward else "–",
            number(row["median_ms"]),
            f"{number(row['q25_ms'])} – {number(row['q75_ms'])}",
            str(row["runs"]),
            number(results.gflops(row) if layer else row["gbs"]),
            f"{row['error']['loss']:.1e}" if row["error"] else "–",
            f"{row['error']['gradient']:.1e}" if row["error"] else "–",
        ]
        for row in rows
    ]
    rate = "GFLOP/s" if layer else "GB/s"
    head = ["", "forward ms", "both ms", "quartiles", "runs", rate, "loss error", "gradient error"]
    marks = ["inexact" if row["correct"] is False else kind(row) for row in rows]
    return (
        f'<div class="card"><h4>{title}</h4><h5>Forward, then backward</h5>{chart}{memory}'
        f"{plots.table(head, body, marks.__getitem__)}</div>"
    )


def own_facts(content: dict, shared: dict[str, str]) -> str:
    """Where one file's measurements differ from its machine's others."""
    own = {name: value for name, value in shared_facts([content["environment"]]).items() if name not in shared}
    facts = ", ".join(f"{name} {value}" for name, value in own.items() if value is not None)
    return f'<p class="soft">{escape(facts)}.</p>' if facts else ""


def predicted_card(content: dict) -> str:
    """Predicted beside measured times; empty where nothing is both."""
    both = predicted.beside(content["environment"]["device"], content["results"])
    body = [
        [predicted.label(row), row["phase"], number(ms), number(row["median_ms"]), f"{row['median_ms'] / ms:.2f}"]
        for row, ms in both
    ]
    head = ["", "phase", "predicted ms", "measured ms", "measured / predicted"]
    return f'<div class="card"><h4>Predicted and measured</h4>{plots.table(head, body)}</div>' if body else ""


def operator_section(op: str, content: dict, shared: dict[str, str]) -> str:
    forward: dict[tuple, dict[str, dict]] = {}
    for row in content["results"]:
        if row["phase"] == "forward":
            forward.setdefault((row["case"], tuple(row["shape"]), row["dtype"]), {})[row["contender"]] = row
    cards = [
        case_card(op, f"{shape_text(key[1])}, {key[2]}", group, forward.get(key, {}), content["ceilings"])
        for key, group in results.groups(content["results"]).items()
    ]
    absent = "; ".join(f"{name}: {reason}" for name, reason in content["absent"].items())
    note = f'<p class="soft">Not measured: {escape(absent)}.</p>' if absent else ""
    return f"<h3>{op}</h3>{own_facts(content, shared)}{''.join(cards)}{predicted_card(content)}{note}"


def training_section(training: dict) -> str:
    found = training["contenders"]
    series = {row["contender"]: row["losses"] for row in found}
    kinds = {row["contender"]: "ours" if row["ours"] else "peer" for row in found}
    swatches = {name: f"c{order}" for order, name in enumerate(series)}
    steps = [
        Bar(
            row["contender"],
            row["median_ms"],
            f"{number(row['median_ms'])} ms, held-out loss {row['held_out_loss']:.4f}",
            kinds[row["contender"]],
            row["q25_ms"],
            row["q75_ms"],
        )
        for row in found
    ]
    off = max(row["largest_difference"] for row in found)
    return (
        "<h3>Main job: a word-level language model</h3>"
        f'<p class="soft">{training["words"]:,} words of the English text that ships with Python, '
        f"{training['classes']:,} classes, {training['batch']} words a step, {training['steps']} steps, one seed for "
        f"all. The curves differ by at most {off:.1e}.</p>"
        f'<div class="card"><h4>Training loss</h4>{plots.legend(swatches)}'
        f"{plots.curves('Training loss by step', 'step', series, kinds)}"
        f"<h5>Time of one whole training step</h5>{plots.bars('Time of a training step', 'ms', steps)}</div>"
    )


def machine_section(files: dict[str, dict]) -> str:
    environments = [content["environment"] for content in files.values()]
    shared = shared_facts(environments)
    ceilings = files["roofline"]["ceilings"] if "roofline" in files else {}
    operators = {op: content for op, content in files.items() if "results" in content}
    parts = [f"<h2>{escape(results.machine_title(environments[0]))}</h2>", environment_facts(shared, ceilings)]
    if operators:
        parts.append(tiles(next(iter(operators.values()))))
    parts += [operator_section(op, content, shared) for op, content in operators.items()]
    parts += [training_section(content["training"]) for content in files.values() if "training" in content]
    for content in files.values():
        if "headline" in content:
            parts.append(importlib.import_module(f"headlines.{content['headline']}").section(content))
    return "".join(parts)


def page(machines: dict[str, dict[str, dict]]) -> str:
    swatches = plots.legend(
        {"tilewise forward": "ours-deep", "backward": "ours", "others forward": "peer-deep", "others backward": "peer"}
        | {"plain copy": "floor"}
    )
    method = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in (figures.LEGEND | RATES).items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>tilewise measurements</title>'
        f"<style>{STYLE.read_text()}</style></head><body><h1>tilewise measurements</h1>"
        f'{swatches}<dl class="method">{method}</dl>{"".join(map(machine_section, machines.values()))}</body></html>\n'
    )


def write(machines: dict[str, dict[str, dict]], out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(machines))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write README.md's figures and docs/figures.md instead")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    machines = results.load(options.results)
    if options.readme:
        figures.write(machines)
    else:
        print(write(machines, options.out))


if __name__ == "__main__":
    main()
