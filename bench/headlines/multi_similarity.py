"""Metric learning on real images, and what its loss costs as the batch grows.

python bench/headlines/multi_similarity.py            # what `make headlines` does, about two minutes
python bench/headlines/multi_similarity.py --quick    # tiny sizes, seconds; results go to a temporary folder

Scikit-learn's digits: a small network learns from the classes 0 to 4 to place images, and is asked for the nearest
neighbour of images of the classes 5 to 9, which it has not seen (Recall@1). Multi-similarity with mining, ours and
pytorch-metric-learning's, must give one curve; contrastive and triplet losses stand beside them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the modules of bench/, not those of this folder

import plots
import results
from case import why_not
from cases import multi_similarity_loss as case
from measure import clock_for, quartiles, resident_peak
from results import say

OURS, THEIRS = "multi-similarity, tilewise", "multi-similarity, pytorch-metric-learning"
BATCH, WIDTH, RATE, STEPS, SHOWN = 256, 32, 1e-3, 300, 20
SIZES, FEATURES, MEMBERS = (1_000, 3_000, 10_000, 30_000), 64, 8
PEER_BYTES_PER_PAIR, MOST_BYTES = 74, 8e9  # measured; the peer is not asked for more
ROUNDS = 3

Loss = Callable[[Tensor, Tensor], Tensor]


def tilewise():
    return importlib.import_module("tilewise")


def contenders() -> dict[str, Loss]:
    t = tilewise()
    found = {OURS: t.multi_similarity_loss}
    if not why_not("pytorch_metric_learning"):
        found[THEIRS] = case.theirs()
    weighted = t.nn.PairWeightedLoss
    found["contrastive, tilewise"] = weighted(t.weighting.Contrastive(positive_margin=1.0, negative_margin=0.5))
    found["triplet, tilewise"] = weighted(t.weighting.Triplet(margin=0.2))
    return found


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of the classes that are learnt, and of those that are not."""
    data = importlib.import_module("sklearn.datasets").load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    seen = labels < 5
    return images[seen], labels[seen], images[~seen], labels[~seen]


def recall_at_1(embeddings: Tensor, labels: Tensor) -> float:
    x = F.normalize(embeddings, dim=1)
    nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return (labels[nearest] == labels).float().mean().item()


def train(loss: Loss, data: tuple[Tensor, ...], steps: int, device: str) -> dict:
    images, labels, unseen, unseen_labels = (t.to(device) for t in data)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, WIDTH)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(1)
    clock, times, curve = clock_for(device), [], []
    for step in range(steps + 1):
        if step % SHOWN == 0 or step == steps:
            with torch.no_grad():
                curve.append((step, recall_at_1(network(unseen), unseen_labels)))
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(device)
        optimizer.zero_grad()
        start = clock.mark()
        loss(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        end = clock.mark()
        clock.settle()
        times.append(clock.between(start, end))
    return {"curve": curve, "median_ms": quartiles(times)[1], "recall": curve[-1][1]}


def accuracy(steps: int, device: str) -> dict:
    say(f"\ndigits: {steps} steps of {BATCH} images")
    data, rows = digits(), []
    for name, loss in contenders().items():
        row = {"contender": name, "ours": name != THEIRS, **train(loss, data, steps, device)}
        rows.append(row)
        say(f"  {name:44} Recall@1 {row['recall']:.2%}, {row['median_ms']:.2f} ms a step")
    return {"batch": BATCH, "steps": steps, "width": WIDTH, "rate": RATE, "rows": rows}


def once(loss: Loss, embeddings: Tensor, labels: Tensor, clock) -> float:
    start = clock.mark()
    loss(embeddings, labels).backward()
    end = clock.mark()
    clock.settle()
    embeddings.grad = None
    return clock.between(start, end)


def cost(sizes: tuple[int, ...], device: str) -> dict:
    clock, rows = clock_for(device), []
    losses = {name: loss for name, loss in contenders().items() if name in (OURS, THEIRS)}
    for size in sizes:
        say(f"\none loss of {size:,} embeddings of {FEATURES}, forward and backward")
        torch.manual_seed(0)
        embeddings = torch.randn(size, FEATURES, device=device, requires_grad=True)
        labels = torch.arange(size, device=device) // MEMBERS
        for name, loss in losses.items():
            row = {"contender": name, "ours": name == OURS, "embeddings": size}
            if name == THEIRS and size**2 * PEER_BYTES_PER_PAIR > MOST_BYTES:
                row["reason"] = f"would hold about {size**2 * PEER_BYTES_PER_PAIR / 1e9:.0f} GB"
                rows.append(row)
                say(f"  {name:44} {row['reason']}")
                continue
            once(loss, embeddings, labels, clock)
            times = [once(loss, embeddings, labels, clock) for _ in range(ROUNDS)]
            held = resident_peak(lambda loss=loss: once(loss, embeddings, labels, clock)) if device == "cpu" else None  # noqa: B023
            row |= {"median_ms": quartiles(times)[1], "peak_extra_bytes": held}
            rows.append(row)
            memory = "" if held is None else f", {held / 1e6:.0f} MB"
            say(f"  {name:44} {row['median_ms']:10.1f} ms{memory}")
    return {"features": FEATURES, "members": MEMBERS, "rows": rows}


def section(content: dict) -> str:
    """This headline's part of the report."""
    learnt, cost = content["accuracy"], content["cost"]
    marks = ["ours" if row["ours"] else "peer" for row in learnt["rows"]]
    steps = [step for step, _ in learnt["rows"][0]["curve"]]
    shown = steps[:: max(1, len(steps) // 6)]
    body = []
    for row in learnt["rows"]:
        recall = dict(row["curve"])
        body.append([row["contender"], *(f"{recall[step]:.1%}" for step in shown), f"{row['median_ms']:.2f}"])
    curves = plots.table(["Recall@1 after steps", *map(str, shown), "ms a step"], body, marks.__getitem__)
    lines: dict[str, list[dict]] = {}
    for row in cost["rows"]:
        lines.setdefault(row["contender"], []).append(row)
    kinds = {name: "ours" if rows[0]["ours"] else "peer" for name, rows in lines.items()}

    def points(key: str, unit: float) -> dict[str, list[tuple[int, float]]]:
        return {name: [(r["embeddings"], r[key] / unit) for r in rows if r.get(key)] for name, rows in lines.items()}

    def cell(row: dict) -> str:
        if "reason" in row:
            return row["reason"]
        held = row["peak_extra_bytes"]
        return f"{plots.number(row['median_ms'])} ms" + ("" if held is None else f", {plots.number(held / 1e6)} MB")

    sizes = [row["embeddings"] for row in next(iter(lines.values()))]
    table = plots.table(
        ["embeddings", *(f"{size:,}" for size in sizes)],
        [[name, *map(cell, rows)] for name, rows in lines.items()],
        [*kinds.values()].__getitem__,
    )
    time_plot = plots.loglog(
        "Time against the number of embeddings", ("embeddings", "ms"), points("median_ms", 1), kinds
    )
    memory_plot = plots.loglog(
        "Peak memory against the number of embeddings", ("embeddings", "MB"), points("peak_extra_bytes", 1e6), kinds
    )
    return (
        "<h3>Headline: metric learning with multi-similarity</h3>"
        f'<div class="card"><h4>Recall@1 on digits never seen</h4><p class="soft">One network, one seed, '
        f"{learnt['batch']} images a step of the digits 0 to 4; asked for nearest neighbours among the digits 5 to 9. "
        f"The two multi-similarity losses see the same batches and must agree.</p>{curves}</div>"
        f'<div class="card"><h4>Forward and backward of the loss as the batch grows</h4><p class="soft">'
        f"{cost['features']} features, {cost['members']} members a class. Peak memory beyond the inputs.</p>"
        f"{time_plot}{memory_plot}{table}</div>"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder for headline_multi_similarity.json (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks this script only")
    options = parser.parse_args(arguments)
    device, quick = options.device, options.quick
    out = options.out or (Path(tempfile.mkdtemp(prefix="tilewise-headline-")) if quick else None)
    out = out or results.RESULTS / results.machine_name(device)
    content = {"environment": results.environment(device), "headline": "multi_similarity"}
    content["accuracy"] = accuracy(40 if quick else STEPS, device)
    content["cost"] = cost((100, 300) if quick else SIZES, device)
    results.save(out / "headline_multi_similarity.json", content)
    say(f"\nresults are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
