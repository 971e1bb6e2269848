"""supcon, the supervised contrastive loss, forward and backward."""

from __future__ import annotations

import importlib

import torch

from case import PAIRS
from pairs import pair_case, pairs_of

FAMILY = PAIRS
SIZES = {  # (rows, features, classes), dtype, timed runs, seconds at most once three runs are done
    "quick": [((96, 16, 12), torch.float32, 5, 1.0)],
    "cpu": [((4096, 128, 512), torch.float32, 7, 30.0), ((1024, 128, 128), torch.float32, 9, 5.0)],
    "cuda": [((16384, 512, 2048), torch.bfloat16, 10, 8.0), ((8192, 128, 1024), torch.float32, 10, 6.0)],
}
TEMPERATURE = 0.1


def eager(embeddings, labels):
    s, positive, negative = pairs_of(embeddings, labels)
    z = s / TEMPERATURE
    count = positive.sum(1)
    lse = torch.logsumexp(z.masked_fill(~(positive | negative), -torch.inf), 1)
    losses = lse - torch.where(positive, z, 0).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, losses, 0).mean()


def ours():
    return {"": importlib.import_module("tilewise").supcon}


def theirs():
    from pytorch_metric_learning import losses, reducers

    return losses.SupConLoss(temperature=TEMPERATURE, reducer=reducers.MeanReducer())


def cases(device: str, quick: bool = False):
    for size, dtype, runs, seconds in SIZES["quick" if quick else device]:
        yield pair_case("supcon", size, dtype, device, ours, eager, theirs, runs=runs, seconds=seconds, quick=quick)
