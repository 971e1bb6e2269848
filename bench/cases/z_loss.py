"""z_loss: softplus(a (b - z)) / a of the target's standardised logit, against the same formula in plain torch."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from case import ROWS, Case, row_contenders, row_inputs, row_reference, row_traffic

FAMILY = ROWS
A, B = 1.0, 2.0
SIZES = {  # rows, classes, dtype, timed runs, seconds at most
    "quick": [(64, 1000, torch.float32, 5, 1.0)],
    "cpu": [
        (2048, 32000, torch.float32, 11, 16.0),
        (32768, 1000, torch.float32, 7, 8.0),
        (2048, 32000, torch.bfloat16, 5, 8.0),
    ],
    "cuda": [
        (8192, 128256, torch.bfloat16, 40, 6.0),
        (8192, 32000, torch.bfloat16, 40, 4.0),
        (8192, 262144, torch.bfloat16, 30, 8.0),
        (8192, 32000, torch.float32, 40, 5.0),
        (8192, 128256, torch.float32, 30, 8.0),
    ],
}


def row_loss(logits, target):
    mean = logits.mean(-1)
    deviation = logits.std(-1, correction=0)
    z = (logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - mean) / deviation
    return F.softplus(B - z, beta=A)


def eager(logits, target):
    return row_loss(logits, target).mean()


def cases(device: str, quick: bool = False):
    for rows, classes, dtype, runs, seconds in SIZES["quick" if quick else device]:
        contenders, absent = row_contenders("z_loss", eager, device, inplace=False, compiled=not quick, a=A, b=B)
        cell = rows * classes
        yield Case(
            op="z_loss",
            shape=(rows, classes),
            dtype=dtype,
            device=device,
            inputs=partial(row_inputs, rows, classes, dtype, device),
            reference=partial(row_reference, row_loss),
            contenders=contenders,
            absent=absent,
            traffic=row_traffic(rows, classes, dtype),
            # mean and M2: subtract, multiply-add, add; then subtract, multiply-add
            flops={"forward": 4 * cell, "backward": 3 * cell, "both": 7 * cell},
            runs=runs,
            seconds=seconds,
        )
