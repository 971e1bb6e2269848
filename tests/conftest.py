"""Marks: `contract` for tests that TILEWISE_BACKEND turns to another backend, `cuda` for those that need a GPU."""

from collections import Counter

import contract
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="of each test's cases only each N-th")


def pytest_collection_modifyitems(config, items):
    seen, kept, left_out = Counter(), [], []
    for item in items:
        if getattr(item.module, "contract", None) is contract:
            item.add_marker(pytest.mark.contract)
            if contract.DEVICE == "cuda":
                item.add_marker(pytest.mark.cuda)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (make gpu)"))
        # A test of several operators is a test of each.
        test = item.nodeid.partition("[")[0], item.callspec.params.get("op") if hasattr(item, "callspec") else None
        (left_out if seen[test] % config.getoption("every") else kept).append(item)
        seen[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
