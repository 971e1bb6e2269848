"""The multi-similarity headline measures what it says: recall, equal curves, time and memory, where the peer stops."""

import pytest
import torch
from bench_modules import bench_modules

headline, report, results = bench_modules("headlines.multi_similarity", "report", "results")


def test_recall():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0], [-1.0, 0.0]])
    assert headline.recall_at_1(embeddings, torch.tensor([0, 0, 1, 2, 1])) == pytest.approx(3 / 5)


def test_quick_headline_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.setattr(headline, "MOST_BYTES", 200**2 * headline.PEER_BYTES_PER_PAIR)
    assert headline.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "quick")]) == 0
    (files,) = results.load(tmp_path).values()
    content = files["headline_multi_similarity"]
    ours, theirs, *others = content["accuracy"]["rows"]
    assert (ours["contender"], theirs["contender"]) == (headline.OURS, headline.THEIRS) and len(others) == 2
    for (step, mine), (_, peers) in zip(ours["curve"], theirs["curve"], strict=True):
        assert mine == pytest.approx(peers, abs=0.01), step
    assert ours["curve"][0][0] == 0 and ours["recall"] > 0.5 and ours["median_ms"] > 0
    measured, stopped = content["cost"]["rows"][1], content["cost"]["rows"][3]
    assert measured["median_ms"] > 0 and stopped["reason"] == "would hold about 0 GB"
    page = report.write({"quick": files}, tmp_path / "index.html").read_text()
    assert page.count(f"<td>{headline.OURS}</td>") == 2 and "would hold about 0 GB" in page and "http" not in page
