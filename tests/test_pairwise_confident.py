"""Pairwise losses where one pair takes nearly all of a sum: float32 keeps the digits of what is left."""

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import DEVICE
from pairwise_problems import LOSSES, call

from tilewise.reference.pairwise import row_losses

ROWS = 7  # whose positives leave 10^-2 to 10^-8 to all others
COLUMNS = [500, 32000]
SOFT = {name: LOSSES[name] for name in ("softmax", "decoupled_softmax", "sigmoid", "log_sum_exp", "lifted_structure")}
SOFT |= {"multi_similarity": [1.0, 1.0, 0.5, 0.25], "multi_similarity of all pairs": [1.0, 1.0, 0.5, float("inf")]}
SOFT |= {"binomial_deviance": [1.0, 1.0, 0.5], "window_log_sum_exp": [1.0, 50.0, -1.0]}


def confident(m: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities (7, m) and each row's positive column. They are multiples of 1/4: products with a unit matrix are
    exact, and only the sums are judged."""
    torch.manual_seed(0)
    s = torch.randint(-12, 13, (ROWS, m)) / 4 if kind == "spread" else torch.full((ROWS, m), -0.25)
    if kind == "one negative":
        s[:, 1:] = -40.0
    left = 10.0 ** -torch.arange(2, 2 + ROWS, dtype=torch.float64)
    positive = 2 + torch.arange(ROWS) * (m // (ROWS + 1))
    s.scatter_(1, positive[:, None], -torch.inf)
    best = torch.logsumexp(s.double(), 1) - left.log()
    return s.scatter_(1, positive[:, None], (4 * best[:, None]).round().float() / 4), positive


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach().cpu().double(), expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("kind", ["equal", "spread", "one negative"])
@pytest.mark.parametrize("m", COLUMNS)
@pytest.mark.parametrize("loss", SOFT)
def test_confident_rows(loss, m, kind, monkeypatch):
    """Loss and gradient of every pair to 1e-4 of themselves."""
    monkeypatch.setitem(LOSSES, loss, SOFT[loss])
    s, positive = confident(m, kind)
    labels = torch.arange(ROWS), torch.full((m,), -1).scatter(0, positive, torch.arange(ROWS))
    arguments = [torch.eye(ROWS), s.t().contiguous(), *labels, torch.tensor(1.0), None, None, None]
    arguments = [t if t is None else t.to(DEVICE) for t in arguments]
    rows = call(arguments, loss=loss, reduction="none")[0]
    gradient = call(arguments, loss=loss, reduction="sum", form_y_grad=True)[3]
    is_positive = labels[0][:, None] == labels[1]
    expected, _, weights = row_losses(
        s.double(), is_positive, ~is_positive, loss.removesuffix(" of all pairs"), SOFT[loss]
    )
    assert_close(rows, expected)
    assert_close(gradient.t(), weights)
