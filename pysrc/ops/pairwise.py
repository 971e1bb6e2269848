"""torch.ops.tilewise.pairwise_loss: fake, autograd, and what the public pairwise losses share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import autocast, derivatives, formed, register, rows
from tilewise.ops.unit_rows import unit_rows

OP = "pairwise_loss"
_forward, _gradients = map(register.operator, (OP, f"{OP}_backward"))
REDUCTIONS = ("none", "sum", "mean", "mean_active")


def cast_embeddings(*embeddings: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast embeddings take its type on a GPU; on a CPU nothing is lost."""
    first = embeddings[0]
    cast = autocast.lower if isinstance(first, Tensor) and first.is_cuda else autocast.widen
    return cast(*embeddings)


def check_embeddings(op: str, name: str, embeddings: Tensor, like: Tensor | None = None, like_name: str = "") -> None:
    """A floating (N, d) matrix; with `like` of its width, dtype and device."""
    rows.check_matrix(op, name, embeddings)
    rows.check_floating(op, name, embeddings)
    if like is None:
        return
    if embeddings.shape[1] != like.shape[1]:
        raise ValueError(
            f"tilewise.{op}: expected {name} to have shape (M, {like.shape[1]}) like {like_name}, "
            f"got {tuple(embeddings.shape)}"
        )
    if embeddings.dtype != like.dtype:
        raise TypeError(f"tilewise.{op}: expected {name} to be {like.dtype} like {like_name}, got {embeddings.dtype}")
    rows.check_device(op, name, embeddings, like, like_name)


def check_labels(op: str, name: str, labels: Tensor, of: Tensor, of_name: str) -> Tensor:
    """One integer label for each embedding, as contiguous int64."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"tilewise.{op}: expected {name} to be a tensor, got {type(labels).__name__}")
    if labels.dtype not in rows.INTEGER:
        raise TypeError(f"tilewise.{op}: expected {name} to hold integers, got {labels.dtype}")
    if labels.shape != of.shape[:1]:
        raise ValueError(f"tilewise.{op}: expected {name} to have shape ({len(of)},), got {tuple(labels.shape)}")
    rows.check_device(op, name, labels, of, of_name)
    return labels.long().contiguous()


def check_number(op: str, name: str, value: float | Tensor, like: Tensor, *, positive: bool = False) -> Tensor:
    """A number or a tensor of one element, which keeps its gradient, as a 0-dim tensor in the type of statistics."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"tilewise.{op}: expected {name} to be a number or a floating tensor of one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        rows.check_device(op, name, value, like, "the embeddings")
        return value.reshape(()).to(statistics_dtype(like))
    wide = statistics_dtype(like)
    most = torch.finfo(wide).max
    number = (
        rows.check_positive(op, name, value, wide)
        if positive
        else rows.check_number(op, name, value, low=-most, high=most)
    )
    return register.as_tensor(number, wide, like.device)


def check_references(op: str, embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None, ref_labels):
    """The embeddings and labels of both sides, and the offset of a row's own column: None between two sets."""
    embeddings, ref_embeddings = cast_embeddings(embeddings, ref_embeddings)
    check_embeddings(op, "embeddings", embeddings)
    labels = check_labels(op, "labels", labels, embeddings, "embeddings")
    if (ref_embeddings is None) != (ref_labels is None):
        missing = "ref_labels" if ref_labels is None else "ref_embeddings"
        raise ValueError(f"tilewise.{op}: expected ref_embeddings and ref_labels together, got no {missing}")
    if ref_embeddings is None:
        return embeddings, embeddings, labels, labels, 0
    check_embeddings(op, "ref_embeddings", ref_embeddings, embeddings, "embeddings")
    ref_labels = check_labels(op, "ref_labels", ref_labels, ref_embeddings, "ref_embeddings")
    return embeddings, ref_embeddings, labels, ref_labels, None


def check_pair_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"tilewise.{op}: expected reduction to be 'none', 'sum', 'mean' or 'mean_active', got {reduction!r}"
        )


def prepared(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """What the operator takes: in the type of the embeddings on a GPU, of at least float32 on a CPU."""
    dtype = x.dtype if x.is_cuda else statistics_dtype(x)

    def of(z: Tensor) -> Tensor:
        return (unit_rows(z) if normalize else z).to(dtype)

    prepared_x = of(x)
    return prepared_x, prepared_x if y is x else of(y)


def _label_match(x_labels: Tensor, y_labels: Tensor, self_offset: int | None) -> tuple[Tensor, Tensor]:
    """The masks (N, M) of positive and of negative pairs; a row and its own column are neither."""
    same = x_labels[:, None] == y_labels
    if self_offset is None:
        return same, ~same
    own = torch.arange(len(x_labels), device=x_labels.device)[:, None] + self_offset
    other = torch.arange(len(y_labels), device=x_labels.device) != own
    return same & other, ~same & other


def similarity_chunks(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, self_offset: int | None, held: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Chunks of rows with about `held` similarities: the rows, their similarities in the type of statistics whatever
    autocast says, and the masks of positive and of negative pairs."""
    wide = statistics_dtype(x)
    columns = y.to(wide).t()
    size = max(1, held // max(1, len(y)))
    for begin in range(0, len(x), size):
        part = slice(begin, begin + size)
        own = None if self_offset is None else self_offset + begin
        with autocast.off(x.device.type):
            similarities = x[part].to(wide) @ columns
        yield part, similarities, *_label_match(x_labels[part], y_labels, own)


def pairwise_loss(
    op: str,
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    *,
    loss: str,
    parameters: tuple[float, ...] = (),
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    self_offset: int | None = None,
    guide_margin: float = 0.0,
    reduction: str = "mean",
    normalize: bool = False,
    chunk_bytes: int = 0,
) -> Tensor:
    """The loss of checked arguments."""
    check_pair_reduction(op, reduction)
    x, y = prepared(x, y, normalize)
    if scale is None:
        scale = torch.ones((), dtype=statistics_dtype(x), device=x.device)
    guide_x, guide_y = (None, None) if guide is None else prepared(*guide, normalize)
    grad = torch.is_grad_enabled()
    return _forward(
        x,
        y,
        x_labels,
        y_labels,
        scale,
        bias,
        guide_x,
        guide_y,
        loss=loss,
        parameters=list(parameters),
        self_offset=self_offset,
        guide_margin=guide_margin,
        reduction=reduction,
        chunk_bytes=chunk_bytes,
        form_x_grad=grad and (x.requires_grad or scale.requires_grad),
        form_y_grad=grad and y.requires_grad,
        form_bias_grad=grad and bias is not None and bias.requires_grad,
    )[0]


FORMED = ("form_x_grad", "form_y_grad", "form_bias_grad")
WANTED = ("x_grad", "y_grad", "bias_grad")


def _gradient_shapes(x: Tensor, y: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wanted[0] else (0,)),
        y.new_empty(y.shape if wanted[1] else (0,)),
        x.new_empty(x.shape[:1] if any(wanted) else (0,), dtype=statistics_dtype(x)),
    )


@register.fake("pairwise_loss")
def _forward_fake(x, y, x_labels, y_labels, scale, *tensors, reduction, **options):
    wanted = [formed.forms_gradients(x, reduction) and options[name] for name in FORMED]
    loss = scale.new_empty(x.shape[:1] if reduction == "none" else ())
    return loss, scale.new_empty(()), *_gradient_shapes(x, y, wanted)


@register.fake("pairwise_loss_backward")
def _backward_fake(grad_loss, x, y, *tensors, **options):
    return _gradient_shapes(x, y, [options[name] for name in WANTED])


def _setup_context(ctx, inputs, options, output):
    _, total, *gradients = output
    asked = [options.pop(name) for name in FORMED]
    ctx.options = options
    formed.keep(ctx, inputs[0], gradients, asked)
    ctx.save_for_backward(*inputs, total)


def _backward(ctx, grad_loss):
    *inputs, total = ctx.saved_tensors
    x, _, _, _, scale, bias, *_ = inputs
    needs_x, needs_y, _, _, needs_scale, needs_bias, *_ = ctx.needs_input_grad
    wanted = [needs_x or needs_scale, needs_y, bias is not None and needs_bias]
    gradients = formed.take(ctx, wanted)
    upstream = None
    if gradients is not None:
        upstream = grad_loss
        if ctx.options["reduction"] == "mean":
            upstream = grad_loss / max(1, x.shape[0])
        if ctx.options["reduction"] == "mean_active":
            upstream = grad_loss / total.clamp(min=1)
    else:
        needs = dict(zip(WANTED, wanted, strict=True))
        gradients = _gradients(grad_loss, *inputs, total, **ctx.options, **needs)
    dx, dy, dbias = gradients
    factor = scale if upstream is None else scale * upstream
    d_scale = (dx * x).sum(dtype=scale.dtype) if needs_scale else None
    d_bias = dbias.sum() if wanted[2] else None
    if upstream is not None:
        d_scale, d_bias = (None if d is None else upstream * d for d in (d_scale, d_bias))
    d_x = formed.scaled(dx, factor) if needs_x else None
    d_y = formed.scaled(dy, factor) if needs_y else None
    return d_x, d_y, None, None, d_scale, d_bias, None, None


@register.flops(OP)
def _forward_flops(x, y, x_labels, y_labels, scale, bias=None, guide_x=None, *_, out_shape, **options) -> int:
    return _products(x, y, guide_x, *out_shape[2:4])


@register.flops(f"{OP}_backward")
def _backward_flops(grad_loss, x, y, x_labels, y_labels, scale, bias, guide_x, *_, out_shape, **options) -> int:
    return _products(x, y, guide_x, *out_shape[:2])


def _products(x, y, guide_x, *gradients) -> int:
    """The similarities, those of a guide, and a product for each gradient of embeddings that is formed."""
    (n, d), (m, _) = x, y
    of_guide = 0 if guide_x is None else guide_x[1]
    return 2 * n * m * (of_guide + d * (1 + sum(0 not in gradient for gradient in gradients)))


register.autograd(OP, _backward, _setup_context, derivatives.of_losses(OP, _backward, by_row=(0,)), outputs=(0,))
derivatives.refuse_second(f"{OP}_backward", OP)
