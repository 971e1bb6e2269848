"""Predictions as `make predict` writes them, and beside what was measured. Needs nothing but Python."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results" / "predicted"
NOTE = "predicted by bench/predict.py, not measured"


def save(path: Path, gpu: str, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{{\n "gpu": "{gpu}",\n "note": "{NOTE}",\n "predictions": [\n{lines}\n ]\n}}\n')


def load(gpu: str) -> list[dict]:
    """Of a GPU by its name in bench/devices.py; none where there are none."""
    path = FOLDER / f"{gpu.lower()}.json"
    return json.loads(path.read_text())["predictions"] if path.exists() else []


def of_device(name: str) -> str | None:
    """The GPU of bench/devices.py that a device of this name is, such as "NVIDIA H100 80GB HBM3". No PCIe card."""
    known = (path.stem.upper() for path in sorted(FOLDER.glob("*.json")))
    return next((gpu for gpu in known if gpu in name.upper() and "PCIE" not in name.upper()), None)


def key_of(row: dict) -> tuple:
    """What a prediction and a measurement have in common."""
    return row["case"], tuple(row["shape"]), row["dtype"], row["contender"], row["phase"]


def beside(device: str, rows: list[dict]) -> list[tuple[dict, float]]:
    """Measured results, each with its predicted ms, where both exist."""
    gpu = of_device(device)
    found = {key_of(row): row["predicted_ms"] for row in load(gpu)} if gpu else {}
    return [(row, found[key_of(row)]) for row in rows if key_of(row) in found]


def measured(folder: Path) -> list[dict]:
    """The results of all benchmarks in a folder."""
    contents = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return [row for content in contents for row in content.get("results", [])]


def label(row: dict) -> str:
    variant = row["contender"].removeprefix("tilewise cuda").strip()
    return " ".join(filter(None, [row["case"], "x".join(map(str, row["shape"])), row["dtype"], variant]))


def side_by_side(device: str, rows: list[dict]) -> str:
    """A line for each case and phase; empty where nothing is both predicted and measured."""
    both = beside(device, rows)
    if not both:
        return ""
    wide = max(len(label(row)) for row, _ in both)
    lines = [f"{'case':{wide}}  {'phase':8} {'predicted ms':>12} {'measured ms':>12} {'ratio':>6}"]
    for row, expected in both:
        ms = row["median_ms"]
        lines.append(f"{label(row):{wide}}  {row['phase']:8} {expected:12.3g} {ms:12.3g} {ms / expected:6.2f}")
    return "\n".join([*lines, "ratio: measured by predicted"])


def table(gpu: str) -> str:
    """All predictions for one GPU, a line for each case."""
    cases: dict[str, dict[str, dict]] = {}
    for row in load(gpu):
        cases.setdefault(label(row), {})[row["phase"]] = row
    wide = max(map(len, cases), default=4)
    lines = [f"{f'predicted for {gpu}, ms':{wide}}  {'forward':>9} {'backward':>9} {'both':>9}  most of it"]
    for name, of in cases.items():
        times = " ".join(f"{of[phase]['predicted_ms']:9.3g}" for phase in ("forward", "backward", "both"))
        most = of["both"]
        lines.append(f"{name:{wide}}  {times}  {most['share']:4.0%} {most['most']}, by {most['limit']}")
    return "\n".join(lines)
