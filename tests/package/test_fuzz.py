"""Short runs of the fuzzer; `make sanitize` makes a long one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / "bench").exists(), reason="bench/ is not part of an installed tilewise")
@pytest.mark.parametrize("mode", [["--sweep"], ["--calls", "700"]], ids=["each_tensor_in_turn", "at_random"])
def test_no_call_crashes_hangs_or_fails_in_an_unclear_way(mode):
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), *mode]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
