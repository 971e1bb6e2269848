"""linear_cross_entropy: mean cross entropy of input @ weight.T over class indices, forward and backward."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from case import LAYERS, Contender, common_contenders, peer
from layers import layer_case

FAMILY = LAYERS
SIZES = {  # (rows, features, classes), dtype, timed runs, seconds at most once three runs are done
    "quick": [((64, 16, 1000), torch.float32, 5, 1.0)],
    "cpu": [
        ((2048, 512, 50257), torch.float32, 5, 30.0),
        ((512, 512, 50257), torch.float32, 5, 10.0),
        ((64, 512, 50257), torch.float32, 9, 5.0),
        ((512, 512, 50257), torch.bfloat16, 5, 10.0),
        ((4096, 512, 50257), torch.float32, 3, 90.0),
    ],
    "cuda": [
        ((8192, 2304, 256000), torch.bfloat16, 10, 8.0),
        ((8192, 4096, 128256), torch.bfloat16, 10, 8.0),
        ((4096, 2048, 50257), torch.float32, 10, 6.0),
    ],
}


def eager(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight), target)


def row_loss(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


def ours():
    return {"": importlib.import_module("tilewise").linear_cross_entropy}


def chunked(hidden, weight, target):
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def liger():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def cut():
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def contenders(device: str, compiled: bool):
    present, absent = common_contenders(ours, eager, device, compiled)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        present.append(Contender("torch chunked", chunked))
    else:
        absent["torch chunked"] = f"torch {torch.__version__} lacks LinearCrossEntropyOptions"
    if device == "cuda":
        peer(present, absent, "Liger-Kernel", "liger_kernel.transformers.functional", liger)
        peer(present, absent, "cut-cross-entropy", "cut_cross_entropy", cut)
    return present, absent


def cases(device: str, quick: bool = False):
    for size, dtype, runs, seconds in SIZES["quick" if quick else device]:
        rows, features, classes = size
        product = 2 * rows * features * classes
        # the logits; then the gradients of input and weight
        flops = {"forward": product, "backward": 2 * product}
        found = contenders(device, compiled=not quick)
        yield layer_case("linear_cross_entropy", size, dtype, device, row_loss, found, flops, runs, seconds)
