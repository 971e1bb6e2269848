"""Losses, batches and calls that the tests of the pairwise engine share."""

import math

import torch
import torch.nn.functional as F
from contract import DEVICE, INTERPRETED, NATIVE_CPU

import tilewise
from tilewise.reference.pairwise import OPS as REFERENCE

LOSSES = {
    "softmax": [],
    "decoupled_softmax": [],
    "sigmoid": [],
    "multi_similarity": [2.0, 50.0, 0.5, 0.1],
    "multi_similarity of all pairs": [2.0, 50.0, 0.5, math.inf],
    "binomial_deviance": [2.0, 10.0, 0.4],
    "lifted_structure": [1.0, 0.2],
    "contrastive": [0.9, 0.1],
    "triplet": [0.2],
    "circle": [0.25, 2.0],
    "log_sum_exp": [],
    "positive_sum": [],
    "least_positive": [],
    "most_negative": [],
    "window_log_sum_exp": [-2.0, 0.3, 1.0],
}
REDUCTIONS = ("none", "sum", "mean", "mean_active")
WIDE = torch.float64 if NATIVE_CPU else torch.float32
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11} if NATIVE_CPU else {"rtol": 2e-4, "atol": 2e-5}


def batch(n=7 if INTERPRETED else 23, m=None, d=7, dtype=WIDE, classes=6):
    """x, y (x itself without m), and labels with classes of one member and classes that y lacks."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d), dim=1)
    y = x if m is None else F.normalize(torch.randn(m, d), dim=1)
    x_labels = torch.randint(0, classes, (n,))
    y_labels = x_labels if m is None else torch.randint(1, classes + 1, (m,))
    if n > 2 and m is None:
        x_labels[2] = 99
    return [t.to(DEVICE, dtype) for t in (x, y)] + [t.to(DEVICE) for t in (x_labels, y_labels)]


def number(value, dtype=WIDE):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def call(arguments, *, loss, **options):
    return torch.ops.tilewise.pairwise_loss(
        *arguments, loss=loss.removesuffix(" of all pairs"), parameters=LOSSES[loss], **options
    )


def truth(arguments, *, loss, **options):
    wide = [
        t.cpu().double() if t is not None and t.is_floating_point() else None if t is None else t.cpu()
        for t in arguments
    ]
    return REFERENCE["pairwise_loss"](
        *wide, loss=loss.removesuffix(" of all pairs"), parameters=LOSSES[loss], **options
    )


PUBLIC = {
    "multi_similarity_loss": lambda x, y, labels, **o: tilewise.multi_similarity_loss(x, labels, **o),
    "references": lambda x, y, labels, **o: tilewise.multi_similarity_loss(
        x, labels, ref_embeddings=y, ref_labels=labels, epsilon=0.3, **o
    ),
    "supcon": lambda x, y, labels, **o: tilewise.supcon(x, labels, **o),
    "decoupled": lambda x, y, labels, **o: tilewise.supcon(x, labels, decoupled=True, temperature=0.3, **o),
    "info_nce": lambda x, y, labels, **o: tilewise.info_nce(x, y, temperature=0.2, **o),
    "nt_xent": lambda x, y, labels, **o: tilewise.nt_xent(x, y, **o),
    "clip_loss": lambda x, y, labels, **o: tilewise.clip_loss(x, y, 3.0, **o),
    "siglip_loss": lambda x, y, labels, **o: tilewise.siglip_loss(x, y, 3.0, -1.0, **o),
    "binomial_deviance": lambda x, y, labels, **o: tilewise.pair_weighted_loss(
        x, labels, tilewise.weighting.BinomialDeviance(), **o
    ),
    "contrastive": lambda x, y, labels, **o: tilewise.pair_weighted_loss(
        x, labels, tilewise.weighting.Contrastive(), **o
    ),
    "triplet": lambda x, y, labels, **o: tilewise.pair_weighted_loss(x, labels, tilewise.weighting.Triplet(), **o),
    "lifted_structure": lambda x, y, labels, **o: tilewise.pair_weighted_loss(
        x, labels, tilewise.weighting.LiftedStructure(), **o
    ),
}


def leaves(n=11, d=5, dtype=WIDE):
    torch.manual_seed(1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5])[torch.arange(n) % 11].to(DEVICE)
    return (
        torch.randn(n, d).to(DEVICE, dtype).requires_grad_(),
        torch.randn(n, d).to(DEVICE, dtype).requires_grad_(),
        labels,
    )
