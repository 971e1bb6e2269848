"""Marks: with a GPU backend chosen every contract test is a `cuda` test; without one, cuda tests say why they rest."""

import contract
import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if contract.DEVICE == "cuda" and contract.__name__ in getattr(item.module, "__dict__", {}):
            item.add_marker(pytest.mark.cuda)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (make gpu)"))
