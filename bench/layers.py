"""What the cases of output layers share: loss(input, weight, target) that makes its own logits, input @ weight.T."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from case import Case, Contender, spread

BLOCK = 2**24  # logits in float64 that the reference holds at a time


def layer_inputs(rows: int, features: int, classes: int, dtype: torch.dtype, device: str):
    """Logits near N(0, 1); in every eighth row the target is right with p near 0.9.

    More confidence would put its logit above 16, where the spacing of bfloat16 logits alone is an error of 6% in p - 1.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(classes, features, generator=generator, device=device) / math.sqrt(features)
    hidden = torch.randn(rows, features, generator=generator, device=device)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    confident = torch.arange(0, rows, 8, device=device)
    towards = weight[target[confident]]
    missing = math.log(classes) + 3.0 - (hidden[confident] * towards).sum(-1)
    hidden[confident] += (missing / towards.square().sum(-1))[:, None] * towards
    return [hidden.to(dtype), weight.to(dtype)], [target]


def layer_reference(
    row_loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, target: Tensor, checked: int = 64
):
    """Mean loss, and the gradients of some rows of input and weight, in float64 and a block of rows at a time.

    Half of the checked weight rows are spread over the classes, half are classes that occur as targets.
    """
    rows, classes = len(hidden), len(weight)
    weight = weight.detach().double()
    some_rows, some_targets = (spread(rows, count, hidden.device) for count in (checked, checked // 2))
    some_classes = torch.cat([spread(classes, checked // 2, hidden.device), target[some_targets]])
    total, of_hidden, of_weight = 0.0, [], torch.zeros_like(weight[some_classes])
    for block in torch.arange(rows, device=hidden.device).split(max(1, BLOCK // classes)):
        inputs = hidden.detach()[block].double()
        logits = (inputs @ weight.T).requires_grad_()
        losses = row_loss(logits, target[block])
        (gradient,) = torch.autograd.grad(losses.sum() / rows, logits)
        total += losses.sum().item()
        of_hidden.append(gradient[torch.isin(block, some_rows)] @ weight)
        of_weight += gradient[:, some_classes].T @ inputs
    return total / rows, [(some_rows, torch.cat(of_hidden)), (some_classes, of_weight)]


def layer_traffic(rows: int, features: int, classes: int, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads input and weight once; backward reads them again and writes their gradients."""
    read = (rows + classes) * features * dtype.itemsize
    return {"forward": read, "backward": 2 * read, "both": 3 * read}


def layer_case(
    op: str,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    row_loss: Callable[[Tensor, Tensor], Tensor],
    contenders: tuple[list[Contender], dict[str, str]],
    flops: dict[str, int],
    runs: int,
    seconds: float,
) -> Case:
    present, absent = contenders
    return Case(
        op=op,
        shape=size,
        dtype=dtype,
        device=device,
        inputs=partial(layer_inputs, *size, dtype, device),
        reference=partial(layer_reference, row_loss),
        contenders=present,
        absent=absent,
        traffic=layer_traffic(*size, dtype),
        flops=flops | {"both": flops["forward"] + flops["backward"]},
        runs=runs,
        seconds=seconds,
    )
