"""cross_entropy: mean loss over class indices, forward and backward."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from case import ROWS, Case, peer, row_contenders, row_inputs, row_reference, row_traffic

FAMILY = ROWS
SIZES = {  # rows, classes, dtype, timed runs, seconds at most
    "quick": [(64, 1000, torch.float32, 5, 1.0)],
    "cpu": [
        (2048, 32000, torch.float32, 15, 24.0),
        (32768, 1000, torch.float32, 9, 9.0),
        (2048, 32000, torch.bfloat16, 7, 9.0),
    ],
    "cuda": [
        (8192, 128256, torch.bfloat16, 40, 6.0),
        (8192, 32000, torch.bfloat16, 40, 4.0),
        (8192, 262144, torch.bfloat16, 30, 8.0),
        (8192, 32000, torch.float32, 40, 5.0),
        (8192, 128256, torch.float32, 30, 8.0),
    ],
}


def eager(logits, target):
    return F.cross_entropy(logits, target)


def row_loss(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


def liger():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def quack():
    from quack import cross_entropy

    return partial(cross_entropy, reduction="mean")


def cases(device: str, quick: bool = False):
    for rows, classes, dtype, runs, seconds in SIZES["quick" if quick else device]:
        contenders, absent = row_contenders("cross_entropy", eager, device, inplace=True, compiled=not quick)
        if device == "cuda":
            peer(contenders, absent, "Liger-Kernel", "liger_kernel.transformers.functional", liger)
            peer(contenders, absent, "quack", "quack", quack)
        cell = rows * classes
        yield Case(
            op="cross_entropy",
            shape=(rows, classes),
            dtype=dtype,
            device=device,
            inputs=partial(row_inputs, rows, classes, dtype, device),
            reference=partial(row_reference, row_loss),
            contenders=contenders,
            absent=absent,
            traffic=row_traffic(rows, classes, dtype),
            # max, subtract, exp, add; then subtract, exp, scale, subtract
            flops={"forward": 4 * cell, "backward": 4 * cell, "both": 8 * cell},
            runs=runs,
            seconds=seconds,
        )
