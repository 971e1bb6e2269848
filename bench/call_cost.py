"""What a call costs: tiny problems on one thread, every differentiable function beside its composition in PyTorch.

python bench/call_cost.py               # medians over 300 calls, in turn with PyTorch's, in microseconds
python bench/call_cost.py --calls 50 --only cross_entropy
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import eager_functions
from eager_functions import CASES, Case

import tilewise
from results import say

ITERATED = ("sinkhorn", "monge_gap", "sparse_ot")  # a fixed number of iterations is no peer of a solver that stops
SUPCON_LABELS, CLASSES = torch.arange(32) // 4, torch.arange(8)


def supcon(x: Tensor) -> Tensor:
    own = torch.eye(len(x), dtype=torch.bool)
    s = (eager_functions.cosines(x, x) / 0.1).masked_fill(own, -torch.inf)
    positive = (SUPCON_LABELS[:, None] == SUPCON_LABELS) & ~own
    return -(torch.log_softmax(s, 1).masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


# First the sizes that are promised, then the small problem of every function.
NAMED = {
    "cross_entropy (8, 100)": Case(
        lambda x: tilewise.cross_entropy(x, CLASSES), lambda x: F.cross_entropy(x, CLASSES), ((8, 100),)
    ),
    "wta_crs_linear (32, 64)": Case(
        lambda x, w, b: tilewise.wta_crs_linear(x, w, b, k=8).sum(),
        lambda x, w, b: F.linear(x, w, b).sum(),
        ((32, 64), (64, 64), (64,)),
    ),
    "supcon (32, 64)": Case(lambda x: tilewise.supcon(x, SUPCON_LABELS), supcon, ((32, 64),)),
}


def calls_of(function: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]

    def both():
        function(*leaves).backward()
        for leaf in leaves:
            leaf.grad = None

    return {"forward": lambda: function(*tensors), "forward + backward": both}


def medians(functions: list[Callable[[], object]], calls: int) -> list[float]:
    """Microseconds of a call of each; they take turns, so that the machine's moods hit all alike."""
    times = [[] for _ in functions]
    for round_ in range(calls + 30):
        for function, taken in zip(functions, times, strict=True):
            began = time.perf_counter_ns()
            function()
            if round_ >= 30:  # the first ones warm up
                taken.append(time.perf_counter_ns() - began)
    return [statistics.median(taken) / 1e3 for taken in times]


def measured(name: str, case: Case, calls: int) -> dict[str, dict[str, float]]:
    tensors = [t.float() for t in case.tensors()]
    functions = {"ours": case.ours} if name.startswith(ITERATED) else {"ours": case.ours, "torch": case.eager}
    found = {}
    for phase in ("forward", "forward + backward"):
        times = medians([calls_of(function, tensors)[phase] for function in functions.values()], calls)
        found[phase] = dict(zip(functions, times, strict=True))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--only", default="", help="functions whose name begins with this")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    say(f"{'microseconds of a call':34} {'forward':>26} {'forward + backward':>26}")
    found = {}
    for name, case in {**NAMED, **CASES}.items():
        if not name.startswith(options.only):
            continue
        found[name] = measured(name, case, options.calls)
        cells = []
        for times in found[name].values():
            peer = f" / {times['torch']:6.0f} = {times['ours'] / times['torch']:5.2f}" if "torch" in times else ""
            cells.append(f"{times['ours']:8.0f}{peer:17}")
        say(f"{name:34} {cells[0]:>26} {cells[1]:>26}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
