"""Result files: what they hold, where they lie, and the figures derived from them."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from case import PHASES, SAMPLED, Case, Contender, family
from measure import Error, quartiles

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
EAGER, COPY = "torch eager", "plain copy"


def run_text(*command: str) -> str | None:
    """Output of a command, or None where it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_info(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.+)$", path.read_text(), re.M) if path.exists() else None
    return found.group(1).strip() if found else None


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return cpu_info("model name") or platform.processor() or platform.machine()


def instruction_set(device: str) -> str | None:
    """What the CPU kernels run with: processors of one name differ in it, and it decides the figures."""
    if device == "cuda" or version("tilewise") is None:
        return None
    level = importlib.import_module("tilewise.loading").cpu_isa()
    return {"v2": "SSE4.2", "v3": "AVX2", "v4": "AVX-512"}.get(level, level)


def clocks(device: str) -> str | None:
    if device == "cuda":
        query = "--query-gpu=clocks.sm,clocks.mem"
        return run_text("nvidia-smi", query, "--format=csv,noheader")
    megahertz = cpu_info("cpu MHz")
    return f"{float(megahertz):.0f} MHz" if megahertz else None


def version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def revision() -> str | None:
    commit = run_text("git", "rev-parse", "--short=12", "HEAD")
    changed = run_text("git", "status", "--porcelain", "--", "csrc", "pysrc", "triton_kernels")
    return commit and commit + ("-dirty" if changed else "")


def environment(device: str) -> dict:
    return {
        "device": device_name(device),
        "gpu": device == "cuda",
        "instruction_set": instruction_set(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "clocks": clocks(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "tilewise": version("tilewise"),
        "revision": revision(),
        "date": datetime.date.today().isoformat(),
    }


def machine_title(environment: dict) -> str:
    """One machine's name for a reader; instruction set and threads only matter where the CPU does the work."""
    if environment["gpu"]:
        return environment["device"]
    parts = environment["device"], environment["instruction_set"], f"{environment['threads']} threads"
    return ", ".join(filter(None, parts))


def machine_name(device: str) -> str:
    """Folder name of this machine's results."""
    return re.sub(r"[^a-z0-9]+", "-", machine_title(environment(device)).lower()).strip("-")


def setting(environment: dict) -> str:
    """What has to be equal where figures stand side by side."""
    return f"{machine_title(environment)}, torch {environment['torch']}"


def rows(
    case: Case, contender: Contender, times: dict[str, list[float]], peak: int | None, error: Error | None, copy: float
):
    """One result per phase. GB/s counts the case's stated traffic, so it compares times, not implementations."""
    for phase in PHASES:
        if phase not in times:
            continue
        q25, median, q75 = quartiles(times[phase])
        traffic = 2 * case.traffic["forward"] if contender.loss is None else case.traffic[phase]
        gbs = traffic / median / 1e6
        yield {
            "case": case.op,
            "shape": list(case.shape),
            "dtype": case.dtype_name,
            "backend": contender.backend,
            "contender": contender.name,
            "ours": contender.ours,
            "phase": phase,
            "median_ms": median,
            "q25_ms": q25,
            "q75_ms": q75,
            "runs": len(times[phase]),
            "traffic_bytes": traffic,
            "flops": 0 if contender.loss is None else case.flops[phase],
            "gbs": gbs,
            "copy_fraction": gbs / copy,
            "peak_extra_bytes": peak if phase == "both" else None,
            "error": asdict(error) if error else None,
            "correct": error.within(case.dtype) if error else None,
        }


def groups(results: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(operator, shape, dtype) -> contender -> its result for forward + backward, in the order measured."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in results:
        if row["phase"] == "both":
            key = row["case"], tuple(row["shape"]), row["dtype"]
            found.setdefault(key, {})[row["contender"]] = row
    return found


def gflops(row: dict) -> float:
    return row["flops"] / row["median_ms"] / 1e6


def speedups(group: dict[str, dict]) -> list[tuple[str, str, float]]:
    """(ours, other, how many times faster) for one case; a wrong result of ours claims nothing."""
    mine = [row for row in group.values() if row["ours"] and row["correct"]]
    others = [row for row in group.values() if not row["ours"]]
    return [(a["contender"], b["contender"], b["median_ms"] / a["median_ms"]) for a in mine for b in others]


class Contest(NamedTuple):
    """One case: our results that are right, those of others that are, and those of others for another function."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    ours: list[dict]
    rivals: list[dict]
    beside: list[dict]

    @property
    def eager(self) -> dict | None:
        return next((row for row in self.rivals if row["contender"] == EAGER), None)

    @property
    def advantage(self) -> float:
        """How many times faster the fastest of ours is than the fastest rival."""
        return least(self.rivals, "median_ms")["median_ms"] / least(self.ours, "median_ms")["median_ms"]


def least(found: list[dict], key: str) -> dict:
    return min(found, key=lambda row: row[key])


def contests(files: dict[str, dict]) -> list[Contest]:
    """Every case of a machine in which ours met another contender."""
    found = []
    for (op, shape, dtype), group in groups([row for c in files.values() for row in c.get("results", [])]).items():
        ours = [row for row in group.values() if row["ours"] and row["correct"]]
        others = [row for row in group.values() if not row["ours"] and row["contender"] != COPY]
        right, beside = [row for row in others if row["correct"]], [row for row in others if row["correct"] is None]
        if ours and right:
            found.append(Contest(op, shape, dtype, ours, right, beside))
    return found


def strongest(files: dict[str, dict], wanted: int = 3) -> list[Contest]:
    """The largest advantages of a machine where torch eager is right, too, one a family; an estimate wins nothing over
    what is exact."""
    best: dict[str, Contest] = {}
    for contest in sorted(contests(files), key=lambda contest: -contest.advantage):
        if contest.eager:
            best.setdefault(family(contest.op), contest)
    best.pop(SAMPLED, None)
    return list(best.values())[:wanted]


def beaten(machines: dict[str, dict[str, dict]], key: str, slack: float) -> dict[str, tuple[float, dict]]:
    """Operator -> its worst ratio to the least of the others, in `key`, and that other; where it is above `slack`."""
    found: dict[str, tuple[float, dict]] = {}
    for contest in (contest for files in machines.values() for contest in contests(files)):
        others = [row for row in contest.rivals + contest.beside if row[key] is not None]
        if not others:
            continue
        other = least(others, key)
        ratio = least(contest.ours, key)[key] / (other[key] or 1.0)  # no memory counts as a byte
        if ratio > max(slack, found.get(contest.op, (0.0,))[0]):
            found[contest.op] = ratio, other
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def newest(machines: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """The files of the machine that was measured last, of those where ours met another contender."""
    met = [files for files in machines.values() if contests(files)]
    return max(met, key=lambda files: max(content["environment"]["date"] for content in files.values()), default={})


def save(path: Path, content: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")


def load(folder: Path) -> dict[str, dict[str, dict]]:
    """setting -> file stem -> content of every measurement under `folder`."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if "environment" in content:
            found.setdefault(setting(content["environment"]), {})[path.stem] = content
    return found


def say(line: str):
    print(line, flush=True)
