"""Short runs of the fuzzer; `make sanitize` makes a long one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilewise

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / "bench").exists(), reason="bench/ is not part of an installed tilewise")
@pytest.mark.parametrize("mode", [["--sweep"], ["--calls", "700"]], ids=["each_tensor_in_turn", "at_random"])
def test_no_call_crashes_hangs_or_fails_in_an_unclear_way(mode):
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), *mode]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


META_SEED = torch.zeros(1, dtype=torch.int64, device="meta")
TOKENS = torch.randn(1, 2, 5, 4)
FOUND = [  # by long runs
    (
        lambda x: torch.ops.tilewise.mala(*[TOKENS] * 3, causal=True, scale=1.0, eps=1.0, seen=2**63 - 1),
        "expected the keys seen before to be a count below 2\\^62, got 9223372036854775807",
    ),
    (lambda x: torch.ops.tilewise.wta_crs_matmul(x, x, k=3, seed=META_SEED), "expected seed on cpu like x, got meta"),
    (lambda x: tilewise.wta_crs_sample(x, k=3, seed=META_SEED), "expected seed on cpu like x, got meta"),
    (lambda x: tilewise.wta_crs_linear(x, x.int(), k=2), "expected weight to be torch.float32 like x, got torch.int32"),
    (lambda x: torch.ops.tilewise.simplex_topk_backward(None, x.to("meta")), "expected grad to be a tensor, got None"),
]


@pytest.mark.parametrize("call, message", FOUND, ids=lambda value: value if isinstance(value, str) else "")
def test_what_long_runs_found_is_refused_clearly(call, message):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        call(torch.randn(3, 3))


def test_causal_values_without_features():
    assert tilewise.mala(TOKENS, TOKENS, torch.randn(1, 2, 5, 0), causal=True).shape == (1, 2, 5, 0)
