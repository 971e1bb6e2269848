"""What a training step costs as the number of classes grows, and what each output layer learns in the same time.

python bench/headlines/z_loss.py               # what `make headlines` does, about four minutes
python bench/headlines/z_loss.py --quick       # tiny sizes, seconds; results go to a temporary folder

The claim: the spherical family (de Brebisson & Vincent 2016) makes the cost of a step independent of the number of
classes, up to the vocabulary of One Billion Word. Every output layer learns by plain SGD, so that their steps compare.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the modules of bench/, not those of this folder

import plots
import results
from measure import clock_for, quartiles
from results import say
from train_lm import CONTEXT, HIDDEN, Body, corpus, examples

BATCH, FEATURES = 200, 256
SIZES = (1_000, 10_000, 50_000, 200_000, 793_471)  # the last one is the vocabulary of One Billion Word
SLOW = 10.0  # seconds; a layer whose step took longer is not tried again, nor at larger sizes
ROUNDS, SIZE_SECONDS = 7, 15.0  # rounds at each size; after these seconds three are enough
BODY_RATE = 3e-3
A, B = 1.0, 20.0  # of the Z-loss


class Layer(nn.Module):
    """An output layer with its loss, trained by plain SGD: forward(hidden, target) is the mean loss."""

    @torch.no_grad()
    def step(self, rate: float):
        for parameter in self.parameters():
            if parameter.grad is not None:  # a cluster of the adaptive softmax that the batch did not reach
                parameter.sub_(parameter.grad, alpha=rate)
                parameter.grad = None

    def held_out(self, hidden: Tensor, target: Tensor) -> float:
        return self(hidden, target).item()


class Dense(Layer):
    """A weight matrix under any loss(hidden, weight, target)."""

    def __init__(self, weight: Tensor, loss: Callable[..., Tensor]):
        super().__init__()
        self.weight, self.loss = nn.Parameter(weight), loss

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self.loss(hidden, self.weight, target)

    def top(self, hidden: Tensor, count: int) -> Tensor:
        return F.linear(hidden, self.weight).topk(count).indices


class Adaptive(Layer):
    """torch's adaptive softmax; classes are numbered by falling frequency."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.inner = nn.AdaptiveLogSoftmaxWithLoss(features, classes, [classes // 50, classes // 5])

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self.inner(hidden, target).loss

    def top(self, hidden: Tensor, count: int) -> Tensor:
        return self.inner.log_prob(hidden).topk(count).indices


class Factored(Layer):
    """The exact SGD of the Z-loss on a factored weight matrix, which never touches all of its rows."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.inner = tilewise().nn.FactoredSphericalOutput(features, classes, kind="z", a=A, b=B)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self.inner(hidden, target)

    def step(self, rate: float):
        self.inner.step(rate)

    def top(self, hidden: Tensor, count: int) -> Tensor:
        return self.inner.predict(hidden, count)[1]


def tilewise():
    return importlib.import_module("tilewise")


@dataclass(frozen=True)
class Contender:
    make: Callable[[int, int, Tensor], Layer]  # features, classes, a dense weight for those that want one
    rate: float  # of plain SGD on the output layer
    ours: bool
    probability: bool  # its loss is -log of the target's probability
    block: int = 1  # steps in one timed run, of which the mean counts


def log_softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def dense(loss: Callable[[], Callable[..., Tensor]]) -> Callable[[int, int, Tensor], Layer]:
    return lambda features, classes, weight: Dense(weight, loss())


CONTENDERS = {
    "log-softmax, torch": Contender(dense(lambda: log_softmax), rate=2.0, ours=False, probability=True),
    "adaptive softmax, torch": Contender(
        lambda features, classes, _: Adaptive(features, classes), rate=0.3, ours=False, probability=True
    ),
    "linear_cross_entropy": Contender(
        dense(lambda: tilewise().linear_cross_entropy), rate=2.0, ours=True, probability=True
    ),
    "linear_z_loss": Contender(
        dense(lambda: functools.partial(tilewise().linear_z_loss, a=A, b=B)), rate=3.0, ours=True, probability=False
    ),
    "FactoredSphericalOutput": Contender(
        lambda features, classes, _: Factored(features, classes), rate=3.0, ours=True, probability=False,
        block=10,  # it stabilises its factors every ten steps: every run has its share of that
    ),
}  # fmt: skip


def dense_weight(features: int, classes: int, device: str) -> Tensor:
    return torch.randn(classes, features, device=device) / features**0.5


def frequent(classes: int, count: int, device: str) -> Tensor:
    """Class indices with Zipf's frequencies, as words have them: log-uniform."""
    return (torch.rand(count, device=device) * torch.log(torch.tensor(classes + 1.0))).expm1().long() % classes


def step_ms(layer: Layer, rate: float, hidden: Tensor, target: Tensor, clock) -> float:
    """Forward, backward down to the hidden gradient, and the layer's own update."""
    hidden.requires_grad_()
    start = clock.mark()
    layer(hidden, target).backward()
    layer.step(rate)
    end = clock.mark()
    clock.settle()
    return clock.between(start, end)


def cost_at(classes: int, features: int, batch: int, names: list[str], device: str, clock) -> dict[str, list[float]]:
    """Times at one size, the contenders in turn. The dense ones share one weight, which may not fit several times.

    The first step of each is a warm-up.
    """
    torch.manual_seed(0)
    weight = dense_weight(features, classes, device)
    layers = {name: CONTENDERS[name].make(features, classes, weight).to(device) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    order, began = list(names), time.perf_counter()
    for done in range(ROUNDS + 1):
        if done > 3 and time.perf_counter() - began > SIZE_SECONDS:
            break
        for name in list(order):
            rate, block = CONTENDERS[name].rate, CONTENDERS[name].block
            took = 0.0
            for _ in range(block):
                hidden = torch.randn(batch, features, device=device).tanh()
                took += step_ms(layers[name], rate, hidden, frequent(classes, batch, device), clock) / block
            times[name].append(took)
            if took > SLOW * 1e3:
                order.remove(name)
        order = order[1:] + order[:1]
    return times


def cost(sizes: tuple[int, ...], features: int, batch: int, words: int, device: str) -> dict:
    clock, names, found = clock_for(device), list(CONTENDERS), []
    for classes in sizes:
        say(f"\none step of {batch} rows, {features} features, {classes:,} classes")
        for name, times in cost_at(classes, features, batch, names, device, clock).items():
            if max(times) > SLOW * 1e3:
                names.remove(name)
            times = times[1:] or times  # too slow for a second step: the first is all there is
            q25, median, q75 = quartiles(times)
            say(f"  {name:24} {median:10.2f} ms  [{q25:.2f}, {q75:.2f}] of {len(times)}")
            row = {"contender": name, "ours": CONTENDERS[name].ours, "classes": classes, "runs": len(times)}
            row |= {"median_ms": median, "q25_ms": q25, "q75_ms": q75, "epoch_seconds": words / batch * median / 1e3}
            found.append(row)
    return {"batch": batch, "features": features, "words": words, "rows": found}


def by_frequency(device: str) -> tuple[Tensor, Tensor, int]:
    """The corpus of train_lm with its words numbered by falling frequency, as the adaptive softmax needs them."""
    seen, held, vocabulary = corpus()
    order = torch.bincount(seen, minlength=len(vocabulary)).argsort(descending=True, stable=True)
    rank = order.argsort()
    return rank[seen].to(device), rank[held].to(device), len(vocabulary)


def train(name: str, seen: Tensor, held: Tensor, classes: int, seconds: float, device: str) -> dict:
    """Train one model for so long, then see how well it tells the held-out words."""
    contender, generator = CONTENDERS[name], torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    body = Body(classes).to(device)
    layer = contender.make(HIDDEN, classes, dense_weight(HIDDEN, classes, device)).to(device)
    optimizer = torch.optim.Adam(body.parameters(), lr=BODY_RATE)
    clock, steps, began = clock_for(device), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        context, target = examples(seen, torch.randint(len(seen) - CONTEXT, (BATCH,), generator=generator).to(device))
        optimizer.zero_grad()
        layer(body(context), target).backward()
        optimizer.step()
        layer.step(contender.rate)
        clock.settle()
        steps += 1
    with torch.no_grad():
        context, target = examples(held, torch.arange(len(held) - CONTEXT, device=device))
        hidden = body(context)
        hit = layer.top(hidden, 10) == target[:, None]
        row = {"contender": name, "ours": contender.ours, "probability": contender.probability}
        row |= {"rate": contender.rate, "steps": steps, "held_out_loss": layer.held_out(hidden, target)}
        return row | {"top1": hit[:, 0].float().mean().item(), "top10": hit.any(-1).float().mean().item()}


def accuracy(seen: Tensor, held: Tensor, classes: int, seconds: float, device: str) -> dict:
    say(f"\nlanguage model of {classes:,} classes, {seconds:g} s each")
    found = []
    for name in CONTENDERS:
        row = train(name, seen, held, classes, seconds, device)
        found.append(row)
        shares = f"top-1 {row['top1']:.2%}, top-10 {row['top10']:.2%}"
        say(f"  {name:24} {row['steps']:6} steps, {shares}, held-out loss {row['held_out_loss']:.4f}")
    facts = {"seconds": seconds, "classes": classes, "words": len(seen), "batch": BATCH, "features": HIDDEN}
    return facts | {"body_rate": BODY_RATE, "a": A, "b": B, "rows": found}


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{plots.number(seconds / length)} {unit}"
    return f"{plots.number(seconds)} s"


def section(content: dict) -> str:
    """This headline's part of the report."""
    cost, learnt = content["cost"], content["accuracy"]
    lines: dict[str, dict[int, dict]] = {}
    for row in cost["rows"]:
        lines.setdefault(row["contender"], {})[row["classes"]] = row
    kinds = {row["contender"]: "ours" if row["ours"] else "peer" for row in cost["rows"]}
    points = {name: [(size, row["median_ms"]) for size, row in line.items()] for name, line in lines.items()}
    sizes = sorted({row["classes"] for row in cost["rows"]})

    def by_size(shown: Callable[[dict], str]) -> str:
        body = [[name, *(shown(line[size]) if size in line else "–" for size in sizes)] for name, line in lines.items()]
        return plots.table(["classes", *(f"{size:,}" for size in sizes)], body, [*kinds.values()].__getitem__)

    head = ["", "rate", "steps", "top-1", "top-10", "held-out log-loss", "its own loss"]
    body = []
    for row in learnt["rows"]:
        loss = f"{row['held_out_loss']:.4f}"
        losses = [loss, "–"] if row["probability"] else ["–", loss]
        shares = [f"{row['top1']:.2%}", f"{row['top10']:.2%}"]
        body.append([row["contender"], f"{row['rate']:g}", f"{row['steps']:,}", *shares, *losses])
    marks = ["ours" if row["ours"] else "peer" for row in learnt["rows"]]
    return (
        "<h3>Headline: a training step against the number of classes</h3>"
        f'<div class="card"><h4>One step of an output layer</h4><p class="soft">{cost["batch"]} rows of '
        f"{cost['features']} features, random and with Zipf's class frequencies: forward, backward down to the hidden "
        "gradient, update by plain SGD. Medians of interleaved runs; a run of FactoredSphericalOutput is ten steps, "
        "one of which stabilises its factors. 793,471 is the vocabulary of One Billion Word.</p>"
        f"{plots.loglog('Time of a step against classes', ('classes', 'ms'), points, kinds)}<h5>Step in ms</h5>"
        f"{by_size(lambda row: plots.number(row['median_ms']))}<h5>Time of an epoch of {cost['words']:,} words at that "
        f"step time</h5>{by_size(lambda row: duration(row['epoch_seconds']))}</div>"
        f'<div class="card"><h4>What they learn in {learnt["seconds"]:g} s</h4><p class="soft">The language model of '
        f"the main job with {learnt['classes']:,} classes and {learnt['batch']} words a step, from one seed, each "
        f"layer for the same wall time: Adam ({learnt['body_rate']:g}) below the output layer, plain SGD at the given "
        f"rate for the output layer; Z-loss with a = {learnt['a']:g}, b = {learnt['b']:g}. Rates and b are the best of "
        "a few that were tried on these held-out words. Top-1 and top-10 are the shares of held-out words that are the "
        f"first, or among the first ten, predictions.</p>{plots.table(head, body, marks.__getitem__)}"
        "</div>"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, help="wall time for which each layer trains (12)")
    parser.add_argument("--out", type=Path, help="folder for headline_z_loss.json (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks this script only")
    options = parser.parse_args(arguments)
    device, quick = options.device, options.quick
    out = options.out or (Path(tempfile.mkdtemp(prefix="tilewise-headline-")) if quick else None)
    out = out or results.RESULTS / results.machine_name(device)
    seconds = options.seconds or (0.3 if quick else 12.0)
    seen, held, classes = by_frequency(device)
    content = {"environment": results.environment(device), "headline": "z_loss"}
    sizes, features, batch = ((100, 400), 16, 8) if quick else (SIZES, FEATURES, BATCH)
    content["accuracy"] = accuracy(seen, held, classes, seconds, device)
    content["cost"] = cost(sizes, features, batch, len(seen), device)
    results.save(out / "headline_z_loss.json", content)
    say(f"\nresults are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
