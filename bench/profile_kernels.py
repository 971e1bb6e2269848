"""Nsight Compute on the benchmark cases that are furthest from their bound: a few metrics of every kernel, as JSON.

    python bench/profile_kernels.py --results bench/results/nvidia-h100 --out profile.json

A case's bound is the longer of its bytes at the measured copy speed and its operations at that of a matrix product. Of
each operator and backend the worst case is looked at, and of those the worst six. The JSON is written after each; where
ncu is missing, or is not allowed to read counters, the exit status is 77.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import measure
from case import Case, Contender
from gpu import UNAVAILABLE
from results import groups, save, say

REFUSES = re.compile("ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize", re.I)
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
LAUNCHES = 24  # of one case: enough for a few of its iterations
SECONDS = 65.0  # for one case


class Far(NamedTuple):
    distance: float  # time over its bound
    op: str
    shape: tuple[int, ...]
    dtype: str
    contender: str
    median_ms: float
    bound_ms: float


def bound_ms(row: dict, ceilings: dict[str, float]) -> float:
    products = ceilings.get(f"gemm_{row['dtype']}_gflops")
    return max(row["traffic_bytes"] / ceilings["copy_gbs"], row["flops"] / products if products else 0.0) / 1e6


def furthest(folder: Path, wanted: int) -> list[Far]:
    worst: dict[tuple[str, str], Far] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        for (op, shape, dtype), group in groups(content.get("results", [])).items():
            for row in group.values():
                if row["ours"]:
                    bound = bound_ms(row, content["ceilings"])
                    far = Far(row["median_ms"] / bound, op, shape, dtype, row["contender"], row["median_ms"], bound)
                    key = op, row["backend"]
                    worst[key] = max(far, worst.get(key, far))
    return sorted(worst.values(), reverse=True)[:wanted]


def find(device: str, op: str, label: str, contender: str, quick: bool) -> tuple[Case, Contender]:
    for case in importlib.import_module(f"cases.{op}").cases(device, quick):
        if case.label == label:
            return case, next(c for c in case.contenders if c.name == contender)
    raise SystemExit(f"{op} has no case {label}")


def run_once(case: Case, contender: Contender):
    """A warm-up, then one forward and backward that the profiler sees."""
    problem = measure.Problem(case, measure.HostClock())
    with contender.selected():
        problem.answer(contender)
        problem.restore()
        if case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        problem.answer(contender)
        if case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def number(text: str) -> float | None:
    """None for what a chip does not count: empty, or n/a."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def kernels(output: str) -> list[dict]:
    """ncu's table: a line of names, one of units, one for each launch."""
    lines = itertools.dropwhile(lambda line: not line.startswith('"ID"'), output.splitlines())
    found = []
    for row in csv.DictReader(lines):
        if row["ID"].isdigit():
            metrics = {ours: number(row.get(theirs, "")) for theirs, ours in METRICS.items()}
            found.append({"kernel": row["Kernel Name"][:120]} | metrics)
    return found


def profiled(far: Far) -> tuple[list[dict], str]:
    """Metrics of each launch, and what was said instead when there are none."""
    label = f"{' x '.join(map(str, far.shape))} {far.dtype}"
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command += ["--profile-from-start", "off", "--clock-control", "none", "--launch-count", str(LAUNCHES)]
    command += [sys.executable, __file__, "--op", far.op, "--label", label, "--contender", far.contender]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"took more than {SECONDS:.0f} s"
    found = kernels(done.stdout)
    lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
    own = [line for line in lines if not line.startswith("==")] or lines  # not the profiler's, that something failed
    return found, "" if found else next((line for line in lines if REFUSES.search(line)), own[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", help="folders: the first that holds benchmarks")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--op", help="run this case once, for the profiler")
    parser.add_argument("--label")
    parser.add_argument("--contender")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    if options.op:
        run_once(*find(options.device, options.op, options.label, options.contender, options.quick))
        return 0
    chosen = next(filter(None, (furthest(folder, options.cases) for folder in options.results)), [])
    content = {"unavailable": None, "cases": []}
    if not shutil.which("ncu"):
        content["unavailable"] = "ncu is not on PATH"
    for far in chosen if content["unavailable"] is None else ():
        found, reason = profiled(far)
        say(f"{far.distance:6.1f} x its bound: {far.op} {far.shape} {far.dtype}, {far.contender}: {reason or 'read'}")
        if REFUSES.search(reason):
            content["unavailable"] = reason
            break
        content["cases"].append(far._asdict() | {"kernels": found, "failed": reason or None})
        save(options.out, content)
    save(options.out, content)
    if content["unavailable"]:
        say(f"unavailable: {content['unavailable']}")
        return UNAVAILABLE
    if not chosen:
        say(f"no benchmark of ours in {' or '.join(map(str, options.results))}: make gpu-bench comes first")
    failed = [case for case in content["cases"] if case["failed"]]
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
