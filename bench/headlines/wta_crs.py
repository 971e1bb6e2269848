"""What a sample of the rows leaves of a fine-tuning: accuracy, memory, the batch that fits, the time of a step.

python bench/headlines/wta_crs.py            # what `make headlines` does, about four minutes
python bench/headlines/wta_crs.py --quick    # tiny sizes, seconds; results go to a temporary folder

The claim (Liu et al. 2023): with winner-take-all sampling the weight gradients of a transformer need a tenth of its
linear layers' inputs, and fine-tuning loses next to nothing. A small encoder learns masked words of the documentation
that ships with Python, and is then fine-tuned to tell from a sentence which of eight of its topics it is from.
"""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the modules of bench/, not those of this folder

import plots
import results
from measure import clock_for, quartiles
from results import say

WIDTH, HEADS, LAYERS, LENGTH, CLASSES = 128, 4, 4, 32, 8
BATCH, MASKED, STEPS, EVERY, SEEDS = 32, 400, 160, 8, (0, 1, 2)
RATES = {"masked": 1e-3, "fine": 5e-4}
PAD, MASK = 0, 1
BUDGET = 192 * 2**20  # bytes of one step beyond parameters, in which the largest batch has to fit


@dataclass(frozen=True)
class Method:
    """How a model keeps what its backward needs."""

    ratio: float | None = None  # of rows; None: all
    method: str = "systematic"
    again: bool = False  # blocks are run again in the backward


METHODS = {
    "full": Method(),
    "WTA 0.1": Method(0.1),
    "WTA 0.3": Method(0.3),
    "WTA 0.1 as in the paper": Method(0.1, "wta"),
    "CRS 0.1": Method(0.1, "crs"),
    "checkpointing": Method(again=True),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.before_attention(x)
        q, k, v = (layer(h).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class Encoder(nn.Module):
    def __init__(self, words: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(words, WIDTH), nn.Parameter(0.05 * torch.randn(LENGTH, WIDTH))
        nn.init.normal_(self.embed.weight, std=0.05)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.again = False

    def hidden(self, tokens: Tensor) -> Tensor:
        x, mask = self.embed(tokens) + self.place, (tokens != PAD)[:, None, None, :]
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if self.again and self.training else block(x, mask)
        return self.last(x)

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens != PAD)[:, :, None].float()
        return self.head((self.hidden(tokens) * real).sum(1) / real.sum(1))


@dataclass
class Text:
    """Sentences as word numbers, padded; of every sentence in the whole, and of the labelled ones in two parts."""

    words: int
    everything: Tensor
    tokens: Tensor
    labels: Tensor
    held_tokens: Tensor
    held_labels: Tensor


def text() -> Text:
    """The topics with most sentences that no other topic has; a fifth of these is held out."""
    owners: dict[tuple[str, ...], set[str]] = {}
    for topic in sorted(topics):
        for sentence in re.split(r"(?<=[.!?:])\s+", topics[topic]):
            words = re.findall(r"[a-z_]+|[0-9]+", sentence.lower())
            if len(words) >= 5:
                owners.setdefault(tuple(words[:LENGTH]), set()).add(topic)
    own: dict[str, list[tuple[str, ...]]] = {}
    for sentence, names in owners.items():
        if len(names) == 1:
            own.setdefault(min(names), []).append(sentence)
    chosen = sorted(own, key=lambda topic: (-len(own[topic]), topic))[:CLASSES]
    numbers = {word: i for i, word in enumerate(sorted({w for s in owners for w in s}), 2)}

    def padded(sentences) -> Tensor:
        return torch.tensor([[numbers[w] for w in s] + [PAD] * (LENGTH - len(s)) for s in sentences])

    tokens = padded([sentence for topic in chosen for sentence in own[topic]])
    labels = torch.tensor([label for label, topic in enumerate(chosen) for _ in own[topic]])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    cut = len(order) * 4 // 5
    seen, held = order[:cut], order[cut:]
    return Text(len(numbers) + 2, padded(owners), tokens[seen], labels[seen], tokens[held], labels[held])


def learn_words(data: Text, steps: int) -> dict[str, Tensor]:
    """The state of an encoder that guesses masked words, a seventh of them; labels are not used."""
    torch.manual_seed(0)
    model = Encoder(data.words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES["masked"])
    losses = []
    for _ in range(steps):
        tokens = data.everything[torch.randint(len(data.everything), (2 * BATCH,))]
        masked = (torch.rand(tokens.shape) < 0.15) & (tokens != PAD)
        hidden = model.hidden(torch.where(masked, MASK, tokens))[masked]
        loss = F.cross_entropy(F.linear(hidden, model.embed.weight), tokens[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    say(f"  masked words: loss {losses[0]:.2f}, then {statistics.mean(losses[-20:]):.2f}")
    return model.state_dict()


def model_of(method: Method, state: dict[str, Tensor], data: Text) -> Encoder:
    tilewise = importlib.import_module("tilewise")
    model = Encoder(data.words)
    model.load_state_dict(state)
    model.again = method.again
    if method.ratio is not None:
        options = {"ratio": method.ratio, "method": method.method, "exclude": "head", "groups": [("q", "k", "v")]}
        tilewise.nn.convert_linear(model, **options, samples=len(data.tokens), tokens=LENGTH)
    return model


def loss_of(model: Encoder, data: Text, chosen: Tensor) -> Tensor:
    importlib.import_module("tilewise").nn.set_sample_ids(model, chosen)
    return F.cross_entropy(model(data.tokens[chosen]), data.labels[chosen])


def fine_tune(name: str, seed: int, steps: int, state: dict[str, Tensor], data: Text) -> dict:
    """Held-out accuracy every few steps, and the time of forward and backward."""
    torch.manual_seed(seed)
    model, clock = model_of(METHODS[name], state, data), clock_for("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES["fine"])
    order = torch.Generator().manual_seed(seed)
    accuracy, times = [], []
    for step in range(steps):
        chosen = torch.randperm(len(data.tokens), generator=order)[:BATCH]
        optimizer.zero_grad()
        start = clock.mark()
        loss_of(model, data, chosen).backward()
        times.append(clock.between(start, clock.mark()))
        optimizer.step()
        if (step + 1) % EVERY == 0:
            model.eval()
            with torch.no_grad():
                right = (model(data.held_tokens).argmax(1) == data.held_labels).float().mean().item()
            accuracy.append(round(right, 4))
            model.train()
    return {"method": name, "seed": seed, "accuracy": accuracy, "median_ms": quartiles(times)[1]}


def noise(name: str, state: dict[str, Tensor], data: Text, draws: int) -> float:
    """|g - g_full| / |g_full| of all weights of linear layers, after a visit that fills the caches."""
    chosen = torch.arange(BATCH)

    def gradient(model):
        model.zero_grad()
        loss_of(model, data, chosen).backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2])

    exact = gradient(model_of(METHODS["full"], state, data))
    model = model_of(METHODS[name], state, data)
    gradient(model)
    off = [(gradient(model) - exact).square().sum() for _ in range(draws)]
    return float((torch.stack(off).mean() / exact.square().sum()).sqrt())


def memory(name: str, state: dict[str, Tensor], data: Text, largest: int) -> dict:
    """What the graph keeps of a batch, of linear layers and in all; the peak of a step; the largest batch that fits."""
    testing = importlib.import_module("tilewise.testing")
    model = model_of(METHODS[name], state, data)
    weights = sum(p.nbytes for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that gradients, too, are there before

    def kept(within=None):
        forward = lambda: loss_of(model, data, torch.arange(BATCH))  # noqa: E731
        return testing.saved_bytes(forward, apart_from=[*model.parameters(), *model.buffers()], within=within)

    def peak(batch: int) -> int:
        chosen = torch.arange(batch) % len(data.tokens)
        return testing.allocated_bytes(lambda: loss_of(model, data, chosen).backward())

    inside = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    found = {"kept": kept(), "linear": kept(inside), "peak": peak(BATCH), "weights": weights}
    low, high = 1, largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle) <= BUDGET else (low, middle - 1)
    return found | {"largest_batch": low}


def measured(steps: int, masked: int, seeds: tuple[int, ...], draws: int, largest: int) -> dict:
    data = text()
    say(f"{len(data.tokens)} sentences of {CLASSES} topics, {len(data.held_tokens)} held out, {data.words} words")
    state = learn_words(data, masked)
    rows, runs = [], []
    for name in METHODS:
        rows.append({"method": name, "noise": noise(name, state, data, draws), **memory(name, state, data, largest)})
        # What is checkpointed is computed twice, and equal.
        for seed in seeds[:1] if METHODS[name].again else seeds:
            runs.append(fine_tune(name, seed, steps, state, data))
        ends = [f"{run['accuracy'][-1]:.1%}" for run in runs if run["method"] == name]
        last = rows[-1]
        say(
            f"  {name:24} accuracy {', '.join(ends)}; {runs[-1]['median_ms']:.0f} ms; linear layers keep "
            f"{plots.number(last['linear'] / 2**20)} MiB of {plots.number(last['kept'] / 2**20)}, peak "
            f"{plots.number(last['peak'] / 2**20)}; batch {last['largest_batch']}; noise {last['noise']:.2f}"
        )
    return {"rows": rows, "runs": runs, "steps": steps, "every": EVERY, "batch": BATCH, "budget": BUDGET}


def section(content: dict) -> str:
    """The headline's part of the report."""
    rows, runs = content["rows"], content["runs"]
    full = rows[0]
    of = {row["method"]: [run for run in runs if run["method"] == row["method"]] for row in rows}

    def times(row: dict, key: str) -> str:
        return f"{row[key] / 2**20:.1f} ({full[key] / row[key]:.1f}×)" if row[key] else "0"

    body = []
    for row in rows:
        found = of[row["method"]]
        ends = [100 * run["accuracy"][-1] for run in found]
        body.append(
            [row["method"], f"{min(ends):.1f} - {max(ends):.1f} %", f"{row['noise']:.2f}",
             f"{statistics.median(run['median_ms'] for run in found):.0f}", times(row, "linear"), times(row, "kept"),
             times(row, "peak"), f"{row['largest_batch']} ({row['largest_batch'] / full['largest_batch']:.1f}×)"]
        )  # fmt: skip
    head = ["", "held-out accuracy", "noise of gradients", "step, ms"]
    head += ["linear layers keep, MiB", "all keep, MiB", "peak of a step, MiB", "largest batch"]
    kinds = {row["method"]: "ours" if row["method"].startswith("WTA") else "peer" for row in rows}
    shown = {name: found for name, found in of.items() if len(found) == len(of["full"])}
    curves, bands = {}, {}
    for name, found in shown.items():
        at_once = list(zip(*(run["accuracy"] for run in found), strict=True))
        curves[name] = [100 * statistics.mean(values) for values in at_once]
        bands[name] = tuple([100 * pick(values) for values in at_once] for pick in (min, max))
    swatches = {name: f"c{order}" for order, name in enumerate(curves)}
    return (
        "<h3>Headline: weight gradients from a sample of the rows</h3>"
        '<div class="card"><h4>Fine-tuning to tell topics of Python\'s documentation</h4>'
        f'<p class="soft">{LAYERS} blocks of width {WIDTH}, {content["steps"]} steps of {content["batch"]} sentences '
        f"of {LENGTH} words; least and most over the seeds. Noise is the relative error of all sampled gradients at "
        "the start, after one visit. The largest batch is that whose step stays below "
        f"{content['budget'] // 2**20} MiB beyond parameters and gradients. What is kept beside the inputs of linear "
        "layers belongs to attention, norms and the GELU. The paper reports for T5-Base, LoRA and other savings "
        "included, peak memory 2.7 times lower and batches up to 6.4 times larger.</p>"
        f"{plots.table(head, body, lambda i: kinds[rows[i]['method']])}"
        f"<h5>Held-out accuracy in %, every {content['every']} steps: mean, and least to most</h5>"
        f"{plots.legend(swatches)}{plots.curves('Held-out accuracy', 'evaluations', curves, kinds, bands=bands)}</div>"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for headline_wta_crs.json (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks this script only")
    options = parser.parse_args(arguments)
    quick = options.quick
    out = options.out or (Path(tempfile.mkdtemp(prefix="tilewise-headline-")) if quick else None)
    out = out or results.RESULTS / results.machine_name("cpu")
    content = {"environment": results.environment("cpu"), "headline": "wta_crs"}
    content |= measured(EVERY, 2, SEEDS[:1], 1, 2) if quick else measured(STEPS, MASKED, SEEDS, 10, 1024)
    results.save(out / "headline_wta_crs.json", content)
    say(f"\nresults are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
