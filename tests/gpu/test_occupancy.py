"""The registers and shared memory of the CUDA library's kernels: none spills, multiprocessors hold as many warps as
planned, and every launch fits every GPU. Reads the library; needs no GPU."""

from fnmatch import fnmatchcase

import emulated
import launches
import pytest
import recorded
import sass
from bench_modules import bench_modules
from multiprocessors import KIB, LEAST_SHARED, PARTS
from occupancy import Launch, Usage, fits, resident_blocks, resident_warps, usages, usages_like, usages_of

needs_library = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing())
BUILT = {arch: part for arch, part in PARTS.items() if sass.is_built(part.code)}


@needs_library
@pytest.mark.skipif(bool(sass.another_compiler()), reason=sass.another_compiler())
@pytest.mark.parametrize("arch", BUILT)
def test_multiprocessors_hold_the_warps_that_designs_rely_on(arch):
    column = {"80": 0, "90": 1, "100": 2}.get(arch, 3)
    few = [
        f"{launch.kernel} with {launch.shared_bytes} bytes: {warps} warps, not {least[column]}"
        for launch, least in launches.CASES
        if (warps := resident_warps(launch, arch)) < least[column]
    ]
    assert not few, "\n".join(few)


@needs_library
@pytest.mark.parametrize("arch", sorted({part.code for part in BUILT.values()}))
def test_no_kernel_spills(arch):
    assert [name for name, usage in usages(arch).items() if usage.local_bytes] == []


# 65536 registers per multiprocessor over the resident threads: 1024 on the plain paths, 512 with probability targets.
# Lanes of problems of 64 x 64 have two lines of 64 pairs, and of their gradients two matrices more.
REGISTERS = {"PlainSoftmax": 64, "RowMoments": 64, "AffineGradient": 64, "reduction": 64, "FullSoftmax*<void>": 80}
REGISTERS |= {"small_kernel<Group<64, *": 224, "unrolled_kernel<Group<64, *": 255}
MOST_REGISTERS = 128


@needs_library
@pytest.mark.parametrize("arch", sorted({part.code for part in BUILT.values()}))
def test_kernels_take_few_registers(arch):
    for name, usage in usages(arch).items():
        limits = [most for pattern, most in REGISTERS.items() if fnmatchcase(name, f"*{pattern}*")]
        assert usage.registers <= min(limits, default=MOST_REGISTERS), f"{name}: {usage.registers} registers"


@needs_library
def test_every_kernel_has_a_launch():
    patterns = [launch.kernel for launch, _ in launches.CASES]
    names = usages(next(iter(BUILT.values())).code)
    assert [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)] == []


@needs_library
@pytest.mark.parametrize("arch", BUILT)
def test_every_launch_has_enough_shared_memory(arch):
    for launch, _ in launches.CASES:
        for usage in usages_like(launch.kernel, PARTS[arch].code):
            assert fits(launch, usage, PARTS[arch]), f"{launch.kernel}: {launch.shared_bytes} bytes"


def test_no_size_needs_more_shared_memory():
    assert launches.mala_bytes(5, 12) <= LEAST_SHARED  # of any number of features and values


@pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")
def test_launches_are_those_of_csrc():
    """Every launch of the benchmarks, as the emulator records them; of short rows blocks are smaller."""
    [traced] = bench_modules("traced")
    for trace in traced.traces(recorded.Recorder(emulated.build())):
        for step in [*trace.forward.steps, *trace.backward.steps]:
            if isinstance(step, recorded.Launch):
                name = step.kernel.replace("> >", ">>")
                of_name = [launch for launch, _ in launches.CASES if fnmatchcase(name, launch.kernel)]
                shapes = {(32 * launch.warps, launch.shared_bytes) for launch in of_name}
                smaller = step.threads < max(threads for threads, _ in shapes)
                assert smaller or (step.threads, step.shared) in shapes, f"{trace.label}: {name}, {step.shared} bytes"
                assert step.shared <= LEAST_SHARED, f"{trace.label}: {name}"


def test_resident_blocks():
    """As NVIDIA's occupancy calculator has them."""
    launch, small = Launch("kernel", (1,), (256,), 0), Launch("kernel", (1,), (32,), 17152)
    blocks = {arch: resident_blocks(launch, Usage(64, 0, 0), part) for arch, part in PARTS.items()}
    assert blocks == {"80": 4, "86": 4, "89": 4, "90": 4, "100": 4, "120": 4}
    assert resident_blocks(launch, Usage(65, 0, 0), PARTS["90"]) == 3
    assert resident_blocks(launch, Usage(32, 0, 0), PARTS["90"]) == 8
    assert resident_blocks(launch, Usage(32, 0, 0), PARTS["86"]) == 6
    assert resident_blocks(launch, Usage(16, 24 * KIB, 0), PARTS["80"]) == 6
    assert resident_blocks(small, Usage(168, 0, 0), PARTS["90"]) == 12
    assert resident_blocks(small, Usage(222, 0, 0), PARTS["80"]) == 8  # two for each scheduler, though memory has nine
    assert resident_blocks(small, Usage(16, 0, 0), PARTS["86"]) == 5


def test_a_block_that_does_not_fit_is_found():
    unrolled = Launch("unrolled_kernel<64>", (1,), (64,), 101_888)  # two problems a block
    assert [arch for arch, part in PARTS.items() if not fits(unrolled, Usage(255, 0, 0), part)] == ["86", "89", "120"]
    assert resident_blocks(unrolled, Usage(255, 0, 0), PARTS["86"]) == 0
    assert fits(unrolled, Usage(255, 0, 0), PARTS["80"]) and not fits(unrolled, Usage(255, 66_000, 0), PARTS["80"])


@needs_library
def test_usages_are_read():
    report = """ Function _ZN8tilewise11scan_kernelEv:
  REG:30 STACK:0 SHARED:1024 LOCAL:16 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert usages_of(report, 0) == {"scan_kernel": Usage(30, 1024, 16)}
    assert usages_of(report, 1024) == {"scan_kernel": Usage(30, 0, 16)}
