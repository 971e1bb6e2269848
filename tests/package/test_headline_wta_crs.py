"""The fine-tuning headline measures what it says: labelled sentences, equal gradients, memory that fits."""

import pytest
import torch
from bench_modules import bench_modules

headline, report, results = bench_modules("headlines.wta_crs", "report", "results")


@pytest.fixture(scope="module")
def data():
    return headline.text()


@pytest.fixture(scope="module")
def state(data):
    return headline.learn_words(data, 2)


def test_sentences_have_one_label(data):
    tokens = torch.cat([data.tokens, data.held_tokens])
    labels = torch.cat([data.labels, data.held_labels])
    assert len(tokens) > 1000 and labels.unique().tolist() == list(range(headline.CLASSES))
    assert len(tokens.unique(dim=0)) == len(tokens)
    assert tokens.max() < data.words and not (tokens == headline.MASK).any()


def test_methods_differ_where_they_should(data, state):
    """The same loss for all; checkpointing has the gradients of all rows, a sample those of biases."""
    chosen = torch.arange(8)
    exact = None
    for method in headline.METHODS.values():
        model = headline.model_of(method, state, data)
        loss = headline.loss_of(model, data, chosen)
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        exact = exact or (loss.detach(), found)
        torch.testing.assert_close(loss.detach(), exact[0])
        assert found.keys() == exact[1].keys()
        for name, gradient in found.items():
            sampled = method.ratio is not None and "blocks" in name and gradient.dim() == 2
            assert torch.allclose(gradient, exact[1][name], rtol=1e-3, atol=1e-6) != sampled, name


def test_memory_and_noise(data, state):
    full, sampled, again = (headline.memory(name, state, data, 2) for name in ("full", "WTA 0.1", "checkpointing"))
    assert full["linear"] > 9 * sampled["linear"] and again["linear"] == 0
    assert full["kept"] > sampled["kept"] > again["kept"] and full["peak"] > sampled["peak"] > again["peak"]
    assert full["largest_batch"] == 2
    assert 0 == headline.noise("full", state, data, 1) < headline.noise("WTA 0.3", state, data, 3)
    assert headline.noise("WTA 0.3", state, data, 3) < headline.noise("CRS 0.1", state, data, 3)


def test_quick_headline_end_to_end(tmp_path):
    assert headline.main(["--quick", "--out", str(tmp_path / "quick")]) == 0
    (files,) = results.load(tmp_path).values()
    assert [row["method"] for row in files["headline_wta_crs"]["rows"]] == list(headline.METHODS)
    page = report.write({"quick": files}, tmp_path / "index.html").read_text()
    assert "from a sample of the rows" in page and "http" not in page and 'class="band c1"' in page
