"""Measure every case on this machine, write the results as JSON, build the report, print a short table.

python bench/run.py                      # everything `make bench` does, in about six minutes
python bench/run.py --quick              # tiny sizes, seconds; results go to a temporary folder
python bench/run.py --op z_loss --no-train
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import pkgutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import cases
import measure
import report
import results
import roofline
import train_lm
from case import Case, Contender, forms_products
from results import COPY, EAGER, say

OPERATORS = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
TRAINING_SECONDS = 35.0  # what the language model may take of the budget


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--op", action="append", choices=OPERATORS, help="only this operator (repeatable)")
    parser.add_argument("--out", type=Path, help="folder for the JSON files (bench/results/<machine>)")
    parser.add_argument("--budget", type=float, default=360.0, help="seconds to aim at; every first case runs anyway")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no torch.compile: checks the driver only")
    parser.add_argument("--no-train", action="store_true", help="leave out the language model")
    parser.add_argument("--no-report", action="store_true", help="leave out the HTML report")
    return parser.parse_args(arguments)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def checked(problem: measure.Problem, reference: tuple) -> tuple[list[Contender], dict[str, measure.Error]]:
    """Contenders that may be timed, with their errors. Ours must be right; a peer's fault is only shown."""
    fit, errors = [], {}
    case = problem.case
    for contender in case.contenders:
        if contender.loss is None:
            fit.append(contender)
            continue
        began = time.perf_counter()
        try:
            error = measure.error(problem, contender, reference)
        except Exception as failure:  # torch.compile without a compiler, a peer that rejects this GPU or size
            case.absent[contender.name] = first_line(failure)
            say(f"  {contender.name:26} left out: {first_line(failure)}")
            continue
        if not contender.same:
            say(f"  {contender.name:26} computes another function")
            fit.append(contender)
            continue
        right = error.within(case.dtype)
        verdict = "" if right else "  WRONG, not timed" if contender.ours else "  inexact"
        took = time.perf_counter() - began
        say(f"  {contender.name:26} error {error.loss:.1e} loss {error.gradient:.1e} grad, {took:5.1f} s{verdict}")
        errors[contender.name] = error
        if right or not contender.ours:
            fit.append(contender)
    return fit, errors


def measured(case: Case, copy_gbs: float, until: float = math.inf) -> tuple[list[dict], bool]:
    """Results of one case, and whether all of ours ran and were right.

    Timing goes on for the seconds of the case, at least three rounds; less when it is to end at `until`: one at least.
    """
    torch._dynamo.reset()  # torch.compile gets a fresh start, not a dynamic-shape recompilation
    for name, reason in case.absent.items():
        say(f"  {name:26} left out: {reason}")
    problem = measure.Problem(case, measure.clock_for(case.device))
    reference = case.reference(*problem.leaves, *problem.constants)
    fit, errors = checked(problem, reference)
    peaks = {c.name: measure.peak_extra_bytes(problem, c) for c in fit if c.loss is not None}

    def tick(done: int):
        if sys.stdout.isatty():
            print(f"  round {done}/{case.runs}", end="\r", flush=True)

    seconds = min(case.seconds, max(0.0, until - time.perf_counter()))
    say(f"  timing {len(fit)} contenders in turn: {case.runs} rounds, or {seconds:.0f} s")
    least = 3 if seconds == case.seconds else 1
    times = measure.interleave(problem, fit, case.runs, seconds, tick, least)
    found = []
    for contender in fit:
        name = contender.name
        found += results.rows(case, contender, times[name], peaks.get(name), errors.get(name), copy_gbs)
        both = found[-1]
        rate = f"{both['gbs']:7.1f} GB/s  {both['copy_fraction']:4.0%} of copy"
        if forms_products(case.op):
            rate = f"{results.gflops(both):7.1f} GFLOP/s"
        quarters = f"[{both['q25_ms']:.2f}, {both['q75_ms']:.2f}] of {both['runs']}"
        say(f"  {name:26} {both['median_ms']:9.2f} ms  {quarters}  {rate}")
    return found, all(c.name in errors and errors[c.name].within(case.dtype) for c in case.contenders if c.ours)


def in_turn(operators: list[Iterator[Case]]) -> Iterator[tuple[int, Case]]:
    """Each operator's first case, then the second cases, and so on, with their rank from 0."""
    for rank, turn in enumerate(itertools.zip_longest(*operators)):
        yield from ((rank, case) for case in turn if case)


def table(found: list[dict]) -> str:
    """Forward + backward in ms, one line per case and contender, with the speed of ours beside each other one."""
    grouped = {f"{op} {'x'.join(map(str, s))} {dtype}": g for (op, s, dtype), g in results.groups(found).items()}
    wide = max((len(label) for label in grouped), default=4)
    name_wide = max((len(row["contender"]) for row in found), default=9)
    heads = f"{'ms':>9} {'vs eager':>9} {'vs compile':>10} {'vs copy':>8}"
    lines = [f"{'case':{wide}}  {'contender':{name_wide}} {heads}"]
    for label, group in grouped.items():
        for name, row in group.items():
            cells = [
                f"{group[other]['median_ms'] / row['median_ms']:.2f}x" if other in group and row["correct"] else "-"
                for other in (EAGER, "torch.compile", COPY)
            ]
            times = f"{row['median_ms']:9.2f} {cells[0]:>9} {cells[1]:>10} {cells[2]:>8}"
            lines.append(f"{label:{wide}}  {name:{name_wide}} {times}")
            label = ""
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    device = options.device
    environment = results.environment(device)
    own = Path(tempfile.mkdtemp(prefix="tilewise-bench-")) if options.quick else None
    out = options.out or own or results.RESULTS / results.machine_name(device)
    say(f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}: results go to {out}")
    ceilings = roofline.measure(device, options.quick)
    say("ceilings: " + ", ".join(f"{name} {value:.1f}" for name, value in ceilings.items()))
    results.save(out / "roofline.json", {"environment": environment, "ceilings": ceilings})

    wanted = options.op or OPERATORS
    files = {op: {"environment": environment, "ceilings": ceilings, "results": [], "absent": {}} for op in wanted}
    deadline = began + options.budget - (0.0 if options.no_train else TRAINING_SECONDS)
    all_right, cut, waiting = True, [], len(wanted)
    for rank, case in in_turn([importlib.import_module(f"cases.{op}").cases(device, options.quick) for op in wanted]):
        label, left = f"{case.op} {case.label}", deadline - time.perf_counter()
        if rank > 0 and left < case.seconds:
            cut.append(f"left out, the time budget was spent: {label}")
            continue
        say(f"\n{label}")
        share = left / waiting if rank == 0 else left  # first cases divide what is left among them
        waiting -= 1
        rows, right = measured(case, ceilings["copy_gbs"], time.perf_counter() + share)
        rounds = max((row["runs"] for row in rows), default=0)
        if rounds < min(3, case.runs):
            cut.append(f"shortened to fit the time budget, {rounds} of {case.runs} rounds: {label}")
        all_right = all_right and right
        files[case.op]["results"] += rows
        files[case.op]["absent"] |= case.absent
        results.save(out / f"{case.op}.json", files[case.op])
    if not options.no_train:
        say("\nlanguage model on the English text of pydoc_data.topics")
        results.save(out / "train_lm.json", {"environment": environment} | train_lm.train(device, options.quick))
    if not options.no_report:
        kept = out.parent == results.RESULTS
        page = report.REPORT if kept else out / "report.html"
        say(f"\nreport: {report.write(results.load(out.parent if kept else out), page)}")
    everything = [row for content in files.values() for row in content["results"]]
    say("\n" + table(everything))
    for line in cut:
        say(line)
    say(f"{time.perf_counter() - began:.0f} s")
    ours = any(row["ours"] for row in everything)
    if not ours:
        say("tilewise itself was not measured; the reasons are above")
    return 0 if all_right and ours else 1


if __name__ == "__main__":
    sys.exit(main())
