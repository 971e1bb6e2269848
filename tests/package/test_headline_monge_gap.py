"""The Monge gap headline measures what it says: a map that pays too much, and the least that would do."""

import pytest
import torch
from bench_modules import bench_modules

headline, report, results = bench_modules("headlines.monge_gap", "report", "results")


def test_what_a_map_pays():
    """A translation is the best map onto its image; a turn by half pays more than the identity would."""
    pytest.importorskip("scipy")
    moved = headline.judged(lambda x: x + 0.5, headline.disc, headline.ring, "cpu")
    assert moved["paid"] == pytest.approx(0.5, rel=1e-5) and moved["least"] == pytest.approx(0.5, rel=1e-5)
    turned = headline.judged(lambda x: -x, headline.disc, headline.ring, "cpu")
    assert turned["paid"] > 20 * turned["least"]


def test_training_with_the_gap():
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    found = {}
    for name, weight in headline.CONTENDERS.items():
        model, losses = headline.train(headline.disc, headline.ring, 2, weight, 60, "cpu")
        assert losses["fit"][-1] < 0.5 * losses["fit"][0] and len(losses["gap"]) == 60
        found[name] = headline.judged(model, headline.disc, headline.ring, "cpu")
    excess = {name: row["paid"] / row["least"] for name, row in found.items()}
    assert excess["fit and Monge gap"] < 1.1 < excess["fit alone"]


def test_quick_headline_end_to_end(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    assert headline.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "quick")]) == 0
    (files,) = results.load(tmp_path).values()
    content = files["headline_monge_gap"]
    for part in ("shape", "colours"):
        assert [row["contender"] for row in content[part]["rows"]] == list(headline.CONTENDERS)
        assert all(row["divergence"] > 0 and row["step_ms"] > 0 for row in content[part]["rows"])
    page = report.write({"quick": files}, tmp_path / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and "Monge gap" in page and "http" not in page
