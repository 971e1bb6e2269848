"""Pairwise losses where one pair takes nearly all of a sum, and of huge and tiny embeddings, keep their digits."""

import math

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, INTERPRETED, NATIVE_CPU
from pairwise_problems import LOSSES, PUBLIC, call

import tilewise
from tilewise.reference.pairwise import row_losses
from tilewise.testing import relative_error

ROWS = 7  # whose positives leave 10^-2 to 10^-8 to all others
COLUMNS = [500] if INTERPRETED else [500, 32000]
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


def test_confident_pairs_of_a_miner():
    """The module's loss of given pairs keeps small sums beside 1."""
    x = torch.tensor([[20.0], [-20.0]], device=DEVICE)
    pairs = [torch.tensor(i, device=DEVICE) for i in ([], [], [0], [1])]
    module = tilewise.nn.MultiSimilarityLoss(beta=0.0625, base=0.0, normalize=False, reduction="sum")
    pairs = tuple(t.long() for t in pairs)
    expected = math.log1p(math.exp(-400 / 16)) * 16
    assert module(x, torch.arange(2, device=DEVICE), pairs).item() == pytest.approx(expected, rel=1e-5)


MAGNITUDES = [1e-30, 1e-10, 1e15, 1e19, 1e30]
COSINES = [name for name in PUBLIC if name not in ("clip_loss", "siglip_loss", "triplet")]


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", COSINES)
def test_embeddings_of_any_size(name, magnitude):
    """Rows whose squares leave float32 are normalised as float64 has them, beside ordinary rows; gradients too."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 12, 6).unbind()
    x[::2] *= magnitude
    y[1::3] *= magnitude
    labels = torch.arange(12) // 3

    def run(x, y, normalize, **options):
        x, y = x.requires_grad_(), y.requires_grad_()
        u, v = (x, y) if normalize else (F.normalize(t, dim=1) for t in (x, y))
        loss = PUBLIC[name](u, v, labels.to(x.device), normalize=normalize)
        return loss, *torch.autograd.grad(loss, (x, y), allow_unused=True, materialize_grads=True)

    with tilewise.backend("reference"):
        truth = run(x.double(), y.double(), normalize=False)
    found = run(x.to(DEVICE), y.to(DEVICE), normalize=True)
    for mine, exact in zip(found, truth, strict=True):
        for rows in (slice(0, None, 2), slice(1, None, 2)) if mine.dim() else (...,):
            assert relative_error(mine[rows], exact[rows]) < 2e-5


@pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")
def test_float64_embeddings_of_any_size():
    x, labels = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) // 2
    torch.testing.assert_close(tilewise.supcon(1e300 * x, labels), tilewise.supcon(x, labels))


def test_miners_of_any_size():
    x, labels = torch.randn(12, 5, device=DEVICE), torch.arange(12, device=DEVICE) // 3
    for mine in (tilewise.multi_similarity_mine, tilewise.batch_hard_mine, tilewise.semihard_mine):
        assert all(torch.equal(a, b) for a, b in zip(mine(x, labels), mine(2.0**100 * x, labels), strict=True))
