"""linear_cross_entropy: cross entropy of a linear layer's logits, which are never held."""

import torch
from torch import Tensor

from tilewise.formulas.cross_entropy import layer_gradients
from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import autocast, derivatives, formed, register, rows

OP = "linear_cross_entropy"
FEW_BYTES = 512 << 20  # of bfloat16 logits that a GPU holds at once
_forward, _gradients = map(register.operator, (OP, f"{OP}_backward"))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
) -> Tensor:
    r"""Cross entropy between ``input @ linear_weight.T + linear_bias`` and class indices or class probabilities.

    Equal to :func:`tilewise.cross_entropy` of :func:`torch.nn.functional.linear` without ever holding the (N, V)
    logits, and a drop-in for :func:`torch.nn.functional.linear_cross_entropy`, with the differences that
    :func:`tilewise.cross_entropy` has: the loss is float32 or better, and the mean over ignored rows alone is 0.

    A reduced float32 or float64 loss that needs gradients forms them on the way, three matrix products in all. The
    first backward hands them out, scaled by what arrived from above; a further one (``retain_graph=True``), a
    reduction of "none" and 16-bit inputs form the logits a second time, four products, and round 16-bit gradients
    once. On a GPU bfloat16 gradients, too, are formed on the way, and rounded twice, where the logits take at most
    512 MiB (or ``chunk_bytes``) and are held at once, or where only the input needs a gradient. Beside inputs and
    gradients other calls hold one chunk of logits: 1/22 of them, but at least 16 MiB and at most 128 MiB on a CPU, 128
    MiB and 512 MiB on a GPU, there in multiples of 256 rows or classes (64 rows, or 256 classes of all rows, where
    that is more); for 16-bit inputs also two (N, d) sums.

    Args:
        input: (N, d) or (d,), float32, bfloat16, float16 or (on the CPU) float64.
        linear_weight: (V, d) like input; or (V, d_1, ..., d_K, d) with (N, d) input for one loss per position.
        target: class indices, (N,) or () or (N, d_1, ..., d_K), in [0, V) or ``ignore_index``; or class probabilities,
            (N, V) or (V,) or (N, V, d_1, ..., d_K).
        linear_bias: (V,) or (V, d_1, ..., d_K), or None.
        weight: (V,) weight of each class.
        ignore_index: class indices equal to it give loss 0 and gradient 0 and do not count in the mean; None is -100.
            It must not be given with probability targets, unless negative.
        label_smoothing: in [0, 1], the share of the target spread evenly over all V classes.
        lse_square_scale: adds ``lse_square_scale * lse**2`` to each kept row's loss.
        softcap: positive; logits x become ``softcap * tanh(x / softcap)``.
        reduction: "mean", "sum" or "none".
        chunk_bytes: how much of the logits to hold at a time; None chooses from the sizes alone, so that the same call
            gives the same bits whatever memory is free.

    Returns:
        The loss in float32 (float64 for float64 input): shape (), or that of the class indices with reduction "none".
        Under autocast input, weight and bias are cast first, as in :func:`torch.nn.functional.linear`.

    Raises:
        TypeError: a tensor argument is no tensor or of an unsupported dtype.
        ValueError: a shape, a device or an option does not fit; ``target`` or ``weight`` requires a gradient.
        RuntimeError: on the CPU, a class index is out of range (on a GPU that row's loss is NaN).

    Differentiable twice; the second derivative is composed of PyTorch operations that hold (N, V) tensors.

    Reference: Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, ICLR 2025, arXiv 2411.09009.

    Example:
        >>> import torch, tilewise
        >>> hidden = torch.zeros(2, 3, requires_grad=True)
        >>> output = torch.nn.Linear(3, 4, bias=False)
        >>> loss = tilewise.linear_cross_entropy(hidden, output.weight, torch.tensor([1, 3]))
        >>> loss.backward()
        >>> round(loss.item(), 4), output.weight.grad.shape
        (1.3863, torch.Size([4, 3]))
    """
    input, linear_weight, linear_bias = autocast.lower(input, linear_weight, linear_bias)
    _check_layer(input, linear_weight, linear_bias)
    rows.check_reduction(OP, reduction)
    options = {
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "label_smoothing": rows.check_number(OP, "label_smoothing", label_smoothing, low=0, high=1),
        "lse_square_scale": rows.check_number(OP, "lse_square_scale", lse_square_scale),
        "softcap": None if softcap is None else rows.check_positive(OP, "softcap", softcap),
        "chunk_bytes": 0 if chunk_bytes is None else int(rows.check_positive(OP, "chunk_bytes", chunk_bytes)),
    }
    tensors = (input, linear_weight, target, linear_bias, weight)
    if linear_weight.dim() > 2:
        return _positions(*tensors, reduction=reduction, **options)
    if input.dim() == 1:
        target = target.unsqueeze(0) if isinstance(target, Tensor) else target
        loss = _call(input.unsqueeze(0), linear_weight, target, linear_bias, weight, reduction=reduction, **options)[0]
        return loss.squeeze(0) if reduction == "none" else loss
    return _call(*tensors, reduction=reduction, **options)[0]


def _check_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "linear_bias"):
            raise TypeError(f"tilewise.{OP}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if input.dim() not in (1, 2):
        raise ValueError(
            f"tilewise.{OP}: expected input to have shape (N, d) or (d,), got {tuple(input.shape)} "
            "(flatten batch and time into N)"
        )
    if linear_weight.dim() < 2 or linear_weight.shape[0] == 0 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"tilewise.{OP}: expected linear_weight to have shape (V, {input.shape[-1]}), V >= 1, "
            f"got {tuple(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ValueError(
            f"tilewise.{OP}: expected input to have shape (N, d) with a linear_weight of more than two dimensions, "
            f"got {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"tilewise.{OP}: expected linear_bias to have shape {tuple(linear_weight.shape[:-1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    rows.check_floating(OP, "input", input)
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype:
            raise TypeError(f"tilewise.{OP}: expected {name} to be {input.dtype} like input, got {tensor.dtype}")
        rows.check_device(OP, name, tensor, input, "input")


def _call(input, linear_weight, target, linear_bias, weight, **options) -> tuple[Tensor, Tensor]:
    """The loss and the denominator of its mean, for 2-D input and weight."""
    shape = (input.shape[0], linear_weight.shape[0])
    if isinstance(target, Tensor) and target.is_floating_point():
        target = rows.check_probabilities(OP, target, shape, options["ignore_index"], input)
    else:
        target = rows.check_class_index(OP, target, input)
    asked = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (input, linear_weight, linear_bias)]
    if options["reduction"] != "none":
        asked, options["chunk_bytes"] = _formed_on_the_way(input, linear_weight, asked, options["chunk_bytes"])
    weight = rows.check_vector(OP, "weight", weight, shape[1], input)
    options |= dict(zip(FORMED, asked, strict=True))
    loss, state, *_ = _forward(input, linear_weight, target, linear_bias, weight, **options)
    return loss, state[-1]


def _formed_on_the_way(input, linear_weight, asked: list[bool], chunk_bytes: int) -> tuple[list[bool], int]:
    """Of the gradients that are asked for those that the forward is to form, and the bytes of its chunks. Of bfloat16
    none is to be a sum over chunks, which would be one in float32, and on a CPU the backward forms all."""
    if input.dtype != torch.bfloat16:
        return asked, chunk_bytes
    if not _forms_bfloat16(input):
        return [False] * 3, chunk_bytes
    if not (asked[1] or asked[2]):
        return asked, chunk_bytes
    held = chunk_bytes or FEW_BYTES
    logits = input.shape[0] * linear_weight.shape[0] * input.element_size()
    return (asked, held) if _is_known(logits <= held) else ([False] * 3, chunk_bytes)


def _is_known(fact: bool) -> bool:
    """Sizes that change are not guarded for it."""
    if not torch.compiler.is_compiling():
        return fact
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # its import takes half a second

    return statically_known_true(fact)


def _forms_bfloat16(input: Tensor) -> bool:
    return input.device.type != "cpu"


def _positions(input, linear_weight, target, linear_bias, weight, *, reduction, **options) -> Tensor:
    """The K-dimensional loss: one linear layer per position (d_1, ..., d_K), reduced over all of them."""
    if not isinstance(target, Tensor):
        raise TypeError(f"tilewise.{OP}: expected target to be a tensor, got {type(target).__name__}")
    classes, *shape, _ = linear_weight.shape
    soft = target.is_floating_point()
    expected = (len(input), classes, *shape) if soft else (len(input), *shape)
    if target.shape != expected:
        raise ValueError(f"tilewise.{OP}: expected target to have shape {expected}, got {tuple(target.shape)}")
    targets = target.flatten(2 if soft else 1).unbind(-1)
    weights = linear_weight.flatten(1, -2).unbind(1)
    biases = [None] * len(weights) if linear_bias is None else linear_bias.flatten(1).unbind(1)
    each = "none" if reduction == "none" else "sum"
    found = [
        _call(input, w, t, b, weight, reduction=each, **options)
        for w, t, b in zip(weights, targets, biases, strict=True)
    ]
    losses, totals = (torch.stack(values, -1) for values in zip(*found, strict=True))
    if reduction == "none":
        return losses.unflatten(-1, shape)
    if reduction == "sum":
        return losses.sum()
    total = totals.sum()
    return losses.sum() / total.masked_fill(total == 0, 1)  # all ignored: 0, and no 0 / 0 in the gradient


@register.fake("linear_cross_entropy")
def _forward_fake(
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    *,
    reduction,
    form_input_grad,
    form_weight_grad,
    form_bias_grad,
    **options,
):
    n = input.shape[0]
    loss = input.new_empty((n,) if reduction == "none" else (), dtype=statistics_dtype(input))
    reduced = formed.forms_gradients(input, reduction)
    return (
        loss,
        loss.new_empty(3 * n + 1),
        input.new_empty(input.shape if reduced and form_input_grad else (0,)),
        input.new_empty(linear_weight.shape if reduced and form_weight_grad else (0,)),
        input.new_empty(linear_weight.shape[:1] if reduced and form_bias_grad and linear_bias is not None else (0,)),
    )


@register.fake("linear_cross_entropy_backward")
def _backward_fake(grad_loss, input, linear_weight, *tensors, input_grad, weight_grad, bias_grad, **options):
    bias = tensors[1] is not None
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        input.new_empty(linear_weight.shape if weight_grad else (0,)),
        input.new_empty(linear_weight.shape[:1] if bias_grad and bias else (0,)),
    )


FORMED = ("form_input_grad", "form_weight_grad", "form_bias_grad")
WANTED = ("input_grad", "weight_grad", "bias_grad")


def _setup_context(ctx, inputs, options, output):
    _, state, *gradients = output
    asked = [options.pop(name) for name in FORMED]
    ctx.options = options
    formed.keep(ctx, inputs[0], gradients, asked)
    ctx.save_for_backward(*inputs, state)


def _backward(ctx, grad_loss):
    *inputs, state = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = formed.take(ctx, wanted)
    if gradients is not None:
        scale = grad_loss
        if ctx.options["reduction"] == "mean":
            total = state[-1]
            scale = torch.where(total == 0, 0, grad_loss / total)
        gradients = (formed.scaled(g, scale) if wish else None for g, wish in zip(gradients, wanted, strict=True))
    else:
        needs = dict(zip(WANTED, wanted, strict=True))
        gradients = _gradients(grad_loss, *inputs, state, **ctx.options, **needs)
    dx, dw, db = (g if wish else None for g, wish in zip(gradients, wanted, strict=True))
    return dx, dw, None, db, None


@register.flops(OP)
def _forward_flops(input, linear_weight, *_, out_shape, **options) -> int:
    _, _, dx, dw, _ = out_shape
    return _products(input, linear_weight, dx, dw)


@register.flops(f"{OP}_backward")
def _backward_flops(grad_loss, input, linear_weight, *_, out_shape, **options) -> int:
    return _products(input, linear_weight, *out_shape[:2])


def _products(input, linear_weight, *gradients) -> int:
    """The logits, and a product for each gradient of a matrix that is formed."""
    return 2 * input.numel() * linear_weight[0] * (1 + sum(0 not in gradient for gradient in gradients))


register.autograd(OP, _backward, _setup_context, derivatives.of_losses(OP, _backward, by_row=(0,)), outputs=(0,))
derivatives.second(f"{OP}_backward", layer_gradients)
