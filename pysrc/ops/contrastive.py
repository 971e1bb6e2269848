"""The contrastive family: info_nce, nt_xent, supcon, siglip_loss, and what clip_loss checks like the last."""

import torch
from torch import Tensor

from tilewise.ops import rows
from tilewise.ops.pairwise import (
    cast_embeddings,
    check_embeddings,
    check_number,
    check_pair_reduction,
    check_references,
    pairwise_loss,
)


def _inverse_temperature(op: str, temperature: float | Tensor, like: Tensor) -> Tensor:
    return check_number(op, "temperature", temperature, like, positive=True).reciprocal()


def _indices(like: Tensor) -> Tensor:
    return torch.arange(like.shape[0], device=like.device)


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    guide_query: Tensor | None = None,
    guide_key: Tensor | None = None,
    guide_margin: float = 0.0,
) -> Tensor:
    r"""InfoNCE: key i is query i's positive, all other keys are its negatives, and no (N, M) matrix is held.

    .. math:: L_i = \log \sum_j e^{s_{ij} / t} - s_{ii} / t

    From "Representation Learning with Contrastive Predictive Coding" (van den Oord et al., 2018). A guide model's
    embeddings mask false negatives, as in "GISTEmbed" (Solatorio, 2024): key j is no negative of query i where
    guide_ij > guide_ii - guide_margin.

    Args:
        query: (N, d), float64 (on a CPU), float32, bfloat16 or float16; similarities are float32 or better.
        key: (M, d) of the same dtype, M >= N: the keys beyond N are further negatives.
        temperature: t, above 0; a tensor of one element gets its gradient.
        normalize: cosine similarities, of the guide too; False takes the embeddings as they are.
        reduction: ``"mean"``, ``"sum"``, ``"none"``, or ``"mean_active"`` (here the mean).
        guide_query: (N, e) of the same dtype, a constant.
        guide_key: (M, e) of the same dtype, a constant.
        guide_margin: how much less similar than the positive a negative must be for the guide.

    Returns:
        () or (N,) in the dtype of the similarities.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> query, key = torch.randn(2, 8, 16).unbind()
        >>> loss = tilewise.info_nce(query, key, temperature=0.1)
    """
    op = "info_nce"
    query, key, guide_query, guide_key = cast_embeddings(query, key, guide_query, guide_key)
    check_embeddings(op, "query", query)
    check_embeddings(op, "key", key, query, "query")
    if key.shape[0] < query.shape[0]:
        raise ValueError(
            f"tilewise.{op}: expected key to have at least as many rows as query, "
            f"got {tuple(key.shape)} and {tuple(query.shape)}"
        )
    return pairwise_loss(
        op,
        query,
        key,
        _indices(query),
        _indices(key),
        loss="softmax",
        scale=_inverse_temperature(op, temperature, query),
        guide=_checked_guide(op, guide_query, guide_key, query, key),
        guide_margin=rows.check_number(op, "guide_margin", guide_margin),
        normalize=normalize,
        reduction=reduction,
    )


def _checked_guide(op, guide_query, guide_key, query, key) -> tuple[Tensor, Tensor] | None:
    if (guide_query is None) != (guide_key is None):
        missing = "guide_key" if guide_key is None else "guide_query"
        raise ValueError(f"tilewise.{op}: expected guide_query and guide_key together, got no {missing}")
    if guide_query is None:
        return None
    check_embeddings(op, "guide_query", guide_query)
    check_embeddings(op, "guide_key", guide_key, guide_query, "guide_query")
    for name, guide, of_name, of in (
        ("guide_query", guide_query, "query", query),
        ("guide_key", guide_key, "key", key),
    ):
        if guide.shape[0] != of.shape[0]:
            raise ValueError(
                f"tilewise.{op}: expected {name} to have as many rows as {of_name}, "
                f"got {tuple(guide.shape)} and {tuple(of.shape)}"
            )
        if guide.dtype != of.dtype:
            raise TypeError(f"tilewise.{op}: expected {name} to be {of.dtype} like {of_name}, got {guide.dtype}")
        rows.check_device(op, name, guide, of, of_name)
        rows.check_constant(op, name, guide)
    return guide_query, guide_key


def nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    r"""NT-Xent, the loss of SimCLR: each of 2N views against the other 2N - 1, its partner the only positive.

    From "A Simple Framework for Contrastive Learning of Visual Representations" (Chen et al., 2020).

    Args:
        z1: (N, d) one view of N examples, float64 (on a CPU), float32, bfloat16 or float16.
        z2: (N, d) the other view, of the same dtype.
        temperature: above 0; a tensor of one element gets its gradient.
        normalize: cosine similarities; False takes the embeddings as they are.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` (z1's rows, then z2's), or ``"mean_active"`` (here the mean).

    Returns:
        () or (2N,) in the dtype of the similarities.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> z1, z2 = torch.randn(2, 8, 16).unbind()
        >>> loss = tilewise.nt_xent(z1, z2)
    """
    op = "nt_xent"
    z1, z2 = cast_embeddings(z1, z2)
    check_embeddings(op, "z1", z1)
    check_embeddings(op, "z2", z2, z1, "z1")
    if z1.shape != z2.shape:
        raise ValueError(f"tilewise.{op}: expected z2 to have shape {tuple(z1.shape)} like z1, got {tuple(z2.shape)}")
    z = torch.cat([z1, z2])
    labels = _indices(z1).repeat(2)
    return pairwise_loss(
        op,
        z,
        z,
        labels,
        labels,
        loss="softmax",
        scale=_inverse_temperature(op, temperature, z),
        self_offset=0,
        normalize=normalize,
        reduction=reduction,
    )


def supcon(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    decoupled: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Supervised contrastive loss: all embeddings of an anchor's label are its positives P, the anchor left out.

    .. math:: L_i = \log \sum_{j \ne i} e^{s_{ij} / t} - \frac1{|P|} \sum_{p \in P} s_{ip} / t

    From "Supervised Contrastive Learning" (Khosla et al., 2020). Decoupled, a positive competes with the negatives N
    alone ("Decoupled Contrastive Learning", Yeh et al., 2022, keeping the positive in its own denominator):

    .. math:: L_i = \frac1{|P|} \sum_{p \in P} \log \Bigl(1 + \sum_{n \in N} e^{(s_{in} - s_{ip}) / t}\Bigr)

    An anchor without positives has loss 0.

    Args:
        embeddings: (N, d), float64 (on a CPU), float32, bfloat16 or float16; similarities are float32 or better.
        labels: (N,) integers.
        ref_embeddings: (M, d) of the same dtype: pairs are then formed with these, and none is left out.
        ref_labels: (M,) integers.
        temperature: t, above 0; a tensor of one element gets its gradient.
        decoupled: leave the other positives out of a positive's denominator.
        normalize: cosine similarities; False takes the embeddings as they are.
        reduction: ``"mean"`` over all N anchors, ``"mean_active"`` over those with positives, ``"sum"`` or ``"none"``.

    Returns:
        () or (N,) in the dtype of the similarities.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> loss = tilewise.supcon(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
    """
    op = "supcon"
    x, y, x_labels, y_labels, self_offset = check_references(op, embeddings, labels, ref_embeddings, ref_labels)
    return pairwise_loss(
        op,
        x,
        y,
        x_labels,
        y_labels,
        loss="decoupled_softmax" if decoupled else "softmax",
        scale=_inverse_temperature(op, temperature, x),
        self_offset=self_offset,
        normalize=normalize,
        reduction=reduction,
    )


def check_features(op: str, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    image, text = cast_embeddings(image, text)
    check_embeddings(op, "image", image)
    check_embeddings(op, "text", text, image, "image")
    if text.shape != image.shape:
        raise ValueError(
            f"tilewise.{op}: expected text to have shape {tuple(image.shape)} like image, got {tuple(text.shape)}"
        )
    return image, text


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""SigLIP's loss: every pair of an image and a text is a binary decision.

    .. math:: L_i = \sum_j \log(1 + e^{-y_{ij} (t s_{ij} + b)}), \quad y_{ii} = 1, y_{ij} = -1

    From "Sigmoid Loss for Language Image Pre-Training" (Zhai et al., 2023).

    Args:
        image: (N, d) features as they are compared (normalise them before), float64 (on a CPU), float32, bfloat16 or
            float16.
        text: (N, d) of the same dtype; text i belongs to image i.
        logit_scale: t, the factor of similarities; a tensor of one element gets its gradient.
        logit_bias: b; a tensor of one element gets its gradient.
        reduction: ``"mean"`` over images (sums over all pairs, divided by N), ``"sum"``, ``"none"``, or
            ``"mean_active"`` (here the mean).

    Returns:
        () or (N,) in the dtype of the similarities.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1).unbind()
        >>> loss = tilewise.siglip_loss(image, text, 10.0, torch.tensor(-10.0, requires_grad=True))
    """
    op = "siglip_loss"
    image, text = check_features(op, image, text)
    check_pair_reduction(op, reduction)
    index = _indices(image)
    return pairwise_loss(
        op,
        image,
        text,
        index,
        index,
        loss="sigmoid",
        scale=check_number(op, "logit_scale", logit_scale, image),
        bias=check_number(op, "logit_bias", logit_bias, image),
        reduction=reduction,
    )
