"""Marks: `contract` for tests that TILEWISE_BACKEND turns to another backend, `cuda` for those that need a GPU."""

import contract
import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item.module, "contract", None) is contract:
            item.add_marker(pytest.mark.contract)
            if contract.DEVICE == "cuda":
                item.add_marker(pytest.mark.cuda)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (make gpu)"))
