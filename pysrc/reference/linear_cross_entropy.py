"""Cross entropy of a linear layer's logits, which are held."""

import torch
from torch import Tensor

from tilewise.reference.cross_entropy import OPS as CROSS_ENTROPY
from tilewise.reference.cross_entropy import cross_entropy


def logits_of(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """(N, V), rounded to the type of the input as F.linear does."""
    return torch.nn.functional.linear(input, linear_weight, linear_bias)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    **options,
) -> Tensor:
    """cross_entropy(input @ linear_weight^T + linear_bias, target)."""
    options.pop("chunk_bytes", None)
    logits = logits_of(input, linear_weight, linear_bias)
    return cross_entropy(logits, target, weight, return_stats=False, **options).loss


def gradients(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    **options,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, linear_weight and linear_bias as wanted, differentiable themselves."""
    wanted = (input_grad, weight_grad, bias_grad and linear_bias is not None)
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() if t is not None and not t.requires_grad else t
            for t in (input, linear_weight, linear_bias)
        ]
        x, w, b = leaves
        loss = linear_cross_entropy(x, w, target, b, weight, **options)
        chosen = [leaf for leaf, wish in zip(leaves, wanted, strict=True) if wish]
        found = iter(torch.autograd.grad(loss, chosen, grad_loss, create_graph=True))
    return tuple(next(found) if wish else None for wish in wanted)


# Below autograd: from the formulas of cross_entropy, and of a linear layer.


def _forward(
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    *,
    chunk_bytes,
    form_input_grad,
    form_weight_grad,
    form_bias_grad,
    **options,
):
    logits = logits_of(input, linear_weight, linear_bias)
    loss, state = CROSS_ENTROPY["cross_entropy"](logits, target, weight, **options)
    wanted = (form_input_grad, form_weight_grad, form_bias_grad and linear_bias is not None)
    if options["reduction"] == "none" or input.dtype == torch.float16:
        wanted = (False, False, False)
    saved = (input, linear_weight, target, linear_bias, weight, state)
    summed = options | {"reduction": "sum"}
    return loss, state, *_products(state.new_ones(()), *saved, wanted, summed)


def _products(grad_loss, input, linear_weight, target, linear_bias, weight, state, wanted, options):
    empty = [input.new_empty(0) for _ in wanted]
    if not any(wanted):
        return empty
    logits = logits_of(input, linear_weight, linear_bias)
    saved = (logits, target, weight, None, None, state)
    g = CROSS_ENTROPY["cross_entropy_backward"](grad_loss, None, None, *saved, **options, logit_scale=1.0)
    found = (lambda: g @ linear_weight, lambda: g.t() @ input, lambda: g.sum(0))
    return [f() if wish else e for f, e, wish in zip(found, empty, wanted, strict=True)]


def _backward(*tensors, input_grad, weight_grad, bias_grad, chunk_bytes, **options):
    bias = tensors[4] is not None
    return tuple(_products(*tensors, (input_grad, weight_grad, bias_grad and bias), options))


OPS = {"linear_cross_entropy": _forward, "linear_cross_entropy_backward": _backward}
