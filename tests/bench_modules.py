"""The modules of bench/, which an installed tilewise is without."""

import importlib
from pathlib import Path

import pytest


def bench_modules(*names: str):
    if not (Path(__file__).resolve().parent.parent / "bench").exists():
        pytest.skip("bench/ is not part of an installed tilewise", allow_module_level=True)
    return map(importlib.import_module, names)
