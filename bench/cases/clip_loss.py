"""clip_loss of normalised features, forward and backward; eager is what open_clip computes."""

from __future__ import annotations

import importlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from case import PAIRS, Case, common_contenders, spread

FAMILY = PAIRS
SIZES = {  # (rows, features), dtype, timed runs, seconds at most once three runs are done
    "quick": [((96, 16), torch.float32, 5, 1.0)],
    "cpu": [((4096, 512), torch.float32, 7, 30.0)],
    "cuda": [((65536, 768), torch.bfloat16, 10, 8.0), ((8192, 512), torch.float32, 10, 6.0)],
}
SCALE = 1 / 0.07
HELD = 2**26  # similarities of the float64 reference at a time


def clip_inputs(rows: int, features: int, dtype: torch.dtype, device: str):
    """Texts that lean towards their images."""
    generator = torch.Generator(device).manual_seed(0)
    image, noise = (torch.randn(rows, features, generator=generator, device=device) for _ in range(2))
    return [F.normalize(t, dim=1).to(dtype) for t in (image, image + 2 * noise)], []


def eager(image: Tensor, text: Tensor) -> Tensor:
    logits = SCALE * image @ text.T
    index = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, index) + F.cross_entropy(logits.T, index)) / 2


def ours():
    return {"": partial(importlib.import_module("tilewise").clip_loss, logit_scale=SCALE)}


def reference(image: Tensor, text: Tensor, checked: int = 64):
    """Loss and the gradients of some rows in float64, some rows of similarities at a time."""
    x, y = image.detach().double(), text.detach().double()
    n = len(x)
    of_rows, of_columns = x.new_empty(n), x.new_full((n,), -torch.inf)
    for part in torch.arange(n, device=x.device).split(max(1, HELD // n)):
        z = SCALE * x[part] @ y.T
        of_rows[part] = torch.logsumexp(z, 1)
        of_columns = torch.logaddexp(of_columns, torch.logsumexp(z, 0))
    loss = ((of_rows + of_columns) / 2 - SCALE * (x * y).sum(1)).mean().item()
    index = spread(n, checked, x.device)

    def gradient(own: Tensor, other: Tensor, of_own: Tensor, of_other: Tensor) -> Tensor:
        z = SCALE * own[index] @ other.T
        weights = (torch.exp(z - of_own[index, None]) + torch.exp(z - of_other)) / 2
        return SCALE * (weights @ other - other[index]) / n

    return loss, [(index, gradient(x, y, of_rows, of_columns)), (index, gradient(y, x, of_columns, of_rows))]


def cases(device: str, quick: bool = False):
    for (rows, features), dtype, runs, seconds in SIZES["quick" if quick else device]:
        present, absent = common_contenders(ours, eager, device, compiled=not quick)
        matrices = 2 * rows * features * dtype.itemsize
        product = 2 * rows * rows * features  # the similarities; then a product for each side
        yield Case(
            op="clip_loss",
            shape=(rows, features),
            dtype=dtype,
            device=device,
            inputs=partial(clip_inputs, rows, features, dtype, device),
            reference=reference,
            contenders=present,
            absent=absent,
            traffic={"forward": matrices, "backward": 2 * matrices, "both": 3 * matrices},
            flops={"forward": product, "backward": 2 * product, "both": 3 * product},
            runs=runs,
            seconds=seconds,
        )
