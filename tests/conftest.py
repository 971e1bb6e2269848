"""Marks: `contract` for tests that TILEWISE_BACKEND turns to another backend, `cuda` for those that need a GPU."""

import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import contract
import pytest
import torch

NO_NAME = re.compile(r"tensor\(|\bat 0x")  # xdist's processes must find the same tests


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="of each test's cases only each N-th")
    parser.addoption("--failures", type=Path, metavar="FILE", help="JSON of the failures, written as they come")


def pytest_configure(config):
    if contract.INTERPRETED:
        import interpreter

        interpreter.round_products()
    if config.getoption("--failures") and not hasattr(config, "workerinput"):  # xdist's controller hears of all
        config.pluginmanager.register(Failures(config.getoption("--failures")))
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Replaceable())


def pytest_collection_modifyitems(config, items):
    seen, kept, left_out = Counter(), [], []
    for item in items:
        if NO_NAME.search(item.nodeid):
            raise pytest.UsageError(f"a name that is another one in the next process: {item.nodeid}")
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


class Replaceable:
    """A process of xdist that ends once its GPU context is lost: every later test of it would fail, and xdist starts
    another."""

    def pytest_runtest_logfinish(self):
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


class Failures:
    """What failed and why, in a file that is right at any time: a run may be stopped."""

    def __init__(self, path: Path):
        self.path, self.passed, self.failed, self.written = path, 0, [], 0.0
        self.write("running")

    def write(self, state: str):
        content = {"state": state, "passed": self.passed, "failed": self.failed}
        self.path.write_text(json.dumps(content, indent=1) + "\n")
        self.written = time.monotonic()

    def add(self, report):
        lines = [line for line in report.longreprtext.splitlines() if line.strip()] or ["no reason was given"]
        last = ([line[1:] for line in lines if line.startswith("E ")] or lines)[-1].strip()
        crash = getattr(report.longrepr, "reprcrash", None)
        first = crash.message.partition("\n")[0] if crash else last
        self.failed.append({"test": report.nodeid, "error": first, "last_line": last})
        self.write("running")

    def pytest_collectreport(self, report):
        if report.failed:
            self.add(report)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.add(report)
        elif report.passed and report.when == "call":
            self.passed += 1
            if time.monotonic() - self.written > 5.0:
                self.write("running")

    def pytest_sessionfinish(self):
        self.write("finished")
