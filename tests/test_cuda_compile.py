"""The .cu files compile with nvcc alone, for every architecture of the wheels, without spills and within the registers
that the occupancy of the kernels is planned for. Needs no GPU."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
ARCHITECTURES = (80, 90, 100)
# 65536 registers per multiprocessor over the resident threads: 1024 on the plain paths, 512 with probability targets.
# Small transport problems hold two lines of 64 pairs a thread, in blocks of a warp with 17 KB of shared memory: 9 of
# these fit the multiprocessor of sm_80, whose shared memory ends there, and the registers of sm_90 hold 12.
LIMITS = {"PlainSoftmax": 64, "RowMoments": 64, "AffineGradient": 64, "reduction": 64, "IvE": 80}
LIMITS |= {"small_kernelILi64E": 224, "unrolled_kernelILi64E": 255}
MOST = 128

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc (CUDA toolkit)")


@pytest.fixture(scope="session")
def reports(tmp_path_factory) -> str:
    """What ptxas says about every kernel of every file and architecture."""
    folder = tmp_path_factory.mktemp("cuda")

    def compiled(source: Path) -> str:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
        command = [NVCC, "-std=c++20", "-O3", "-Xptxas=-v", "-Werror=all-warnings", *targets, f"-I{ROOT / 'csrc'}"]
        command += ["-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stderr

    with ThreadPoolExecutor() as pool:
        return "\n".join(pool.map(compiled, SOURCES))


def test_no_spills_and_few_registers(reports):
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    kernels = re.findall(pattern, reports, re.DOTALL)
    assert {int(arch) for _, arch, *_ in kernels} == set(ARCHITECTURES)
    assert len(kernels) >= len(ARCHITECTURES) * 28
    for name, arch, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} spills on sm_{arch}"
        limit = min([most for part, most in LIMITS.items() if part in name], default=MOST)
        assert int(registers) <= limit, f"{name} uses {registers} registers on sm_{arch}, more than {limit}"
