"""What `make gpu` runs after building in place: tests, compute-sanitizer and benchmarks on an NVIDIA machine.

Every stage has a time budget and is stopped when it overruns; all of them together end within nine minutes. The exit
status is nonzero when tests or the sanitizer fail. JSON and logs go to $OUT when it is set, else to
bench/results/<gpu>/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 470.0  # seconds for all stages; the rest of the nine minutes is the build's
BENCH_RESERVE = 150.0  # kept for the benchmarks, whatever the stages before them take
SANITIZER_REFUSES = re.compile("device not supported|unable to initialize", re.I)


@dataclass
class Stage:
    name: str
    command: list[str]
    seconds: float
    must_end: bool = True  # an overrun fails the whole
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    name: str
    state: str  # passed | failed | overran | unavailable | no time
    seconds: float
    detail: str

    @property
    def good(self) -> bool:
        return self.state in ("passed", "unavailable")


def stages(out: Path) -> list[Stage]:
    python = sys.executable
    found = [
        Stage(
            f"tests {backend}",
            [python, "-m", "pytest", "tests", "-q", "-x", "-m", "cuda", "-p", "no:cacheprovider"],
            seconds,
            environment={"TILEWISE_BACKEND": backend},
        )
        for backend, seconds in (("cuda", 110.0), ("triton", 190.0))
    ]
    for tool in ("memcheck", "racecheck"):
        for backend, seconds in (("cuda", 60.0), ("triton", 75.0)):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "5"]
            command += ["--target-processes", "application-only"]  # not the compilers that Triton starts
            command += [python, "bench/sanitize.py", "--backend", backend]
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Stage(f"{tool} {backend}", command, seconds, environment=uncached))
    return found + [bench_stage(out, 0.0)]


def bench_stage(out: Path, seconds: float) -> Stage:
    command = [sys.executable, "bench/run.py", "--device", "cuda", "--no-train", "--no-report", "--out", str(out)]
    # The driver starts no case that does not fit; what it has by then is written, so leave it time to end by itself.
    return Stage("benchmarks", [*command, "--budget", f"{max(seconds - 40.0, 10.0):.0f}"], seconds, must_end=False)


def gpu_name() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def run(stage: Stage, seconds: float, log: Path) -> Outcome:
    """One stage in its own process group, so that an overrun leaves nothing behind."""
    if not shutil.which(stage.command[0]):
        return Outcome(stage.name, "unavailable", 0.0, f"{stage.command[0]} is not on PATH")
    began = time.monotonic()
    with log.open("ab") as sink:
        sink.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n".encode())
        sink.flush()
        start = sink.tell()
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | stage.environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    output = log.read_bytes()[start:].decode(errors="replace").strip()
    last = output.splitlines()[-1] if output else ""
    if status is None:
        state = "overran"
    elif status == 0:
        state = "passed"
    elif "sanitize" in stage.command[0] and SANITIZER_REFUSES.search(output):
        state = "unavailable"
    else:
        state = "failed"
    if state in ("failed", "overran"):
        print(f"--- {stage.name}, the end of its output\n{output[-3000:]}\n---", flush=True)
    return Outcome(stage.name, state, time.monotonic() - began, last[:160])


def bench_table(log: Path) -> str:
    """The table the benchmarks ended with; empty when they did not get there."""
    _, found, rest = log.read_text(errors="replace").rpartition("\ncase  ")
    return found + rest if found else ""


def main() -> int:
    began = time.monotonic()
    gpu = gpu_name()
    if gpu is None:
        print("make gpu needs a machine with an NVIDIA GPU: nvidia-smi finds none")
        return 2
    folder = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / folder)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.unlink(missing_ok=True)
    outcomes, passed = [], True
    for stage in stages(out):
        left = DEADLINE - (time.monotonic() - began)
        if stage.name == "benchmarks":
            stage, allowed = bench_stage(out, left), left
        else:
            allowed = min(stage.seconds, left - BENCH_RESERVE)
        outcome = run(stage, allowed, log) if allowed > 5 else Outcome(stage.name, "no time", 0.0, "")
        print(f"{outcome.name:20} {outcome.state:12} {outcome.seconds:6.1f} s  {outcome.detail}", flush=True)
        outcomes.append(outcome)
        passed = passed and (outcome.good or (outcome.state == "overran" and not stage.must_end))
    (out / "stages.json").write_text(json.dumps({"gpu": gpu, "stages": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    print(f"\n{gpu}, {time.monotonic() - began:.0f} s, results in {out}")
    for outcome in outcomes:
        print(f"{outcome.name:20} {outcome.state:12} {outcome.seconds:6.1f} s")
    print(bench_table(log))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
