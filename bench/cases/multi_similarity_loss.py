"""multi_similarity_loss with its mining, forward and backward."""

from __future__ import annotations

import importlib
import math

import torch

from case import PAIRS
from pairs import pair_case, pairs_of

FAMILY = PAIRS
SIZES = {  # (rows, features, classes), dtype, timed runs, seconds at most once three runs are done
    "quick": [((96, 16, 12), torch.float32, 5, 1.0)],
    "cpu": [((4096, 128, 512), torch.float32, 7, 40.0), ((1024, 128, 128), torch.float32, 9, 5.0)],
    "cuda": [((16384, 512, 2048), torch.bfloat16, 10, 8.0), ((8192, 128, 1024), torch.float32, 10, 6.0)],
}
ALPHA, BETA, BASE, EPSILON = 2.0, 50.0, 0.5, 0.1


def eager(embeddings, labels):
    s, positive, negative = pairs_of(embeddings, labels)
    least = s.detach().masked_fill(~positive, math.inf).amin(1, keepdim=True)
    most = s.detach().masked_fill(~negative, -math.inf).amax(1, keepdim=True)
    positive = positive & (s - EPSILON < most)
    negative = negative & (s + EPSILON > least)
    kept = positive.any(1) & negative.any(1)
    pull = torch.where(positive, torch.exp(-ALPHA * (s - BASE)), 0).sum(1)
    push = torch.where(negative, torch.exp(BETA * (s - BASE)), 0).sum(1)
    losses = torch.log1p(pull) / ALPHA + torch.log1p(push) / BETA
    return torch.where(kept, losses, 0).mean()


def ours():
    return {"": importlib.import_module("tilewise").multi_similarity_loss}


def theirs():
    from pytorch_metric_learning import losses, miners

    loss = losses.MultiSimilarityLoss(alpha=ALPHA, beta=BETA, base=BASE)
    miner = miners.MultiSimilarityMiner(epsilon=EPSILON)
    return lambda embeddings, labels: loss(embeddings, labels, miner(embeddings, labels))


def cases(device: str, quick: bool = False):
    for size, dtype, runs, seconds in SIZES["quick" if quick else device]:
        yield pair_case(
            "multi_similarity_loss", size, dtype, device, ours, eager, theirs, runs=runs, seconds=seconds, quick=quick
        )
