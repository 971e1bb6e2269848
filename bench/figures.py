"""Markdown from the JSON under bench/results: docs/figures.md and the figures of README.md."""

from __future__ import annotations

import re
from pathlib import Path

import results
from case import ATTENTION, GRADIENT_ERROR, LAYERS, PAIRS, ROWS, SAMPLED, SCALAR_ERROR, TRANSPORT, family
from plots import number, shape_text, size
from results import COPY, EAGER, ROOT, Contest, least

README, PAGE = ROOT / "README.md", ROOT / "docs" / "figures.md"
MARKS = "<!-- bench:begin -->", "<!-- bench:end -->"
SHAPES = {
    ROWS: "logits",
    LAYERS: "rows × features × classes",
    PAIRS: "embeddings",
    ATTENTION: "batch × heads × tokens × features",
    SAMPLED: "rows × width × layers",
    TRANSPORT: "(batch ×) rows × columns (× features or k)",
}
TOLERANCES = ", ".join(
    f"{SCALAR_ERROR[dtype]:.0e} and {GRADIENT_ERROR[dtype]:.0e} in {str(dtype).removeprefix('torch.')}"
    for dtype in SCALAR_ERROR
)
LEGEND = {
    "Time": "median of forward + backward, the gradients by torch.autograd.grad. Contenders take turns in one process, "
    "each from the same restored inputs. Of one run the median is that run.",
    "×": "torch eager's time divided by the contender's: above 1 is faster than eager.",
    "Memory": "peak beyond the inputs; where the work is matrix products, beyond the returned gradients too.",
    "Errors": "relative to float64: of the loss, and of the worst row checked of any gradient. An eighth of the "
    "rows of logits is confident: p near 0.99, from output layers near 0.9.",
    "Inexact": f"an error of loss or gradient above {TOLERANCES}. Such a result of tilewise is not timed.",
    "No errors": "the contender computes another function and stands beside the case; a plain copy is the floor.",
    "wta_crs_linear": "estimates the gradient of the weight; its errors are of the exact parts.",
    "Instruction set": "the one tilewise ran with, after the processor's name: processors of one name differ in it.",
}
NO_GPU = "GPU: not measured yet. `make gpu` on a machine with an NVIDIA GPU tests and measures."


def markdown_table(head: list[str], body: list[list[str]], texts: int) -> str:
    """The first `texts` columns are text, the others figures."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body)) + "\n"


def machine_line(files: dict[str, dict]) -> str:
    """Processor, instruction set, threads, torch and the days of measurement."""
    environments = [content["environment"] for content in files.values()]
    dates = sorted(environment["date"] for environment in environments)
    return f"{results.setting(environments[0])}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def contender_line(row: dict, eager: dict | None) -> list[str]:
    """Name, ms, ×, memory and both errors."""
    name, error = row["contender"], row["error"]
    exact = row["correct"] is not False
    faster = f"{eager['median_ms'] / row['median_ms']:.1f}" if eager and exact and name != COPY else "–"
    errors = [f"{error[part]:.1e}" if error else "–" for part in ("loss", "gradient")]
    name = f"**{name}**" if row["ours"] else name if exact else f"{name} (inexact)"
    return [name, number(row["median_ms"]), faster, size(row["peak_extra_bytes"]), *errors]


def family_table(kin: str, files: dict[str, dict]) -> str:
    """One line a contender; the first of each case names the case, its runs and the day. Empty where none was run."""
    body = []
    for content in files.values():
        for (op, shape, dtype), group in results.groups(content.get("results", [])).items():
            if family(op) != kin:
                continue
            lines = [contender_line(row, group.get(EAGER)) for row in group.values()]
            runs, date = next(iter(group.values()))["runs"], content["environment"]["date"]
            marks = [[f"`{op}`", f"{shape_text(shape)} {dtype}", f"{runs}, {date}"]]
            marks += [["", "", ""]] * (len(lines) - 1)
            body += [mark + line for mark, line in zip(marks, lines, strict=True)]
    head = ["operator", SHAPES[kin], "runs, day", "contender", "ms", "×", "memory", "loss error", "gradient error"]
    return markdown_table(head, body, 4) if body else ""


def training_line(content: dict) -> str:
    steps = content["training"]["contenders"]
    times = ", ".join(f"{row['contender']} {number(row['median_ms'])} ms" for row in steps)
    off = max(row["largest_difference"] for row in steps)
    return f"One training step of the language model: {times}; loss curves within {off:.0e}.\n"


def gpu_line(machines: dict[str, dict[str, dict]]) -> str:
    contents = (content for files in machines.values() for content in files.values())
    return "" if any(content["environment"]["gpu"] for content in contents) else f"{NO_GPU}\n"


def figures_page(machines: dict[str, dict[str, dict]]) -> str:
    """docs/figures.md: the legend, and each machine's tables."""
    legend = "\n".join(f"- **{name}**: {text}" for name, text in LEGEND.items()) + "\n"
    parts = ["# Figures\n", "`make readme` writes this page from bench/results.\n", legend, gpu_line(machines)]
    for files in machines.values():
        tables = [f"### {kin.capitalize()}\n\n{table}" for kin in SHAPES if (table := family_table(kin, files))]
        if tables:
            parts += [f"## {machine_line(files)}\n", *tables]
            parts += [training_line(content) for content in files.values() if "training" in content]
    return "\n".join(filter(None, parts))


def strongest_line(contest: Contest) -> list[str]:
    """One row of the README: ours, the fastest rival, torch eager, and how many times faster than the two."""
    ours, rival = least(contest.ours, "median_ms"), least(contest.rivals, "median_ms")
    cells = [f"{number(row['median_ms'])} ms, {size(row['peak_extra_bytes'])}" for row in (ours, rival, contest.eager)]
    cells[1] = f"{rival['contender']}: {cells[1]}"
    faster = ", ".join(f"{row['median_ms'] / ours['median_ms']:.1f}×" for row in (rival, contest.eager))
    return [f"`{contest.op}`", f"{shape_text(contest.shape)} {contest.dtype}", *cells, faster, str(ours["runs"])]


def won(contests: list[Contest], key: str) -> str:
    """In how many cases ours takes less than every rival."""
    known = [c for c in contests if c.rivals[0][key] is not None]
    less = sum(least(c.ours, key)[key] < least(c.rivals, key)[key] for c in known)
    return f"{less} of {len(known)} cases"


def saving(contests: list[Contest]) -> str:
    """Where most memory is saved beside torch eager."""
    key = "peak_extra_bytes"
    pairs = [(c.eager[key], least(c.ours, key)[key], c.op) for c in contests if c.eager and c.eager[key] is not None]
    if not pairs:
        return ""
    theirs, mine, op = max(pairs, key=lambda pair: pair[0] - pair[1])
    return f"; the most is saved by `{op}`: {size(mine)} where torch eager takes {size(theirs)}"


def exactness(contests: list[Contest]) -> str:
    """The errors of gradients beside torch eager's."""
    pairs = [(least(c.ours, "median_ms"), c.eager) for c in contests if c.eager]
    if not pairs:
        return "torch eager is right in no case"
    ours, eager = ([row["error"]["gradient"] for row in rows] for rows in zip(*pairs, strict=True))
    ranges = [f"{min(errors):.1e} to {max(errors):.1e}" for errors in (ours, eager)]
    no_larger = sum(mine <= theirs for mine, theirs in zip(ours, eager, strict=True))
    return (
        f"the relative error of a gradient's worst row is {ranges[0]}, torch eager's {ranges[1]}; "
        f"it is no larger than torch eager's in {no_larger} of {len(pairs)} cases"
    )


def beaten_text(machines: dict[str, dict[str, dict]], key: str, slack: float) -> str:
    """Operators with their worst ratio to the least of the others, and which that is."""
    told = [
        f"`{op}` {ratio:.2f} × {row['contender']}{' (another function)' if row['correct'] is None else ''}"
        for op, (ratio, row) in results.beaten(machines, key, slack).items()
    ]
    return ", ".join(told) or "none"


def readme_figures(machines: dict[str, dict[str, dict]]) -> str:
    """What stands between the marks: the newest machine's gains and strongest rows, and what is lost on any machine."""
    files = results.newest(machines)
    if not files:
        return gpu_line(machines)
    exact = [contest for contest in results.contests(files) if family(contest.op) != SAMPLED]
    head = ["operator", "size", "tilewise", "fastest other", "torch eager", "faster than these", "runs"]
    parts = [
        f"Forward + backward on {machine_line(files)}, against the others that compute the same and are right:\n\n"
        f"- Time: less in {won(exact, 'median_ms')}.\n"
        f"- Memory: less in {won(exact, 'peak_extra_bytes')}{saving(exact)}.\n"
        f"- Exactness: {exactness(exact)}.\n",
        "The largest advantage in each of three families, median time of the runs and peak memory:\n",
        markdown_table(head, [strongest_line(contest) for contest in results.strongest(files)], 2),
        "Where it does not win: each operator's worst case on any machine, in multiples of the least of the others:\n\n"
        f"- Time: {beaten_text(machines, 'median_ms', 1.0)}.\n"
        f"- Memory, where above 1.05: {beaten_text(machines, 'peak_extra_bytes', 1.05)}.\n",
    ]
    return "\n".join(filter(None, [*parts, gpu_line(machines)]))


def update_readme(readme: Path, machines: dict[str, dict[str, dict]]):
    begin, end = MARKS
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    text = readme.read_text()
    if not pattern.search(text):
        raise SystemExit(f"{readme} lacks the marks {begin} and {end}")
    body = f"{begin}\n{readme_figures(machines)}{end}"
    readme.write_text(pattern.sub(lambda _: body, text))


def write(machines: dict[str, dict[str, dict]]):
    """README.md's part and docs/figures.md."""
    update_readme(README, machines)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(figures_page(machines))
