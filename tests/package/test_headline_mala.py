"""The mala headline measures what it says: the same layers, times, and weights that sharpen or do not."""

import pytest
import torch
from bench_modules import bench_modules

headline, case, report, results = bench_modules("headlines.mala", "cases.mala", "report", "results")


@pytest.mark.parametrize("causal", [False, True])
def test_plain_linear_attention(causal):
    q, k, v = torch.randn(3, 1, 2, 7, 4).unbind()
    weights = case.phi(q) @ case.phi(k).transpose(-1, -2)
    weights = weights.tril() if causal else weights
    expected = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(headline.linear(q, k, v, causal), expected, rtol=1e-4, atol=1e-5)


def test_eager_mala_is_ours():
    q, k, v = torch.randn(3, 1, 2, 7, 4).unbind()
    torch.testing.assert_close(headline.ours(q, k, v, False), case.composition(q, k, v), rtol=1e-4, atol=1e-4)


def test_sharpness():
    rows = {(row["attention"], row["scale"]): row["effective_keys"] for row in headline.sharpness()}
    ratio = {name: rows[name, 16.0] / rows[name, 0.25] for name in headline.ATTENTIONS}
    assert ratio["softmax"] < 0.1 and ratio["mala"] < 0.98 and ratio["plain linear"] > ratio["mala"]


def test_quick_headline_end_to_end(tmp_path):
    pytest.importorskip("sklearn")
    assert headline.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "quick")]) == 0
    (files,) = results.load(tmp_path).values()
    content = files["headline_mala"]
    assert {row["attention"] for row in content["digits"]} == set(headline.ATTENTIONS)
    assert all(0 <= row["accuracy"] <= 1 and row["median_ms"] > 0 for row in content["digits"])
    assert all(1 < row["perplexity"] < 500 for row in content["text"])
    assert len(content["cost"]) == 10 and all(row["median_ms"] > 0 for row in content["cost"])
    page = report.write({"quick": files}, tmp_path / "index.html").read_text()
    assert "Effective keys" in page and page.count("<td>mala</td>") == 1 and "http" not in page
