"""The sparse transport headline measures what it says: places served in order, plans, a mixture that learns."""

import itertools

import pytest
import torch
from bench_modules import bench_modules

headline, report, results = bench_modules("headlines.sparse_ot", "report", "results")


def test_places_are_served_in_order():
    """16 tokens and 8 experts of 4 places: all want experts 0 and 1, of which only the first four get them."""
    probabilities = torch.full((16, 8), 0.125)
    routing = headline.first_served(torch.tensor([[0, 1]]).expand(16, 2), probabilities)
    assert routing.load.tolist() == [4, 4, 0, 0, 0, 0, 0, 0]
    assert routing.indices[:2].tolist() == [[0, 1, 2, 3]] * 2 and (routing.weights[2:] == 0).all()


def test_plans_lead_from_linear_to_quadratic():
    pytest.importorskip("scipy")
    rows = headline.plans(12)["rows"]
    values = [row["value"] for row in rows]
    assert all(more >= less - 1e-9 for more, less in itertools.pairwise(values[1:]))
    assert values[0] >= values[1] - 1e-9 and rows[-1]["violation"] < 1e-8 and rows[-1]["margin"] is None


def test_the_mixture_learns_evenly():
    pytest.importorskip("sklearn")
    data = headline.digits()
    found = {router: headline.classify(router, 0, 60, data) for router in headline.ROUTERS}
    assert all(row["accuracy"] > 0.7 for row in found.values())
    assert found["sparse transport"]["uneven"] == 0 < found["Sinkhorn"]["uneven"]


def test_quick_headline_end_to_end(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    assert headline.main(["--quick", "--out", str(tmp_path / "quick")]) == 0
    (files,) = results.load(tmp_path).values()
    assert [row["router"] for row in files["headline_sparse_ot"]["mixtures"]] == list(headline.ROUTERS)
    page = report.write({"quick": files}, tmp_path / "index.html").read_text()
    assert "few entries a column" in page and "http" not in page
