"""Derivatives that many operators have alike: forward mode from the backward, second ones composed, refusals."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.ops import register, schema


class _AsBackward:
    """Stands for the context of a backward that runs in forward mode."""

    def __init__(self, ctx, needs_input_grad: tuple[bool, ...]):
        self.__dict__.update(ctx.__dict__)
        self.saved_tensors, self.needs_input_grad = ctx.saved_tensors, needs_input_grad


def of_losses(op: str, backward: Callable, by_row: tuple[int, ...] = ()) -> Callable:
    """The jvp of losses from their backward: the product of gradient and tangent, of all of a reduced loss, of each row
    of losses of rows.

    Args:
        by_row: inputs of which row i enters only loss i; in the others losses of rows have no forward mode.
    """

    def jvp(ctx, *tangents):
        needed = tuple(isinstance(t, Tensor) for t in tangents)
        found = [None] * len(ctx.results)
        for place, (shape, dtype, device) in enumerate(ctx.results):
            if 0 in shape:
                continue
            if len(shape) > 0 and (others := [i for i, need in enumerate(needed) if need and i not in by_row]):
                name = schema.schema_of(op)[others[0]].name
                raise RuntimeError(
                    f"tilewise.{op}: no forward mode (torch.func.jvp, jacfwd) of losses of rows in {name}; "
                    "reverse mode has it, and a reduced loss"
                )
            grads = [None] * len(ctx.results)
            grads[place] = torch.ones(shape, dtype=dtype, device=device)
            gradients = backward(_AsBackward(ctx, needed), *grads)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            for gradient, tangent in zip(gradients, tangents, strict=False):
                if isinstance(tangent, Tensor) and gradient is not None:
                    product = gradient.to(dtype) * tangent
                    part = product.sum() if len(shape) == 0 else product.reshape(*shape, -1).sum(1)
                    found[place] = part if found[place] is None else found[place] + part
        return found[0] if len(found) == 1 else tuple(found)

    return jvp


def _keep_nothing(ctx, inputs, options, output) -> None:
    pass


def refuse_derivative(op: str, why: str, of: str | None = None) -> None:
    """An operator without a derivative, of the function that a user knows."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"tilewise.{of or op}: {why}")

    register.autograd(op, refuse, _keep_nothing, refuse)


def refuse_second(op: str, of: str) -> None:
    """An operator of a backward, whose own derivative is asked for."""
    refuse_derivative(op, "expected one differentiation, got a second: it cannot be differentiated twice", of)


def second(op: str, formula: Callable) -> None:
    """An operator of a backward that is differentiated through the same gradients composed of PyTorch operations.

    formula: of the operator's arguments; a gradient that is not wanted is None.
    """

    def keep(ctx, inputs, options, output):
        ctx.save_for_backward(*inputs)
        ctx.options = options

    def backward(ctx, *grads):
        inputs = list(ctx.saved_tensors)
        places = [i for i, needs in enumerate(ctx.needs_input_grad[: len(inputs)]) if needs]

        def gradients(*differentiated):
            for place, tensor in zip(places, differentiated, strict=True):
                inputs[place] = tensor
            results = formula(*inputs, **ctx.options)
            results = results if isinstance(results, tuple) else (results,)
            return {i: r for i, r in enumerate(results) if r is not None and grads[i] is not None}

        outputs, pull = torch.func.vjp(gradients, *(inputs[i] for i in places))
        found = dict(zip(places, pull({i: grads[i] for i in outputs}), strict=True))
        return tuple(found.get(i) for i in range(len(inputs)))

    register.autograd(op, backward, keep)
