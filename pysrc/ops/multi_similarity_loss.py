"""multi_similarity_loss: the public function."""

import math

from torch import Tensor

from tilewise.ops import rows
from tilewise.ops.pairwise import check_references, pairwise_loss

OP = "multi_similarity_loss"


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-similarity loss with its pair mining, without the (N, N) matrix of similarities.

    For an anchor with similarities s to its positives P (same label, itself left out) and negatives N,

    .. math::
        L = \frac1\alpha \log\Bigl(1 + \sum_{P'} e^{-\alpha (s - base)}\Bigr)
          + \frac1\beta \log\Bigl(1 + \sum_{N'} e^{\beta (s - base)}\Bigr)

    where mining keeps :math:`N' = \{n : s_n + \epsilon > \min_P s\}` and
    :math:`P' = \{p : s_p - \epsilon < \max_N s\}`; an anchor for which either is empty has loss 0. Memory beside inputs
    and gradients is one chunk of rows of the similarities: 4 MiB on a CPU, 128 MiB on a GPU, or 96 rows. For 16-bit
    gradients it is also those of up to 4,096 rows within 512 MiB, and a sum of float32 as large as the references.

    From "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning" (Wang et al., 2019).

    Args:
        embeddings: (N, d), float64 (on a CPU), float32, bfloat16 or float16; similarities are float32 or better.
        labels: (N,) integers.
        ref_embeddings: (M, d) of the same dtype: pairs are then formed with these, and none is left out.
        ref_labels: (M,) integers.
        alpha: sharpness among positives, above 0.
        beta: sharpness among negatives, above 0.
        base: the similarity from which pairs count.
        epsilon: the margin of mining; None keeps all pairs, and anchors with pairs of one kind keep their loss.
        normalize: cosine similarities; False takes the embeddings as they are.
        reduction: ``"mean"`` over all N anchors, ``"mean_active"`` over those with a loss, ``"sum"`` or ``"none"``.

    Returns:
        () or (N,) in the dtype of the similarities.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> embeddings = torch.randn(8, 16, requires_grad=True)
        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        >>> tilewise.multi_similarity_loss(embeddings, labels).backward()
    """
    x, y, x_labels, y_labels, self_offset = check_references(OP, embeddings, labels, ref_embeddings, ref_labels)
    parameters = parameters_of(OP, alpha, beta, base, epsilon)
    return pairwise_loss(
        OP,
        x,
        y,
        x_labels,
        y_labels,
        loss="multi_similarity",
        parameters=parameters,
        self_offset=self_offset,
        normalize=normalize,
        reduction=reduction,
    )


def parameters_of(op: str, alpha: float, beta: float, base: float, epsilon: float | None) -> tuple[float, ...]:
    """The operator's parameters of checked options."""
    return (
        rows.check_positive(op, "alpha", alpha),
        rows.check_positive(op, "beta", beta),
        rows.check_number(op, "base", base),
        math.inf if epsilon is None else rows.check_number(op, "epsilon", epsilon),
    )
