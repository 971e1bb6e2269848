"""The machine code of the CUDA library, for every architecture of the wheels: hot loops within their budgets, and
nothing anywhere that is not meant to be there. Reads the library; needs no GPU."""

import pytest
import sass
import sass_budgets
from sass_budgets import ARCHITECTURES

needs_library = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing())
each_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)

# Doubles are sums whose order is not to show, errors of a whole problem, the schedule of epsilon, and midpoints of
# levels; logits of float64 are read as what they are.
DOUBLES = ["row_reduction", "row_statistics", "merge_parts", "prepare", "decide", "finish", "half_step", "small"]
DOUBLES += ["matrix_half_step", "product_half_step", "sparse_cut", "sparse_long_cut", "sparse_step", "sparse_finish"]
DOUBLES += [f"wta_crs_{part}" for part in ("norms", "sample", "sizes", "weigh", "place", "draw")]
TENSOR_CORES = [
    "product_half_step",
    "mala_sums",
    "mala_forward",
    "mala_query_gradient",
    "mala_key_gradient",
]  # other matrix products are the BLAS's, or not yet there
# Once a call, over rows or columns of a problem, or few numbers of each.
NO_HOT_LOOP = ["merge_parts", "prepare", "decide", "finish", "sparse_begin", "sparse_step", "sparse_accept"]
NO_HOT_LOOP += ["sparse_finish", "small_plan", "small_apply", "short_labels", "clip_merge", "clip_finish"]


def kernels(arch: str):
    if not sass.is_built(arch):
        pytest.skip(f"not built for sm_{arch}")
    return sass.kernels(arch)


def stem(name: str) -> str:
    return name.partition("<")[0].removesuffix("_kernel")


@needs_library
@pytest.mark.skipif(bool(sass.another_compiler()), reason=sass.another_compiler())
@each_architecture
def test_hot_loops_stay_within_their_budgets(arch):
    kernels(arch)
    found = []
    for budget in sass_budgets.budgets():
        for pattern, limits in budget.limits.items():
            of_name = sass_budgets.kernels_of(pattern, arch)
            if not of_name:
                found.append(f"no kernel is called {pattern}")
            for name, code in of_name.items():
                measured = sass_budgets.measured(budget, code)
                faults = sass_budgets.faults(budget, limits[ARCHITECTURES.index(arch)], measured)
                found += [f"{name}, loop with {budget.loop}: {fault}" for fault in faults]
    assert not found, "\n".join([f"sm_{arch}; `make resources` prints all figures", *found])


@needs_library
@each_architecture
def test_kernels_have_what_they_are_meant_to_have(arch):
    codes = kernels(arch)
    local, double, tensor = (
        {stem(name) for name, code in codes.items() if sass.count(code, kind)}
        for kind in (sass.LOCAL, sass.DOUBLE, sass.TENSOR)
    )
    assert local == set()
    assert double == set(DOUBLES)
    assert tensor == set(TENSOR_CORES)


@needs_library
def test_every_kernel_has_a_budget():
    names = set(kernels(ARCHITECTURES[0]))
    patterns = {pattern for budget in sass_budgets.budgets() for pattern in budget.limits}
    with_budget = {name for pattern in patterns for name in sass_budgets.kernels_of(pattern, ARCHITECTURES[0])}
    assert {stem(name) for name in names - with_budget} == set(NO_HOT_LOOP)


# A sum of exponentials, four vectors an iteration; what follows a rare branch lies behind the exit.
LOOP = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x200] ;
        /*0030*/                   FADD R12, R4, R8 ;
        /*0040*/                   MUFU.EX2 R12, R12 ;
        /*0050*/               @P1 BRA 0xa0 ;
        /*0060*/                   FADD R13, R13, R12 ;
        /*0070*/                   IADD3 R2, P2, R2, 0x400, RZ ;
        /*0080*/              @!P0 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   FMUL R13, R13, R14 ;
        /*00b0*/                   FADD R13, R13, R5 ;
        /*00c0*/                   BRA 0x60 ;
"""
BUDGET = """why: an example
loop: 1 MUFU
per: 8 number
memory: 2 LDG.128
in flight: 2
special: 0.125
    1.00    1.00    1.00  example_kernel
"""


def faults_of(text: str) -> list[str]:
    budget = sass_budgets.budget_of(BUDGET)
    return sass_budgets.faults(budget, 1.0, sass_budgets.measured(budget, sass.instructions_of(text)))


def test_loops_are_found_and_measured():
    (loop,) = sass.loops_of(sass.instructions_of(LOOP))
    assert (loop.first, loop.depth, loop.innermost, len(loop.own)) == (0x10, 0, True, 11)
    assert sass.figures_of(loop.shortest) == sass.Figures(8, "2 LDG.128", 2, 1, set())
    assert sass.figures_of(loop.own).instructions == 11
    assert faults_of(LOOP) == []


def test_loops_inside_loops():
    outer, inner = sass.loops_of(sass.instructions_of(LOOP.replace("EXIT ;", "BRA 0x0 ;")))
    assert (outer.first, outer.depth, outer.innermost) == (0x0, 0, False)
    assert (inner.first, inner.depth, inner.innermost) == (0x10, 1, True)
    assert [i.opcode for i in outer.own] == ["S2R", "BRA"]


@pytest.mark.parametrize(
    "before, after, fault",
    [
        ("FADD R12, R4, R8", "STL [R1], R4", "STL in a hot loop"),
        ("FADD R12, R4, R8", "DADD R12, R4, R8", "DADD in a hot loop"),
        ("FADD R12, R4, R8", "HMMA.16816.F32 R12, R4, R8, R12", "HMMA in a hot loop"),
        ("FADD R12, R4, R8", "CALL.REL.NOINC 0xa0", "CALL in a hot loop"),
        ("LDG.E.128.CONSTANT R8,", "LDG.E.U16 R8,", "global memory: 1 LDG.128, 1 LDG.16 in an iteration"),
        ("FADD R13, R13, R12", "MUFU.RCP R13, R12", "0.25 special functions per number, not 0.125"),
        ("[R2.64+0x200]", "[R4.64]", "1 loads in flight, not 2"),
        ("/*0060*/", "/*0058*/ FADD R9, R9, R9 ;\n        /*0060*/", "1.12 instructions per number, not 1.00"),
        ("MUFU.EX2", "FMUL", "no loop with 1 MUFU"),
    ],
)
def test_a_planted_fault_is_found(before, after, fault):
    assert before in LOOP
    said = faults_of(LOOP.replace(before, after))
    assert any(fault in one for one in said), said


def test_a_guarded_call_is_a_jump():
    """sm_80 leaves loops so."""
    loop = LOOP.replace("@!P0 BRA 0x10 ;", "@P0 CALL.REL.NOINC 0xa0 ;").replace("EXIT", "BRA 0x10")
    assert [each.first for each in sass.loops_of(sass.instructions_of(loop))] == [0x10]
