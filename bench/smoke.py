"""The first things to know of a GPU: its measured ceilings, and whether every public function runs on a backend.

    python bench/smoke.py ceilings --out ceilings.json
    TILEWISE_BACKEND=triton python bench/smoke.py launches --out launches.json

Each function runs in its own process: a kernel that reads what it must not leaves the process without a GPU. Several
run at once, which also fills Triton's compile cache. The JSON is written after each; the exit status is 1 when one
failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

import roofline
from results import ROOT, save, say

SECONDS = 90.0  # for one function, which may compile a dozen Triton kernels


def in_short(error: Exception) -> str:
    """One line: CUDA says first what happened, Triton last."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 300 else f"{line[:150]} .. {line[-150:]}"


def launch(name: str):
    """A small call of one function, with gradients, of float32 and of bfloat16."""
    sys.path.insert(0, str(ROOT / "tests"))
    from public_functions import CALLS, values_and_gradients

    for dtype in (torch.float32, torch.bfloat16):
        call = CALLS[name]
        tensors = call.tensors([dtype] * len(call.shapes))
        values, gradients = values_and_gradients(call.function(*tensors), tensors)
        for t in (*values, *filter(torch.is_tensor, gradients)):
            if t.is_floating_point() and not t.isfinite().all():
                raise SystemExit(f"{name}: {dtype} gave numbers that are not finite")


def child(name: str) -> tuple[float, str | None]:
    """Seconds, and the last line that a failure printed."""
    began = time.monotonic()
    try:
        command = [sys.executable, __file__, "launch", "--name", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = said[-1] if done.returncode else None
    except subprocess.TimeoutExpired:
        reason = f"took more than {SECONDS:.0f} s"
    return round(time.monotonic() - began, 1), reason


def launches(names: list[str], jobs: int, out: Path) -> int:
    content = {"backend": os.environ.get("TILEWISE_BACKEND"), "passed": {}, "failed": {}}
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(child, name): name for name in names}
        for future in as_completed(running):
            name, (seconds, reason) = running[future], future.result()
            if reason:
                content["failed"][name] = reason
            else:
                content["passed"][name] = seconds
            say(f"{name:32} {seconds:6.1f} s  {reason or ''}")
            save(out, content)
    failed = content["failed"]
    say("".join(f"FAILED {name}: {reason}\n" for name, reason in failed.items()))
    say(f"{len(content['passed'])} of {len(names)} functions ran" + (f"; not {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def ceilings(device: str, quick: bool, out: Path) -> int:
    content = {"ceilings": {}, "failed": {}}
    for name, ceiling in roofline.ceilings(device, quick).items():
        try:
            content["ceilings"][name] = ceiling()
            say(f"{name:24} {content['ceilings'][name]:12.1f}")
        except Exception as error:  # the others are measured all the same
            content["failed"][name] = in_short(error)
            say(f"{name:24} failed: {in_short(error)}")
        save(out, content)
    return 1 if content["failed"] else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ceilings", "launches", "launch"))
    parser.add_argument("--name", action="append", help="only this function (repeatable)")
    parser.add_argument("--out", type=Path, default=Path(os.devnull))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="whose ceilings")
    parser.add_argument("--quick", action="store_true", help="smaller ceilings")
    options = parser.parse_args(arguments)
    if options.what == "ceilings":
        return ceilings(options.device, options.quick, options.out)
    if options.what == "launch":
        try:
            launch(options.name[0])
        except Exception as error:
            sys.exit(in_short(error))
        return 0
    sys.path.insert(0, str(ROOT / "tests"))
    from public_functions import CALLS

    return launches(options.name or list(CALLS), options.jobs, options.out)


if __name__ == "__main__":
    sys.exit(main())
