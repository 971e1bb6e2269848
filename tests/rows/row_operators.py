"""The losses of rows of logits, each with its reference and what a user would write today."""

import torch
import torch.nn.functional as F
from contract import Case, Operator

import tilewise
from tilewise.reference import z_loss as spherical_family
from tilewise.reference.cross_entropy import cross_entropy as reference


def cross_entropy_truth(logits, target, weight=None, *, row_weight=None, **options):
    """From the formula; finite for rows with -inf."""
    return reference(logits, target, weight, row_weight, return_stats=False, **options).loss


def eager_cross_entropy(
    logits,
    target,
    weight=None,
    *,
    row_weight=None,
    lse_square_scale=0.0,
    softcap=None,
    logit_scale=1.0,
    reduction="mean",
    **options,
):
    """The composition of PyTorch operations that a user would write."""
    x = logits * logit_scale if logit_scale != 1 else logits
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    if lse_square_scale == 0 and row_weight is None:
        return F.cross_entropy(x, target, weight, reduction=reduction, **options)
    rows = F.cross_entropy(x, target, weight, reduction="none", **options)
    kept = (
        torch.ones_like(rows) if target.is_floating_point() else (target != options.get("ignore_index", -100)).to(rows)
    )
    rows = rows + lse_square_scale * torch.logsumexp(x, 1) ** 2 * kept
    rows = rows if row_weight is None else rows * row_weight
    if reduction == "none":
        return rows
    share = kept if weight is None or target.is_floating_point() else kept * weight[target.clamp(min=0)]
    return rows.sum() / share.sum() if reduction == "mean" else rows.sum()


def weights(n, v):
    return {"weight": torch.rand(v) + 0.5}


CROSS_ENTROPY = Operator(
    name="cross_entropy",
    call=tilewise.cross_entropy,
    reference=cross_entropy_truth,
    eager=eager_cross_entropy,
    state_per_row=3,
    cases=[
        Case("plain"),
        Case("weight", weights),
        Case("smoothing", lambda n, v: {"label_smoothing": 0.1}),
        Case("weight, smoothing", lambda n, v: weights(n, v) | {"label_smoothing": 0.3}),
        Case("lse square", lambda n, v: {"lse_square_scale": 1e-2}),
        Case("softcap", lambda n, v: {"softcap": 5.0}),
        Case("softcap, scale", lambda n, v: {"softcap": 3.0, "logit_scale": 1.7}),
        Case("row weight", lambda n, v: {"row_weight": torch.rand(n)}),
        Case("all", lambda n, v: weights(n, v) | {"label_smoothing": 0.2, "lse_square_scale": 1e-3, "softcap": 8.0,
                                                  "logit_scale": 0.7, "row_weight": torch.rand(n)}),
        Case("soft", soft=True),
        Case("soft, weight, smoothing", lambda n, v: weights(n, v) | {"label_smoothing": 0.1}, soft=True),
        Case("soft, all", lambda n, v: weights(n, v) | {"label_smoothing": 0.2, "lse_square_scale": 1e-3,
                                                        "softcap": 8.0, "row_weight": torch.rand(n)}, soft=True),
    ],
)  # fmt: skip


def reduced(rows, target, reduction, ignore_index=-100):
    kept = target != ignore_index
    rows = rows.masked_fill(~kept, 0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[reduction]


def eager_z(logits, target, *, a, b, reduction="mean"):
    """Standardise, gather, softplus, as one writes it with PyTorch."""
    o = logits
    z = (o - o.mean(1, keepdim=True)) / o.std(1, keepdim=True, correction=0)
    return reduced(F.softplus(a * (b - z.gather(1, target.clamp(min=0)[:, None])[:, 0])) / a, target, reduction)


def eager_taylor(logits, target, *, reduction="mean"):
    n = 1 + logits + logits.square() / 2
    return reduced(-(n / n.sum(1, keepdim=True)).gather(1, target.clamp(min=0)[:, None])[:, 0].log(), target, reduction)


def eager_spherical(logits, target, *, eps=1e-6, reduction="mean"):
    n = logits.square() + eps
    return reduced(-(n / n.sum(1, keepdim=True)).gather(1, target.clamp(min=0)[:, None])[:, 0].log(), target, reduction)


Z = Operator(
    name="z_loss",
    call=tilewise.z_loss,
    reference=spherical_family.z_loss,
    eager=eager_z,
    cases=[Case("a=1, b=0"), Case("a=3, b=2", lambda n, v: {"a": 3.0, "b": 2.0})],
    state_per_row=4,
    polynomial=True,
    required={"a": 1.0, "b": 0.0},
)
TAYLOR = Operator(
    name="taylor_softmax_loss",
    call=tilewise.taylor_softmax_loss,
    reference=spherical_family.taylor_softmax_loss,
    eager=eager_taylor,
    cases=[Case("plain")],
    state_per_row=4,
    polynomial=True,
)
SPHERICAL = Operator(
    name="spherical_softmax_loss",
    call=tilewise.spherical_softmax_loss,
    reference=spherical_family.spherical_softmax_loss,
    eager=eager_spherical,
    cases=[Case("plain"), Case("eps", lambda n, v: {"eps": 1e-2})],
    state_per_row=4,
    polynomial=True,
)
OPERATORS = [CROSS_ENTROPY, Z, TAYLOR, SPHERICAL]
