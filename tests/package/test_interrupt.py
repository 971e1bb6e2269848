"""Ctrl-C during a long solve, in a process of its own: KeyboardInterrupt soon, and handlers that do not raise change
nothing."""

import signal
import subprocess
import sys
import time

import pytest
from contract import NATIVE_CPU

pytestmark = pytest.mark.skipif(not NATIVE_CPU, reason="on other backends Python is between the iterations")

START = """
import os, signal, sys, threading, time
import torch, tilewise
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us without
torch.manual_seed(0)
matrix = torch.rand(200, 200)
batch, points = torch.rand(32, 16, 16), torch.rand(2, 3000, 3)
endless = {"max_iter": 10**9, "tol": 0.0, "epsilon": 0.01}
kink = {"max_iter": 10**9, "tol": 0.0, "k": 2}
"""
SOLVES = {
    "sinkhorn": "tilewise.sinkhorn(matrix, **endless)",
    "sinkhorn of small problems": "tilewise.sinkhorn(batch, **endless)",
    "sinkhorn of a batch": "tilewise.sinkhorn(torch.rand(8, 90, 90), **endless)",
    "one iteration": "tilewise.sinkhorn_points(*torch.rand(2, 120_000, 8), epsilon=1.0, max_iter=1)",
    "sinkhorn_points": "tilewise.sinkhorn_points(*points, **endless)",
    "sparse_ot_router": "tilewise.sparse_ot_router(torch.randn(2000, 16), 200, steps=10**9)",
    "sparse_ot": "while True: tilewise.sparse_ot(torch.rand(600, 600), **kink)",
    "sparse_ot_points": "while True: tilewise.sparse_ot_points(*torch.rand(2, 600, 2), **kink)",
}


def started(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", START + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("name", SOLVES)
def test_ctrl_c(name):
    child = started(f"print('solving', flush=True)\n{SOLVES[name]}")
    assert child.stdout.readline() == "solving\n"
    time.sleep(1)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    try:
        _, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert error.rstrip().endswith("KeyboardInterrupt"), error


def test_what_a_handler_raises():
    code = """
def handler(*_): raise TimeoutError("of the test")
signal.signal(signal.SIGALRM, handler)
signal.alarm(1)
try: tilewise.sinkhorn(matrix, **endless)
except TimeoutError as error: print("raised", error)
print(int(tilewise.sinkhorn(matrix, epsilon=0.1).n_iter) > 0)
"""
    out, error = started(code).communicate(timeout=60)
    assert out.splitlines() == ["raised of the test", "True"], error


def test_a_handler_that_does_not_raise_changes_nothing():
    code = """
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
options = {"epsilon": 0.01, "tol": 0.0, "max_iter": 1}
began = time.perf_counter()
tilewise.sinkhorn(matrix, **options | {"max_iter": 1000})
options["max_iter"] = int(1000 * max(1.0, 1.5 / (time.perf_counter() - began)))
alone = tilewise.sinkhorn(matrix, **options)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
beside = tilewise.sinkhorn(matrix, **options)
print(seen, torch.equal(alone.f, beside.f), int(alone.n_iter) == int(beside.n_iter) == options["max_iter"])
"""
    out, error = started(code).communicate(timeout=100)
    assert out.split() == ["[1]", "True", "True"], error
