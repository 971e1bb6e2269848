"""Train a small word-level language model on the English text that ships with Python, once per loss function.

The model reads eight words and predicts the next one (Bengio et al. 2003). Every contender starts from the same seed
and sees the same batches; they take turns step by step, so their times compare and their loss curves must coincide.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case import backends
from measure import clock_for, quartiles
from results import EAGER, say

CONTEXT, EMBEDDING, HIDDEN = 8, 64, 128
BATCH, STEPS, LEARNING_RATE = 2048, 120, 3e-3
SECONDS = 40.0  # a slow or busy machine trains for fewer steps


def corpus() -> tuple[Tensor, Tensor, list[str]]:
    """Training words, held-out words (the last twentieth) and the vocabulary; a word unseen in training is word 0."""
    words = re.findall(r"\w+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)))
    cut = len(words) * 19 // 20
    vocabulary = ["<unknown>", *sorted(set(words[:cut]))]
    index = {word: i for i, word in enumerate(vocabulary)}
    ids = torch.tensor([index.get(word, 0) for word in words])
    return ids[:cut], ids[cut:], vocabulary


class Body(nn.Module):
    """The model up to its output layer."""

    def __init__(self, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(classes, EMBEDDING)
        self.hidden = nn.Linear(CONTEXT * EMBEDDING, HIDDEN)

    def forward(self, context: Tensor) -> Tensor:  # (B, CONTEXT) word ids -> (B, HIDDEN)
        return torch.tanh(self.hidden(self.embedding(context).flatten(1)))


class LanguageModel(Body):
    def __init__(self, classes: int):
        super().__init__(classes)
        self.output = nn.Linear(HIDDEN, classes)

    def forward(self, context: Tensor) -> Tensor:  # (B, CONTEXT) word ids -> (B, classes) logits
        return self.output(super().forward(context))


def examples(ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    window = ids[position[:, None] + torch.arange(CONTEXT + 1, device=ids.device)]
    return window[:, :-1], window[:, -1]


def losses(device: str) -> dict[str, tuple[str | None, Callable]]:
    """Contender -> (tilewise backend or None, loss function)."""
    found: dict[str, tuple[str | None, Callable]] = {EAGER: (None, F.cross_entropy)}
    for backend, reason in backends(device).items():
        name = "tilewise" if device == "cpu" else f"tilewise {backend}"
        if reason:
            say(f"  {name:24} left out: {reason}")
            continue
        ours = importlib.import_module("tilewise").cross_entropy
        found[name] = backend, ours
        found[f"{name} in place"] = backend, partial(ours, inplace_backward=True)
    return found


class Trainee:
    """One model, its optimiser and its loss function."""

    def __init__(self, backend: str | None, loss: Callable, classes: int, device: str):
        torch.manual_seed(0)
        self.backend, self.loss = backend, loss
        self.model = LanguageModel(classes).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.curve: list[float] = []
        self.step_ms: list[float] = []

    def selected(self):
        return importlib.import_module("tilewise").backend(self.backend) if self.backend else contextlib.nullcontext()

    def step(self, context: Tensor, target: Tensor, clock):
        with self.selected():
            start = clock.mark()
            self.optimizer.zero_grad()
            loss = self.loss(self.model(context), target)
            loss.backward()
            self.optimizer.step()
            end = clock.mark()
            clock.settle()
        self.step_ms.append(clock.between(start, end))
        self.curve.append(loss.item())

    @torch.no_grad()
    def held_out(self, ids: Tensor) -> float:
        position = torch.arange(0, len(ids) - CONTEXT, 1, device=ids.device)
        blocks = [examples(ids, block) for block in position.split(BATCH)]
        total = sum(F.cross_entropy(self.model(c), t, reduction="sum").item() for c, t in blocks)
        return total / len(position)


def train(device: str, quick: bool = False) -> dict:
    """The curves and step times of all contenders, ready to be saved."""
    steps, batch = (4, 64) if quick else (STEPS, BATCH)
    seen, held, vocabulary = corpus()
    seen, held = seen.to(device), held.to(device)
    clock = clock_for(device)
    trainees = {name: Trainee(*pair, len(vocabulary), device) for name, pair in losses(device).items()}
    generator = torch.Generator().manual_seed(1)
    order = list(trainees.values())
    began = time.perf_counter()
    for step in range(steps):
        position = torch.randint(len(seen) - CONTEXT, (batch,), generator=generator).to(device)
        context, target = examples(seen, position)
        for trainee in order:
            trainee.step(context, target, clock)
        order = order[1:] + order[:1]
        if (step + 1) % max(1, steps // 12) == 0:
            shown = ", ".join(f"{name} {trainee.curve[-1]:.4f}" for name, trainee in trainees.items())
            say(f"  step {step + 1:4}/{steps} after {time.perf_counter() - began:4.1f} s, loss: {shown}")
        if step >= 9 and time.perf_counter() - began > SECONDS:
            break
    found = []
    for name, trainee in trainees.items():
        q25, median, q75 = quartiles(trainee.step_ms[2:])  # the first steps allocate the optimiser's state
        off = max(abs(a - b) for a, b in zip(trainee.curve, trainees[EAGER].curve, strict=True))
        found.append(
            {
                "contender": name,
                "ours": trainee.backend is not None,
                "median_ms": median,
                "q25_ms": q25,
                "q75_ms": q75,
                "runs": len(trainee.step_ms) - 2,
                "losses": trainee.curve,
                "largest_difference": off,
                "held_out_loss": trainee.held_out(held),
            }
        )
        say(f"  {name:24} {median:9.2f} ms a step  held-out loss {found[-1]['held_out_loss']:.4f}  off by {off:.1e}")
    return {
        "training": {
            "words": len(seen),
            "classes": len(vocabulary),
            "batch": batch,
            "steps": len(order[0].curve),
            "contenders": found,
        }
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    result = train(options.device, options.quick)
    for contender in result["training"]["contenders"]:
        del contender["losses"]
    print(json.dumps(result, indent=1))
