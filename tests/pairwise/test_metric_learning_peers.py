"""Against pytorch-metric-learning in float64: the same losses, the same mined pairs, and each feeding the other."""

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import NATIVE_CPU

import tilewise

peer = pytest.importorskip("pytorch_metric_learning", reason="the peer is a benchmark requirement")
from pytorch_metric_learning import distances, losses, miners, reducers  # noqa: E402

pytestmark = pytest.mark.skipif(not NATIVE_CPU, reason="float64 belongs to the CPU kernels and the reference")

LABELS = {
    "ordinary": [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4],
    "anchors without positives": [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 8],
    "one class": [0] * 12,
    "all distinct": list(range(12)),
    "two classes": [0, 1] * 6,
}


def embeddings(kind="random"):
    torch.manual_seed(0)
    x = torch.randn(12, 5, dtype=torch.float64)
    if kind == "duplicates":
        x[3], x[7], x[8] = x[0], x[1], x[1]
    if kind == "ties":
        x = torch.nn.functional.one_hot(torch.arange(12) % 4, 5).double()
    return x.requires_grad_()


def both(ours, theirs, x):
    results = []
    for function in (ours, theirs):
        value = function(x)
        results.append((value.detach(), torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)[0]))
    return results


@pytest.fixture(params=LABELS)
def labels(request):
    return torch.tensor(LABELS[request.param])


@pytest.mark.parametrize("kind", ["random", "duplicates", "ties"])
def test_mined_pairs(labels, kind):
    x = embeddings(kind)
    found = tilewise.multi_similarity_mine(x, labels, epsilon=0.1)
    expected = miners.MultiSimilarityMiner(epsilon=0.1)(x.detach(), labels)
    assert len(found) == 4
    for i in (0, 2):
        ours = set(zip(found[i].tolist(), found[i + 1].tolist(), strict=True))
        assert ours == set(zip(expected[i].tolist(), expected[i + 1].tolist(), strict=True))
        assert len(ours) == len(found[i])


@pytest.mark.parametrize("kind", ["random", "duplicates"])
def test_multi_similarity_loss_with_mining(labels, kind):
    loss, miner = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), miners.MultiSimilarityMiner(epsilon=0.1)
    ours, theirs = both(
        lambda x: tilewise.multi_similarity_loss(x, labels),
        lambda x: loss(x, labels, miner(x, labels)),
        embeddings(kind),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "duplicates", "ties"])
def test_multi_similarity_loss_of_all_pairs(labels, kind):
    loss = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    ours, theirs = both(
        lambda x: tilewise.multi_similarity_loss(x, labels, epsilon=None), lambda x: loss(x, labels), embeddings(kind)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_with_references(labels):
    x, other = embeddings(), embeddings("duplicates").detach().flip(0)
    loss, miner = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), miners.MultiSimilarityMiner(epsilon=0.1)
    ref_labels = labels.roll(3)
    ours, theirs = both(
        lambda x: tilewise.multi_similarity_loss(x, labels, ref_embeddings=other, ref_labels=ref_labels),
        lambda x: loss(x, labels, miner(x, labels, other, ref_labels), other, ref_labels),
        x,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_supcon(labels):
    """But for a batch of one class, whose loss they call 0."""
    if labels.unique().numel() == 1:
        labels = torch.tensor([0] * 11 + [1])
    loss = losses.SupConLoss(temperature=0.1, reducer=reducers.MeanReducer())
    ours, theirs = both(lambda x: tilewise.supcon(x, labels), lambda x: loss(x, labels), embeddings())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "duplicates", "ties"])
def test_circle(labels, kind):
    loss = losses.CircleLoss(m=0.25, gamma=32, reducer=reducers.MeanReducer())
    weighting = tilewise.weighting.Circle(margin=0.25, gamma=32)
    ours, theirs = both(
        lambda x: tilewise.pair_weighted_loss(x, labels, weighting), lambda x: loss(x, labels), embeddings(kind)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_nt_xent():
    loss = losses.NTXentLoss(temperature=0.5)
    pairs = torch.arange(6).repeat(2)
    ours, theirs = both(lambda x: tilewise.nt_xent(x[:6], x[6:]), lambda x: loss(x, pairs), embeddings())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_their_miner_feeds_our_loss(labels):
    """Four vectors of pairs from one miner, three of triplets from another."""
    ours, loss = tilewise.nn.MultiSimilarityLoss(), losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    for miner in (miners.MultiSimilarityMiner(epsilon=0.1), miners.TripletMarginMiner(margin=0.2)):
        x = embeddings()
        pairs = miner(x, labels)
        results = both(lambda x, p=pairs: ours(x, labels, p), lambda x, p=pairs: loss(x, labels, p), x)
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_positional_parameters_and_repeated_pairs(labels):
    """As theirs: the module's first three parameters, and a pair named twice counts once."""
    ours, loss = tilewise.nn.MultiSimilarityLoss(1.0, 20.0, 0.3), losses.MultiSimilarityLoss(1.0, 20.0, 0.3)
    x = embeddings()
    pairs = tuple(t.repeat(2) for t in miners.MultiSimilarityMiner(epsilon=0.1)(x, labels))
    results = both(lambda x: ours(x, labels, pairs), lambda x: loss(x, labels, pairs), x)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_our_miner_feeds_their_losses(labels):
    miner, theirs = tilewise.nn.MultiSimilarityMiner(), miners.MultiSimilarityMiner(epsilon=0.1)
    for loss in (losses.MultiSimilarityLoss(), losses.ContrastiveLoss(distance=distances.CosineSimilarity())):
        x = embeddings()
        results = both(
            lambda x, f=loss: f(x, labels, miner(x, labels)), lambda x, f=loss: f(x, labels, theirs(x, labels)), x
        )
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_batch_hard(labels):
    x = embeddings()
    found = tilewise.batch_hard_mine(x, labels)
    expected = miners.BatchHardMiner(distance=distances.CosineSimilarity())(x.detach(), labels)
    assert [t.tolist() for t in found] == [t.tolist() for t in expected]
