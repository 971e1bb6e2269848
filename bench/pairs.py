"""What the cases of pairwise losses share: loss(embeddings, labels), the embeddings normalised inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from case import Case, common_contenders, peer, spread


def pair_inputs(rows: int, features: int, classes: int, dtype: torch.dtype, device: str):
    """Classes of about rows / classes members each, some of one, and embeddings that lean towards their class."""
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator, device=device)
    centres = torch.randn(classes, features, generator=generator, device=device)
    embeddings = torch.randn(rows, features, generator=generator, device=device) + 0.5 * centres[labels]
    return [embeddings.to(dtype)], [labels]


def pairs_of(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine similarities and the masks of positives and negatives: what a user would write."""
    x = F.normalize(embeddings, dim=1)
    same = labels[:, None] == labels
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return x @ x.T, same & ~own, ~same


def pair_reference(loss: Callable[[Tensor, Tensor], Tensor], embeddings: Tensor, labels: Tensor, checked: int = 64):
    """Loss and the gradients of some embeddings in float64."""
    wide = embeddings.detach().double().requires_grad_()
    value = loss(wide, labels)
    (gradient,) = torch.autograd.grad(value, wide)
    index = spread(len(embeddings), checked, embeddings.device)
    return value.item(), [(index, gradient[index])]


def pair_case(op, size, dtype, device, ours, eager, theirs, *, runs, seconds, quick) -> Case:
    """`theirs` makes pytorch-metric-learning's loss of (embeddings, labels)."""
    rows, features, classes = size
    present, absent = common_contenders(ours, eager, device, compiled=not quick)
    peer(present, absent, "pytorch-metric-learning", "pytorch_metric_learning", theirs)
    matrix = rows * features * dtype.itemsize
    product = 2 * rows * rows * features  # the similarities; then a product for each side of every pair
    return Case(
        op=op,
        shape=(rows, features),
        dtype=dtype,
        device=device,
        inputs=partial(pair_inputs, rows, features, classes, dtype, device),
        reference=partial(pair_reference, eager),
        contenders=present,
        absent=absent,
        traffic={"forward": matrix, "backward": 2 * matrix, "both": 3 * matrix},
        flops={"forward": product, "backward": 2 * product, "both": 3 * product},
        runs=runs,
        seconds=seconds,
    )
