"""torch.ops.tilewise.clip_loss: fake, autograd and the public function."""

from torch import Tensor

from tilewise.ops import derivatives, formed, register
from tilewise.ops.contrastive import check_features
from tilewise.ops.pairwise import check_number, check_pair_reduction, prepared

OP = "clip_loss"
STATE = 5  # numbers of a row (csrc/clip_loss/clip_loss.h), and then the number of rows
_forward, _gradients = map(register.operator, (OP, f"{OP}_backward"))


def clip_loss(image: Tensor, text: Tensor, logit_scale: float | Tensor, *, reduction: str = "mean") -> Tensor:
    r"""CLIP's loss: the mean of InfoNCE from images to texts and from texts to images.

    .. math:: L_i = \frac12 \Bigl(\log \sum_j e^{t s_{ij}} + \log \sum_j e^{t s_{ji}}\Bigr) - t s_{ii}

    From "Learning Transferable Visual Models From Natural Language Supervision" (Radford et al., 2021). Both directions
    come from the same similarities, of which no (N, N) matrix is held.

    Args:
        image: (N, d) features as they are compared (normalise them before), float64 (on a CPU), float32, bfloat16 or
            float16.
        text: (N, d) of the same dtype; text i belongs to image i.
        logit_scale: t, the factor of similarities (the exponential of CLIP's parameter); a tensor gets its gradient.
        reduction: ``"mean"``, ``"sum"``, ``"none"``, or ``"mean_active"`` (here the mean).

    Returns:
        () or (N,) in the dtype of the similarities.

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1).unbind()
        >>> loss = tilewise.clip_loss(image, text, torch.tensor(14.3, requires_grad=True))
    """
    image, text = check_features(OP, image, text)
    scale = check_number(OP, "logit_scale", logit_scale, image)
    check_pair_reduction(OP, reduction)
    image, text = prepared(image, text, normalize=False)
    return _forward(image, text, scale, reduction="mean" if reduction == "mean_active" else reduction)[0]


@register.fake(OP)
def _forward_fake(image, text, logit_scale, *, reduction, **options):
    n = image.shape[0]
    loss = logit_scale.new_empty((n,) if reduction == "none" else ())
    return loss, logit_scale.new_empty(STATE * n + 1)


@register.fake(f"{OP}_backward")
def _backward_fake(image, text, logit_scale, state, grad_loss, *, image_grad, text_grad, **options):
    return tuple(image.new_empty(image.shape if wanted else (0,)) for wanted in (image_grad, text_grad))


def _setup_context(ctx, inputs, options, output):
    ctx.options = options
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad_loss):
    """The gradients of the sum of losses, scaled by what all rows have in common: 16 bits hold them at any N."""
    image, text, scale, state = ctx.saved_tensors
    needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
    by_row = ctx.options["reduction"] == "none"
    of_image = needs_image or not needs_text
    d_image, d_text = _gradients(
        image,
        text,
        scale,
        state,
        grad_loss.contiguous() if by_row else None,
        chunk_bytes=ctx.options["chunk_bytes"],
        image_grad=of_image,
        text_grad=needs_text,
    )
    upstream = None if by_row else grad_loss
    if ctx.options["reduction"] == "mean":
        upstream = grad_loss / max(1, image.shape[0])
    d_scale = None
    if needs_scale:
        d_scale = ((d_image * image) if of_image else (d_text * text)).sum(dtype=scale.dtype)
        d_scale = d_scale if upstream is None else upstream * d_scale
    factor = scale if upstream is None else scale * upstream
    return (
        formed.scaled(d_image, factor) if needs_image else None,
        formed.scaled(d_text, factor) if needs_text else None,
        d_scale,
    )


@register.flops(OP)
def _forward_flops(image, text, logit_scale, *, out_shape, **options) -> int:
    return 2 * image[0] * image[0] * image[1]


@register.flops(f"{OP}_backward")
def _backward_flops(image, *arguments, out_shape, **options) -> int:
    """The similarities again, and a product for each gradient."""
    return 2 * image[0] * image[0] * image[1] * (1 + sum(0 not in gradient for gradient in out_shape))


register.autograd(OP, _backward, _setup_context, derivatives.of_losses(OP, _backward), outputs=(0,))
derivatives.refuse_second(f"{OP}_backward", OP)
