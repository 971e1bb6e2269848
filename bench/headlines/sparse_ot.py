"""What k entries a column make of a transport plan, and of the balance between the experts of a mixture.

python bench/headlines/sparse_ot.py            # what `make headlines` does, about two minutes
python bench/headlines/sparse_ot.py --quick    # tiny sizes, seconds; results go to a temporary folder

The claim (Liu, Puigcerver and Blondel 2023): a cardinality constraint leads from linear to quadratically regularised
transport, and as a router of tokens it fills all experts evenly. Shown are plans between two sets of points in the
plane, and a mixture of experts that classifies scikit-learn's digits, routed by top-2, Sinkhorn and sparse transport.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the modules of bench/, not those of this folder

import plots
import results
from results import say

POINTS, GAMMA, CARDINALITIES = 24, 2.0, (2, 3, 6)
EXPERTS, WIDTH, BATCH, STEPS, RATE, SEEDS = 8, 32, 256, 400, 3e-3, (0, 1, 2)
FACTOR = 2.0  # places of all experts for each token
ROUTERS = ("top-2", "Sinkhorn", "sparse transport")


def plans(count: int) -> dict:
    """Between a disc and a ring: the linear plan, few entries a column, and all of them."""
    tilewise, generator = importlib.import_module("tilewise"), torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    y = torch.stack([angle.cos(), angle.sin()], 1)
    x = 0.35 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    cost = torch.cdist(x, y).square()
    rows, columns = importlib.import_module("scipy.optimize").linear_sum_assignment(cost.numpy())
    linear = torch.zeros_like(cost)
    linear[rows, columns] = 1 / count
    shown = [{"name": "linear", "value": float((linear * cost).sum() + GAMMA / 2 / count), "violation": 0.0}]
    shown[0] |= {"entries": count, "margin": None, "lines": lines_of(linear, x, y)}
    for k in (*CARDINALITIES, count):
        found = tilewise.sparse_ot(cost, k=k, gamma=GAMMA, tol=1e-9, max_iter=3000)
        margin = float(found.tie_margin)
        row = {"name": f"k = {k}" if k < count else f"k = {k}, all", "value": float(found.value)}
        row |= {"violation": float(found.row_violation), "entries": int((found.values > 0).sum())}
        row |= {"margin": margin if margin < math.inf else None, "lines": lines_of(found.plan(), x, y)}
        shown.append(row)
        say(
            f"  {row['name']:12} value {row['value']:.5f}, {row['entries']} entries, rows off by {row['violation']:.1e}"
        )
    return {"target": y.tolist(), "rows": shown}


def lines_of(plan: Tensor, x: Tensor, y: Tensor) -> list[list[float]]:
    return [[*x[i].tolist(), *y[j].tolist()] for i, j in (plan > 0).nonzero().tolist()]


def places(tokens: int) -> int:
    return math.ceil(FACTOR * tokens / EXPERTS)


def first_served(choice: Tensor, probabilities: Tensor):
    """A Routing of the experts (tokens, 2) that tokens ask for: in the order of tokens, until an expert is full."""
    tokens, experts = probabilities.shape
    asked = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, choice, True)
    served = asked & (asked.cumsum(0) <= places(tokens))
    order = torch.where(served, torch.arange(tokens)[:, None], tokens).sort(0).values[: places(tokens)].T
    used = order < tokens
    indices = torch.where(used, order, 0)
    weights = probabilities.T.gather(1, indices) * used
    return importlib.import_module("tilewise").Routing(indices, weights, used.sum(1))


def route(router: str, logits: Tensor):
    tilewise = importlib.import_module("tilewise")
    if router == "sparse transport":
        return tilewise.sparse_ot_router(logits, places(len(logits)))
    probabilities = torch.softmax(logits, 1)
    if router == "top-2":
        return first_served(probabilities.detach().topk(2, 1).indices, probabilities)
    plan = tilewise.sinkhorn(-probabilities.detach(), epsilon=0.05, max_iter=20, tol=0.0).plan()
    return first_served(plan.topk(2, 1).indices, probabilities)


class Router(nn.Module):
    """Keeps what it sees: loads, tokens without an expert, and its time."""

    def __init__(self, router: str):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.router, self.seen = router, []

    def forward(self, x: Tensor):
        logits = self.gate(x)
        began = time.perf_counter()
        routing = route(self.router, logits)
        elapsed = 1e3 * (time.perf_counter() - began)
        taken = routing.indices[routing.weights > 0]
        load = routing.load.float()
        self.seen.append((float(load.std() / load.mean()), 1 - len(taken.unique()) / len(x), elapsed))
        return routing


class Classifier(nn.Module):
    def __init__(self, router: str):
        super().__init__()
        tilewise = importlib.import_module("tilewise")
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        experts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(EXPERTS)]
        self.mixture = tilewise.nn.MixtureOfExperts(Router(router), experts)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.last(hidden + self.mixture(hidden))


def digits() -> tuple[Tensor, ...]:
    """Training and held-out images and labels, in a fixed order."""
    data = importlib.import_module("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def classify(router: str, seed: int, steps: int, data: tuple[Tensor, ...]) -> dict:
    x, y, held_x, held_y = data
    torch.manual_seed(seed)
    model = Classifier(router)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,))
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
    uneven, dropped, elapsed = zip(*model.mixture.router.seen, strict=True)
    with torch.no_grad():
        accuracy = float((model(held_x).argmax(1) == held_y).float().mean())
    return {
        "router": router,
        "seed": seed,
        "losses": losses,
        "accuracy": accuracy,
        "uneven": statistics.mean(uneven),
        "dropped": statistics.mean(dropped),
        "router_ms": statistics.median(elapsed),
    }


def mixtures(steps: int) -> list[dict]:
    found, data = [], digits()
    for router in ROUTERS:
        for seed in SEEDS[: 1 if steps < STEPS else None]:
            found.append(classify(router, seed, steps, data))
        row = found[-1]
        say(
            f"  {router:16} accuracy {row['accuracy']:.3f}, loads uneven by {row['uneven']:.0%}, dropped "
            f"{row['dropped']:.1%}, router {row['router_ms']:.2f} ms"
        )
    return found


def section(content: dict) -> str:
    """This headline's part of the report."""
    shown, rows = content["plans"]["rows"], content["mixtures"]
    pictures = "".join(
        f"<h5>{row['name']}</h5>" + plots.arrows(f"The plan: {row['name']}", row["lines"], content["plans"]["target"])
        for row in shown
    )
    head = ["plan", "value", "entries", "rows off by", "least difference at the k-th"]
    body = [
        [r["name"], f"{r['value']:.5f}", str(r["entries"]), f"{r['violation']:.0e}",
         "nothing is cut off" if r["margin"] is None else f"{r['margin']:.0e}"]
        for r in shown
    ]  # fmt: skip
    of = {router: [row for row in rows if row["router"] == router] for router in ROUTERS}

    def spread(router, key, scale=100.0, unit=" %"):
        values = [scale * row[key] for row in of[router]]
        return f"{min(values):.1f} - {max(values):.1f}{unit}"

    routed = [
        [router, spread(router, "accuracy"), spread(router, "uneven"), spread(router, "dropped"),
         spread(router, "router_ms", 1.0, "")]
        for router in ROUTERS
    ]  # fmt: skip
    curves = {
        router: [statistics.mean(row["losses"][i] for row in of[router]) for i in range(len(of[router][0]["losses"]))]
        for router in ROUTERS
    }
    kinds = {router: "ours" if router == "sparse transport" else "peer" for router in ROUTERS}
    swatches = {router: f"c{order}" for order, router in enumerate(ROUTERS)}
    routed_head = ["router", "held-out accuracy", "loads uneven by", "tokens without an expert", "router, ms"]
    return (
        "<h3>Headline: transport with few entries a column</h3>"
        f'<div class="card"><h4>From linear to quadratic transport</h4><div class="pair">{pictures}</div>'
        f"{plots.table(head, body)}</div>"
        '<div class="card"><h4>A mixture of experts on the digits</h4>'
        f'<p class="soft">{EXPERTS} experts, {content["steps"]} steps of {BATCH} images, {places(BATCH)} places each; '
        "least and most over the seeds. Loads are uneven by their deviation over their mean.</p>"
        f"{plots.table(routed_head, routed, lambda i: kinds[ROUTERS[i]])}"
        f"<h5>Training loss</h5>{plots.legend(swatches)}{plots.curves('Training loss', 'steps', curves, kinds)}</div>"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for headline_sparse_ot.json (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks this script only")
    options = parser.parse_args(arguments)
    quick = options.quick
    out = options.out or (Path(tempfile.mkdtemp(prefix="tilewise-headline-")) if quick else None)
    out = out or results.RESULTS / results.machine_name("cpu")
    steps = 3 if quick else STEPS
    content = {"environment": results.environment("cpu"), "headline": "sparse_ot", "steps": steps}
    say("plans between a disc and a ring")
    content["plans"] = plans(12 if quick else POINTS)
    say("a mixture of experts on the digits")
    content["mixtures"] = mixtures(steps)
    results.save(out / "headline_sparse_ot.json", content)
    say(f"\nresults are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
