"""The Z-loss headline measures what it says: steps, updates, epochs, shares of held-out words."""

import itertools
import math

import pytest
import torch
from bench_modules import bench_modules

headline, measure, report, results = bench_modules("headlines.z_loss", "measure", "report", "results")


def test_frequent_classes_follow_zipf():
    torch.manual_seed(0)
    drawn = headline.frequent(999, 20_000, "cpu")
    assert drawn.min() == 0 and drawn.max() > 900 and drawn.max() < 999
    assert (drawn == 0).float().mean() == pytest.approx(math.log(2) / math.log(1000), rel=0.05)


def test_words_are_numbered_by_frequency():
    seen, held, classes = headline.by_frequency("cpu")
    counts = torch.bincount(seen, minlength=classes)
    assert counts[0] > 1000 and (counts.diff() <= 0).all() and held.max() < classes


def test_dense_layers_of_the_headline_take_an_sgd_step():
    torch.manual_seed(0)
    weight, hidden, target = torch.randn(9, 4), torch.randn(5, 4), torch.tensor([0, 8, 3, 3, 1])
    layer = headline.CONTENDERS["log-softmax, torch"].make(4, 9, weight.clone())
    expected = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ expected.T, target), expected)
    assert headline.step_ms(layer, 0.5, hidden.clone(), target, measure.HostClock()) > 0
    torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * gradient)
    assert layer.top(hidden, 2).tolist() == (hidden @ layer.weight.T).topk(2).indices.tolist()


def test_a_slow_layer_is_dropped(monkeypatch):
    slow = headline.Contender(lambda *_: torch.nn.Identity(), rate=1.0, ours=False, probability=True)
    monkeypatch.setattr(headline, "CONTENDERS", {"slow": slow, "fast": slow})
    times = {"slow": iter([1.0, 11e3]), "fast": itertools.cycle([2.0])}
    turn = itertools.chain(["slow", "fast", "fast", "slow"], itertools.repeat("fast"))
    monkeypatch.setattr(headline, "step_ms", lambda *_: next(times[next(turn)]))
    found = headline.cost((10, 20), 4, 3, words=300, device="cpu")["rows"]
    shown = [(row["contender"], row["classes"], row["runs"], row["epoch_seconds"]) for row in found]
    assert shown == [("slow", 10, 1, 1100.0), ("fast", 10, 7, 0.2), ("fast", 20, 7, 0.2)]


def test_quick_headline_end_to_end(tmp_path):
    pytest.importorskip("tilewise")
    assert headline.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "quick")]) == 0
    (files,) = results.load(tmp_path).values()
    content = files["headline_z_loss"]
    assert len(content["cost"]["rows"]) == 2 * len(headline.CONTENDERS)
    for row in content["cost"]["rows"]:
        assert 0 < row["q25_ms"] <= row["median_ms"] <= row["q75_ms"]
        steps = content["cost"]["words"] / content["cost"]["batch"]
        assert row["epoch_seconds"] == pytest.approx(steps * row["median_ms"] / 1e3)
    for row in content["accuracy"]["rows"]:
        assert row["steps"] > 0 and 0 < row["top1"] < row["top10"] < 1 and 0 < row["held_out_loss"] < 20
    page = report.write({"quick": files}, tmp_path / "index.html").read_text()
    assert all(page.count(f"<td>{name}</td>") == 3 for name in headline.CONTENDERS) and "http" not in page
    assert headline.duration(90.0) == "90.0 s" and headline.duration(7200.0) == "2.00 h"
