"""What `make gpu` runs on an NVIDIA machine, installing nothing: from the build to the profiler.

    python bench/gpu.py                          # every stage, in the order of the table
    python bench/gpu.py gpu-build gpu-test-cuda  # these; `make gpu-build` runs one

A stage ends within about eight minutes: each of its steps is stopped, with all it started, when its seconds are over,
and the next one runs. $OUT, else bench/results/<gpu>/, holds <stage>.json, written before and after each step, and
<stage>.log; measurements and tests write their own JSON beside them as they go. The exit status is 1 when a step
failed, or overran where it has to end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import predicted

ROOT = Path(__file__).resolve().parent.parent
IN_PLACE = ROOT / "build" / "inplace"
BUILD = "gpu-build"
UNAVAILABLE = 77  # exit status of a step whose tool is not to be had here
SANITIZER_REFUSES = re.compile("device not supported|unable to initialize", re.I)


@dataclass
class Step:
    stage: str
    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    may_overrun: bool = False  # without failing: what was measured by then is written
    writes: Path | None = None  # as it goes; an earlier run's is removed first


@dataclass
class Outcome:
    name: str
    state: str  # running | passed | failed | overran | unavailable
    seconds: float = 0.0
    detail: str = ""


def processors() -> int:
    return len(os.sched_getaffinity(0))


def in_parallel(most: int) -> tuple[list[str], dict[str, str]]:
    """pytest's arguments for up to so many processes that share the GPU, and what keeps each from taking all cores."""
    if not importlib.util.find_spec("xdist"):
        return [], {}
    workers = max(1, min(most, processors()))
    threads = str(max(1, processors() // workers))
    # Neighbours in a file share kernels, which one process then compiles once.
    arguments = ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "30"]
    return arguments, {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def tests(out: Path, backend: str, workers: int, seconds: float) -> Step:
    parallel, environment = in_parallel(workers)
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-m", "cuda", "--maxfail=30", "-p", "no:cacheprovider"]
    path = out / f"test-{backend}.json"
    command += ["--tb=short", "--failures", str(path), *parallel]
    environment = environment | {"TILEWISE_BACKEND": backend}
    return Step(f"gpu-test-{backend}", "tests", command, seconds, environment, writes=path)


def launches(backend: str, seconds: float, path: Path, stage: str = "gpu-smoke", may_overrun: bool = False) -> Step:
    command = [sys.executable, "bench/smoke.py", "launches", "--out", str(path)]
    return Step(stage, f"launches {backend}", command, seconds, {"TILEWISE_BACKEND": backend}, may_overrun, path)


def sanitizer(tool: str, backend: str, seconds: float) -> Step:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "5"]
    command += ["--target-processes", "application-only"]  # not the compilers that Triton starts
    command += [sys.executable, "bench/sanitize.py", "--backend", backend]
    return Step("gpu-sanitize", f"{tool} {backend}", command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def steps(out: Path, kept: Path, architecture: str) -> list[Step]:
    """The table: stages in their order, each a step or several; `kept` may have the benchmarks that `out` has not."""
    python = sys.executable
    build = {"TILEWISE_CUDA": "1", "TILEWISE_CUDA_ARCHS": architecture}
    ceilings_json, profile_json = out / "ceilings.json", out / "profile.json"
    ceilings = [python, "bench/smoke.py", "ceilings", "--out", str(ceilings_json)]
    bench = [python, "bench/run.py", "--device", "cuda", "--no-train", "--no-report", "--out", str(out)]
    profile = [python, "bench/profile_kernels.py", "--results", str(out), str(kept), "--out", str(profile_json)]
    return [
        Step(BUILD, "build", ["make", "--no-print-directory", "inplace", f"PYTHON={python}"], 480, build),
        Step("gpu-smoke", "ceilings", ceilings, 90, may_overrun=True, writes=ceilings_json),
        launches("cuda", 150, out / "launches-cuda.json"),
        launches("triton", 240, out / "launches-triton.json"),
        tests(out, "cuda", 8, 480),
        # The driver starts no case that does not fit; what it has by then is written, so it has time to end by itself.
        Step("gpu-bench", "benchmarks", [*bench, "--budget", "420"], 480, may_overrun=True),
        # Each function in its own process: kernels are compiled in parallel, and hardly one twice.
        launches("triton", 120, out / "warmed.json", "gpu-test-triton", may_overrun=True),
        tests(out, "triton", 16, 360),
        sanitizer("memcheck", "cuda", 100),
        sanitizer("racecheck", "cuda", 100),
        sanitizer("memcheck", "triton", 140),
        sanitizer("racecheck", "triton", 140),
        Step("gpu-profile", "ncu", profile, 420, may_overrun=True, writes=profile_json),
    ]


def grouped(table: list[Step]) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    for step in table:
        found.setdefault(step.stage, []).append(step)
    return found


def find_gpu() -> tuple[str, str] | None:
    """Name and architecture of the first GPU, such as ("NVIDIA H100", "90")."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout.strip():
        return None
    name, capability = done.stdout.strip().splitlines()[0].rsplit(",", 1)
    return name.strip(), capability.strip().replace(".", "")


def end_group(process: subprocess.Popen):
    """Nothing that a step started outlives it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def execute(step: Step, log: Path) -> tuple[int | None, str]:
    """Exit status, None after an overrun, and output of a step in its own process group."""
    path = os.pathsep.join(filter(None, [str(IN_PLACE), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as sink:
        sink.write(f"\n=== {step.name}: {' '.join(step.command)}\n".encode())
        sink.flush()
        start = sink.tell()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | step.environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=step.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
    return status, log.read_bytes()[start:].decode(errors="replace").strip()


def run(step: Step, log: Path) -> Outcome:
    if not shutil.which(step.command[0]):
        return Outcome(step.name, "unavailable", 0.0, f"{step.command[0]} is not on PATH")
    if step.stage != BUILD and not IN_PLACE.exists():
        return Outcome(step.name, "failed", 0.0, f"tilewise is not built in place: make {BUILD}")
    began = time.monotonic()
    status, output = execute(step, log)
    detail = output.splitlines()[-1][:200] if output else f"exit status {status}, no output"
    refused = step.command[0] == "compute-sanitizer" and SANITIZER_REFUSES.search(output)
    if status is None:
        state = "overran"
    elif status == 0:
        state = "passed"
    elif status == UNAVAILABLE or refused:
        state = "unavailable"
    else:
        state = "failed"
    if state in ("failed", "overran"):
        print(f"--- {step.stage}, {step.name}: the end of its output\n{output[-3000:]}\n---", flush=True)
    return Outcome(step.name, state, round(time.monotonic() - began, 1), detail)


def run_stage(chosen: list[Step], gpu: str, out: Path) -> Iterator[tuple[Step, Outcome]]:
    """One after another; the stage's JSON says at any time what is done and what runs."""
    stage = chosen[0].stage
    log, outcomes = out / f"{stage}.log", []
    log.unlink(missing_ok=True)

    def save(*running: Outcome):
        content = {"gpu": gpu, "stage": stage, "steps": [asdict(o) for o in (*outcomes, *running)]}
        (out / f"{stage}.json").write_text(json.dumps(content, indent=1) + "\n")

    for step in chosen:
        save(Outcome(step.name, "running"))
        if step.writes:
            step.writes.unlink(missing_ok=True)
        outcomes.append(run(step, log))
        save()
        yield step, outcomes[-1]


def bench_table(log: Path) -> str:
    """The table the benchmarks ended with; empty when they did not get there."""
    _, found, rest = log.read_text(errors="replace").rpartition("\ncase  ") if log.exists() else ("", "", "")
    return found + rest if found else ""


def main(wanted: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` stops the step
    gpu = find_gpu()
    if gpu is None:
        print("make gpu needs a machine with an NVIDIA GPU: nvidia-smi finds none")
        return 2
    name, architecture = gpu
    folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    kept = ROOT / "bench" / "results" / folder
    out = Path(os.environ.get("OUT") or kept).resolve()  # steps run in ROOT
    table = grouped(steps(out, kept, architecture))
    if unknown := set(wanted) - set(table):
        print(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(table)}")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    lines, good = [], True
    for stage in wanted or table:
        for step, outcome in run_stage(table[stage], name, out):
            lines.append(f"{stage:16} {outcome.name:20} {outcome.state:12} {outcome.seconds:6.1f} s  {outcome.detail}")
            print(lines[-1], flush=True)
            good = good and outcome.state != "failed" and (outcome.state != "overran" or step.may_overrun)
        if stage == "gpu-bench":
            print(bench_table(out / f"{stage}.log"), predicted.side_by_side(name, predicted.measured(out)), flush=True)
    print("\n".join(["", f"{name}, results in {out}", *lines]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
