"""What attention that knows the query's magnitude learns, and what it costs as the sequence grows.

python bench/headlines/mala.py            # what `make headlines` does, about three minutes
python bench/headlines/mala.py --quick    # tiny sizes, seconds; results go to a temporary folder

The claim (Fan et al. 2025): linear attention ignores the magnitude of the query, so its weights never sharpen; with the
magnitude back it behaves like softmax attention at linear cost. Small models on real data with softmax, plain linear
and magnitude-aware attention at equal steps: digits as 64 tokens, and characters of Python's documentation.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the modules of bench/, not those of this folder

import plots
import results
from cases.mala import composition, phi
from measure import clock_for, quartiles
from results import say

WIDTH, HEADS, LAYERS, RATE = 48, 3, 2, 2e-3
DIGIT_BATCH, DIGIT_STEPS = 128, 200
TEXT_BATCH, TEXT_LENGTH, TEXT_STEPS = 16, 128, 150
SIZES, SLOW = (256, 1024, 4096, 16384, 65536), 5.0  # tokens; seconds after which a contender is not asked for more
COST_HEADS, COST_FEATURES, ROUNDS = 8, 64, 3
SCALES, KEYS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), 256

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def linear(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Plain linear attention: weights phi(q) . phi(k), divided by their sum."""
    f, g = phi(q), phi(k)
    if causal:
        weights = (f @ g.transpose(-1, -2)).tril()
        return weights @ v / weights.sum(-1, keepdim=True)
    return f @ (g.transpose(-1, -2) @ v) / (f @ g.sum(-2)[..., None])


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return importlib.import_module("tilewise").mala(q, k, v, causal=causal)


ATTENTIONS: dict[str, Attention] = {"softmax": softmax, "plain linear": linear, "mala": ours}


class Block(nn.Module):
    def __init__(self, attention: Attention, causal: bool):
        super().__init__()
        self.attention, self.causal = attention, causal
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1)]
        x = x + self.out(self.attention(*heads, self.causal).transpose(1, 2).flatten(2))
        return x + self.mlp(self.after(x))


class Model(nn.Module):
    def __init__(self, attention: Attention, embed: nn.Module, length: int, classes: int, causal: bool):
        super().__init__()
        self.embed, self.place = embed, nn.Parameter(0.02 * torch.randn(length, WIDTH))
        self.blocks = nn.Sequential(*(Block(attention, causal) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x) + self.place))


def train(model: nn.Module, batches: Callable[[], tuple[Tensor, Tensor]], loss, steps: int, device: str) -> float:
    """Median ms of a step."""
    optimizer, clock, times = torch.optim.Adam(model.parameters(), lr=RATE), clock_for(device), []
    for _ in range(steps):
        inputs, targets = batches()
        optimizer.zero_grad()
        start = clock.mark()
        loss(model, inputs, targets).backward()
        end = clock.mark()
        optimizer.step()
        clock.settle()
        times.append(clock.between(start, end))
    return quartiles(times)[1]


def digits(steps: int, device: str) -> list[dict]:
    """Held-out accuracy on digits whose pixels are the tokens."""
    data = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.tensor(data.data, dtype=torch.float32, device=device)[..., None] / 16
    labels = torch.tensor(data.target, device=device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, held = order[:1400].to(device), order[1400:].to(device)
    found = []
    for name, attention in ATTENTIONS.items():
        torch.manual_seed(0)
        model = Model(attention, nn.Linear(1, WIDTH), 64, 10, causal=False).to(device)
        generator = torch.Generator().manual_seed(1)

        def batch(generator=generator):
            chosen = seen[torch.randint(len(seen), (DIGIT_BATCH,), generator=generator)]
            return images[chosen], labels[chosen]

        def loss(model, inputs, targets):
            return F.cross_entropy(model.head(model(inputs).mean(1)), targets)

        took = train(model, batch, loss, steps, device)
        with torch.no_grad():
            right = (model.head(model(images[held]).mean(1)).argmax(1) == labels[held]).float().mean().item()
        found.append({"attention": name, "accuracy": right, "median_ms": took})
        say(f"  digits, {name:14} accuracy {right:.2%}, {took:.1f} ms a step")
    return found


def text(steps: int, device: str) -> list[dict]:
    """Held-out perplexity of the next character."""
    everything = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: i for i, character in enumerate(sorted(set(everything)))}
    ids = torch.tensor([alphabet[character] for character in everything], device=device)
    cut = len(ids) * 19 // 20
    seen, held = ids[:cut], ids[cut:]
    windows = held[: len(held) // (TEXT_LENGTH + 1) * (TEXT_LENGTH + 1)].view(-1, TEXT_LENGTH + 1)[:64]
    found = []
    for name, attention in ATTENTIONS.items():
        torch.manual_seed(0)
        embed = nn.Embedding(len(alphabet), WIDTH)
        model = Model(attention, embed, TEXT_LENGTH, len(alphabet), causal=True).to(device)
        generator = torch.Generator().manual_seed(1)

        def batch(generator=generator):
            first = torch.randint(len(seen) - TEXT_LENGTH - 1, (TEXT_BATCH, 1), generator=generator).to(device)
            window = seen[first + torch.arange(TEXT_LENGTH + 1, device=device)]
            return window[:, :-1], window[:, 1:]

        def loss(model, inputs, targets):
            return F.cross_entropy(model.head(model(inputs)).flatten(0, 1), targets.flatten())

        took = train(model, batch, loss, steps, device)
        with torch.no_grad():
            perplexity = math.exp(loss(model, windows[:, :-1], windows[:, 1:]).item())
        found.append({"attention": name, "perplexity": perplexity, "median_ms": took})
        say(f"  text, {name:14} perplexity {perplexity:.3f}, {took:.1f} ms a step")
    return found


def cost(sizes: tuple[int, ...], device: str) -> list[dict]:
    """Forward and backward of one attention layer, the contenders in turn."""
    clock, rows = clock_for(device), []
    contenders = {
        "softmax attention": softmax,
        "plain linear attention": linear,
        "mala, eager": lambda q, k, v, causal: composition(q, k, v),
        "mala": ours,
        "mala, causal": lambda q, k, v, causal: ours(q, k, v, True),
    }
    for size in sizes:
        torch.manual_seed(0)
        q, k, v, grad = (torch.randn(1, COST_HEADS, size, COST_FEATURES, device=device) for _ in range(4))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        times: dict[str, list[float]] = {name: [] for name in contenders}
        began = {name: time.perf_counter() for name in contenders}
        for done in range(ROUNDS + 1):
            for name, attention in list(contenders.items()):
                began[name] = time.perf_counter()
                start = clock.mark()
                torch.autograd.grad(attention(*leaves, False), leaves, grad)
                end = clock.mark()
                clock.settle()
                if done or time.perf_counter() - began[name] > SLOW:
                    times[name].append(clock.between(start, end))
                if time.perf_counter() - began[name] > SLOW:
                    del contenders[name]
        for name, took in times.items():
            if took:
                rows.append({"contender": name, "tokens": size, "median_ms": quartiles(took)[1]})
                say(f"  {size:6} tokens, {name:18} {rows[-1]['median_ms']:10.2f} ms")
    return rows


def sharpness() -> list[dict]:
    """The effective number of keys, e^entropy of the weights' magnitudes, as the query grows."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, COST_FEATURES), torch.randn(2, KEYS, COST_FEATURES)
    one = torch.eye(KEYS).expand(2, KEYS, KEYS)
    rows = []
    for name, attention in ATTENTIONS.items():
        for scale in SCALES:
            weights = attention(scale * q[:, None], k[:, None], one[:, None], False).abs()
            share = weights / weights.sum(-1, keepdim=True)
            entropy = -torch.where(share > 0, share * share.log(), 0).sum(-1)
            rows.append({"attention": name, "scale": scale, "effective_keys": entropy.exp().mean().item()})
    return rows


def section(content: dict) -> str:
    """This headline's part of the report."""
    learnt = {row["attention"]: dict(row) for row in content["digits"]}
    for row in content["text"]:
        learnt[row["attention"]] = learnt[row["attention"]] | {
            "perplexity": row["perplexity"],
            "text_ms": row["median_ms"],
        }
    marks = ["ours" if name == "mala" else "peer" for name in learnt]
    body = [
        [name, f"{row['accuracy']:.1%}", f"{row['median_ms']:.1f}", f"{row['perplexity']:.3f}", f"{row['text_ms']:.1f}"]
        for name, row in learnt.items()
    ]
    table = plots.table(
        ["attention", "digits, accuracy", "ms a step", "text, perplexity", "ms a step"], body, marks.__getitem__
    )

    def lines(rows: list[dict], name: str, x: str, y: str) -> tuple[dict, dict]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            found.setdefault(row[name], []).append((row[x], row[y]))
        return found, {key: "ours" if key.startswith("mala") and "eager" not in key else "peer" for key in found}

    times, kinds = lines(content["cost"], "contender", "tokens", "median_ms")
    keys, shapes = lines(content["sharpness"], "attention", "scale", "effective_keys")
    time_plot = plots.loglog("Time against the number of tokens", ("tokens", "ms"), times, kinds)
    key_plot = plots.loglog("Effective keys against the query's scale", ("scale of the query", "keys"), keys, shapes)
    return (
        "<h3>Headline: attention that knows the query's magnitude</h3>"
        '<div class="card"><h4>Learnt at equal steps</h4><p class="soft">One small model and seed; digits with pixels '
        f"as tokens ({content['digit_steps']} steps), characters of Python's documentation, causal "
        f"({content['text_steps']} steps).</p>{table}</div>"
        '<div class="card"><h4>Forward and backward of one layer</h4><p class="soft">'
        f"{COST_HEADS} heads of {COST_FEATURES} features.</p>{time_plot}</div>"
        '<div class="card"><h4>Sharpness</h4><p class="soft">e to the entropy of the weights\' magnitudes over '
        f"{KEYS} random keys: plain linear attention does not see how large the query is.</p>{key_plot}</div>"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder for headline_mala.json (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks this script only")
    options = parser.parse_args(arguments)
    device, quick = options.device, options.quick
    out = options.out or (Path(tempfile.mkdtemp(prefix="tilewise-headline-")) if quick else None)
    out = out or results.RESULTS / results.machine_name(device)
    digit_steps, text_steps = (3, 3) if quick else (DIGIT_STEPS, TEXT_STEPS)
    content = {"environment": results.environment(device), "headline": "mala"}
    content |= {"digit_steps": digit_steps, "text_steps": text_steps}
    content["cost"] = cost((32, 64) if quick else SIZES, device)
    content["sharpness"] = sharpness()
    content["digits"] = digits(digit_steps, device)
    content["text"] = text(text_steps, device)
    results.save(out / "headline_mala.json", content)
    say(f"\nresults are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
