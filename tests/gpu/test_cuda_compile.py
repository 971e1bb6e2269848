"""The kernels of the CUDA library, for every architecture of the wheels: without spills, and within the registers that
their occupancy is planned for. Reads the library; needs no GPU."""

import re
import subprocess

import pytest

from tilewise import loading

# 65536 registers per multiprocessor over the resident threads: 1024 on the plain paths, 512 with probability targets.
# The way back through small transport problems: lines of 64 pairs, in blocks of a warp with 50 KB of shared memory, of
# which a multiprocessor holds four at most, and 4 x 4 pairs, their gradients and 16 potentials in one thread.
LIMITS = {"PlainSoftmax": 64, "RowMoments": 64, "AffineGradient": 64, "reduction": 64, "IvE": 80}
LIMITS |= {"unrolled_kernelINS_5GroupILi64E": 255, "unrolled_kernelINS_6SingleILi4E": 168}
MOST = 128


@pytest.mark.skipif(bool(loading.build_info()["no_cuda_reason"]), reason="the CUDA library is not built here")
def test_no_spills_and_few_registers():
    knobs = pytest.importorskip("triton.knobs", reason="Triton brings cuobjdump")
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(loading.library_path("tilewise_cuda"))]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    architectures = loading.build_info()["cuda_architectures"]
    pattern, kernels = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)"), 0
    for part in report.split("arch = sm_")[1:]:
        arch = re.match(r"\d+", part)[0]
        for name, registers, stack, local in pattern.findall(part):
            assert (stack, local) == ("0", "0"), f"{name} spills on sm_{arch}"
            limit = min([most for kind, most in LIMITS.items() if kind in name], default=MOST)
            assert int(registers) <= limit, f"{name} uses {registers} registers on sm_{arch}, more than {limit}"
            kernels += arch in architectures
    assert kernels >= len(architectures) * 28
