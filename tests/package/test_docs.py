"""Every example in the public docstrings and in the README runs and gives what it says."""

import doctest
import re
from pathlib import Path

import pytest

import tilewise

README = Path(__file__).resolve().parents[2] / "README.md"
DOCUMENTED = (
    "backend",
    "batch_hard_mine",
    "clip_loss",
    "cross_entropy",
    "info_nce",
    "linear_cross_entropy",
    "linear_spherical_softmax_loss",
    "linear_taylor_softmax_loss",
    "linear_z_loss",
    "mala",
    "monge_gap",
    "multi_similarity_loss",
    "multi_similarity_mine",
    "nt_xent",
    "pair_weighted_loss",
    "semihard_mine",
    "siglip_loss",
    "simplex_topk",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_knopp",
    "sinkhorn_points",
    "sparse_ot",
    "sparse_ot_points",
    "sparse_ot_router",
    "spherical_softmax_loss",
    "supcon",
    "taylor_softmax_loss",
    "wta_crs_linear",
    "wta_crs_matmul",
    "wta_crs_sample",
    "z_loss",
)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_example(name):
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(tilewise, name), name, globs={})
    assert test.examples, f"tilewise.{name} shows no example"
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


@pytest.mark.parametrize("name", ["FactoredSphericalOutput", "SampledGroup", "WTACRSLinear", "convert_linear"])
def test_docstring_example_of_a_module(name):
    test = doctest.DocTestFinder(recurse=False).find(getattr(tilewise.nn, name), name, globs={})[0]
    assert test.examples and doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


def test_every_public_function_is_documented():
    results = {"CrossEntropyStats", "Routing", "RowSample", "SinkhornResult", "SparseOTResult", "TransportLoss"}
    functions = {name for name in tilewise.__all__ if callable(getattr(tilewise, name))} - results
    assert functions == set(DOCUMENTED)


@pytest.mark.skipif(not README.exists(), reason="the README is not part of an installed package")
def test_readme_example(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    namespace = {}
    exec(code.replace("2048, 32000", "64, 1000").replace("32000, (2048,)", "1000, (64,)"), namespace)
    assert 6 < namespace["loss"].item() < 9
    entropy, correct = (float(number) for number in re.findall(r"tensor\(([\d.]+)", capsys.readouterr().out))
    assert 5 < entropy < 7 and correct < 0.1
