"""Rows whose probability is nearly all at the target: loss and gradient are as small as the rest, and as exact."""

import math

import contract
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED

import tilewise

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="PyTorch's own sums in float32 lose what is asked here")

DOUBTS = torch.tensor([10.0**-k for k in range(2, 9) for _ in range(3)])  # 1 - p at the target, give or take


def places(v: int) -> torch.Tensor:
    return torch.tensor([0, v // 2, v - 1]).repeat(7)


def truth(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and their gradients in float64, without the 1 of the target in a sum."""
    index = target[:, None]
    odds = (logits.double() - logits.double().gather(1, index)).exp().scatter(1, index, 0)
    others = odds.sum(1, keepdim=True)
    return others.log1p()[:, 0], odds.scatter(1, index, -others) / (1 + others)


@pytest.mark.parametrize("v", [10, 1000] + ([] if INTERPRETED else [32000, 50257]))
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(v, soft):
    torch.manual_seed(0)
    target = places(v)
    logits, index = torch.rand(len(target), v), target[:, None]
    others = logits.double().exp().scatter(1, index, 0).sum(1)
    logits.scatter_(1, index, (others * (1 - DOUBTS) / DOUBTS).log().float()[:, None])
    classes = torch.nn.functional.one_hot(target, v).float() if soft else target
    loss, gradient = contract.value_and_gradient(
        tilewise.cross_entropy, logits.to(DEVICE), classes.to(DEVICE), reduction="none"
    )
    expected, slope = truth(logits, target)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-5, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("v", [10, 1000] + ([] if INTERPRETED else [32000]))
def test_linear_cross_entropy(v, reduction):
    """The input of a row picks one feature, so that products are exact."""
    target, rows = places(v), torch.arange(21)
    weight = torch.zeros(v, 21)
    weight[target, rows] = ((v - 1) * (1 - DOUBTS) / DOUBTS).log()
    x, w = torch.eye(21, device=DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()
    loss = tilewise.linear_cross_entropy(x, w, target.to(DEVICE), reduction=reduction)
    dx, dw = (g.cpu().double() for g in torch.autograd.grad(loss.sum(), (x, w)))
    expected, slope = truth(weight.t(), target)
    expected = expected.sum() if reduction == "sum" else expected
    torch.testing.assert_close(loss.detach().cpu().double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(dw, slope.t(), rtol=2e-5, atol=0)
    torch.testing.assert_close(dx.diag(), (slope * weight.t().double()).sum(1), rtol=2e-5, atol=0)


def test_a_tied_maximum_is_among_the_others():
    """n equal maxima: the loss is log n, however many tiles and lanes they lie in."""
    for v, tied in [(7, [1, 5]), (1500, [0, 1, 8, 1499]), (5000, [3, 1024, 4999])]:
        logits = torch.full((1, v), -60.0, device=DEVICE)
        logits[0, tied] = 30.0
        loss, gradient = contract.value_and_gradient(
            tilewise.cross_entropy, logits, torch.tensor(tied[-1:], device=DEVICE)
        )
        assert loss.item() == pytest.approx(math.log(len(tied)), rel=1e-6)
        torch.testing.assert_close(gradient[0, tied].sum(), torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("v", [5, 3000])
def test_what_is_no_number_is_not_hidden(value, v):
    for place in (0, v // 2, v - 1):
        logits = torch.zeros(2, v, device=DEVICE)
        logits[0, place] = value
        loss = tilewise.cross_entropy(logits, torch.tensor([1, 1], device=DEVICE), reduction="none")
        assert loss.isnan().tolist() == [True, False]
