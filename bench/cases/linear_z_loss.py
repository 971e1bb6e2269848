"""linear_z_loss: the Z-loss of hidden @ weight.T without its logits, against routes that make them."""

from __future__ import annotations

import importlib
from functools import partial

import torch
import torch.nn.functional as F

from case import LAYERS, common_contenders
from cases.z_loss import A, B, row_loss
from layers import layer_case

FAMILY = LAYERS
SIZES = {  # (rows, features, classes), dtype, timed runs, seconds at most once three runs are done
    "quick": [((64, 16, 1000), torch.float32, 5, 1.0)],
    "cpu": [((8192, 256, 50257), torch.float32, 3, 60.0)],
    "cuda": [((8192, 2048, 128256), torch.float32, 10, 8.0)],
}


def eager(hidden, weight, target):
    return row_loss(F.linear(hidden, weight), target).mean()


def ours():
    tilewise = importlib.import_module("tilewise")

    def of_logits(hidden, weight, target):
        return tilewise.z_loss(F.linear(hidden, weight), target, a=A, b=B)

    return {"": partial(tilewise.linear_z_loss, a=A, b=B), "z_loss(F.linear)": of_logits}


def cases(device: str, quick: bool = False):
    for size, dtype, runs, seconds in SIZES["quick" if quick else device]:
        rows, features, classes = size
        # Without logits: W'W and its product with every row; backward W times such a matrix, and two more of the rows.
        square = 2 * features**2
        flops = {"forward": (classes + rows) * square, "backward": (classes + 2 * rows) * square}
        found = common_contenders(ours, eager, device, compiled=not quick)
        yield layer_case("linear_z_loss", size, dtype, device, row_loss, found, flops, runs, seconds)
