"""Miners: which pairs or triplets a loss should see. Compositions of PyTorch operations over chunks of anchors."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tilewise.ops import rows
from tilewise.ops.pairwise import check_references, prepared, similarity_chunks

CHUNK = 2**20  # similarities held at a time


def _chunks(
    op, embeddings, labels, ref_embeddings, ref_labels, normalize
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """The first anchor of each chunk, its similarities and its masks of positive and negative pairs."""
    x, y, x_labels, y_labels, self_offset = check_references(op, embeddings, labels, ref_embeddings, ref_labels)
    x, y = prepared(x, y, normalize)
    for part, similarities, *masks in similarity_chunks(x, y, x_labels, y_labels, self_offset, CHUNK):
        yield part.start, similarities, *masks


def _joined(found: list[tuple[Tensor, ...]], columns: int, like: Tensor) -> tuple[Tensor, ...]:
    if not found:
        return tuple(torch.empty(0, dtype=torch.int64, device=like.device) for _ in range(columns))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


@torch.no_grad()
def multi_similarity_mine(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    epsilon: float = 0.1,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The pairs that multi-similarity mining keeps, for use with any loss of pairs.

    Negatives n with :math:`s_n + \epsilon > \min_P s` and positives p with :math:`s_p - \epsilon < \max_N s`; an anchor
    without positives or without negatives gives none. The tuple is what pytorch-metric-learning's losses take.

    From "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning" (Wang et al., 2019).

    Args:
        embeddings: (N, d), float64 (on a CPU), float32, bfloat16 or float16.
        labels: (N,) integers.
        ref_embeddings: (M, d) of the same dtype: pairs are then formed with these, and none is left out.
        ref_labels: (M,) integers.
        epsilon: the margin of mining.
        normalize: cosine similarities; False takes the embeddings as they are.

    Returns:
        anchors and positives of the positive pairs, anchors and negatives of the negative pairs: int64 vectors, ordered
        by anchor. On a GPU their lengths make the call wait for the device.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> pairs = tilewise.multi_similarity_mine(torch.randn(8, 16), torch.arange(8) // 2)
    """
    op = "multi_similarity_mine"
    epsilon = rows.check_number(op, "epsilon", epsilon)
    found = []
    for begin, s, positive, negative in _chunks(op, embeddings, labels, ref_embeddings, ref_labels, normalize):
        if s.shape[1] == 0:
            break
        least = s.masked_fill(~positive, math.inf).amin(1, keepdim=True)
        most = s.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
        anchor_p, kept_p = (positive & (s - epsilon < most)).nonzero(as_tuple=True)
        anchor_n, kept_n = (negative & (least < math.inf) & (s + epsilon > least)).nonzero(as_tuple=True)
        found.append((anchor_p + begin, kept_p, anchor_n + begin, kept_n))
    return _joined(found, 4, embeddings)


@torch.no_grad()
def batch_hard_mine(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each anchor with its least similar positive and its most similar negative, where it has both.

    From "In Defense of the Triplet Loss for Person Re-Identification" (Hermans et al., 2017).

    Args:
        embeddings: (N, d), float64 (on a CPU), float32, bfloat16 or float16.
        labels: (N,) integers.
        ref_embeddings: (M, d) of the same dtype: pairs are then formed with these, and none is left out.
        ref_labels: (M,) integers.
        normalize: cosine similarities; False takes the embeddings as they are.

    Returns:
        anchors, positives and negatives, int64 vectors; among equals the lowest index. On a GPU their length makes the
        call wait for the device.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> anchor, positive, negative = tilewise.batch_hard_mine(torch.randn(8, 16), torch.arange(8) // 2)
    """
    found = []
    for begin, s, positive, negative in _chunks(
        "batch_hard_mine", embeddings, labels, ref_embeddings, ref_labels, normalize
    ):
        anchor = (positive.any(1) & negative.any(1)).nonzero()[:, 0]
        s, positive, negative = s[anchor], positive[anchor], negative[anchor]
        if len(anchor) == 0:
            continue
        # argmax of booleans: the first of the extremes
        least = s.masked_fill(~positive, math.inf)
        most = s.masked_fill(~negative, -math.inf)
        hardest_positive = (least == least.amin(1, keepdim=True)).int().argmax(1)
        hardest_negative = (most == most.amax(1, keepdim=True)).int().argmax(1)
        found.append((anchor + begin, hardest_positive, hardest_negative))
    return _joined(found, 3, embeddings)


@torch.no_grad()
def semihard_mine(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every positive pair with the most similar negative that is less similar than the positive, where there is one.

    From "FaceNet: A Unified Embedding for Face Recognition and Clustering" (Schroff et al., 2015).

    Args:
        embeddings: (N, d), float64 (on a CPU), float32, bfloat16 or float16.
        labels: (N,) integers.
        ref_embeddings: (M, d) of the same dtype: pairs are then formed with these, and none is left out.
        ref_labels: (M,) integers.
        normalize: cosine similarities; False takes the embeddings as they are.

    Returns:
        anchors, positives and negatives, int64 vectors ordered by anchor and positive; among equal negatives the lowest
        index. On a GPU their length makes the call wait for the device.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> anchor, positive, negative = tilewise.semihard_mine(torch.randn(8, 16), torch.arange(8) // 2)
    """
    found = []
    for begin, s, positive, negative in _chunks(
        "semihard_mine", embeddings, labels, ref_embeddings, ref_labels, normalize
    ):
        if s.shape[1] == 0:
            break
        # Ascending; of equal values the first in the row comes last, where a search from the right finds it.
        ordered, columns = s.masked_fill(~negative, -math.inf).flip(1).sort(dim=1, stable=True)
        anchor, pair = positive.nonzero(as_tuple=True)
        place = torch.searchsorted(ordered, s)[anchor, pair] - 1  # the last negative below the positive
        found_one = (place >= 0) & (ordered[anchor, place.clamp(min=0)] > -math.inf)
        chosen = s.shape[1] - 1 - columns[anchor, place.clamp(min=0)]
        found.append((anchor[found_one] + begin, pair[found_one], chosen[found_one]))
    return _joined(found, 3, embeddings)
