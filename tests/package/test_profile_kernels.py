"""The profiler sees the benchmarks furthest from their bound, or says why it cannot: with an ncu that pretends."""

import json

import pytest
from bench_modules import bench_modules

profile_kernels, results = bench_modules("profile_kernels", "results")


def row(op, contender, ms, shape=(64, 8), ours=True, flops=0):
    """Its bytes take 2 ms at the copy speed below; a matrix product of 10^6 operations 1 ms."""
    return {
        "case": op,
        "shape": list(shape),
        "dtype": "float32",
        "backend": contender.split()[-1],
        "contender": contender,
        "ours": ours,
        "phase": "both",
        "median_ms": ms,
        "traffic_bytes": 2 * 10**8,
        "flops": flops,
    }


@pytest.fixture
def measured(tmp_path):
    rows = [
        row("z_loss", "tilewise cuda", 4.0),
        row("z_loss", "tilewise cuda", 6.0, shape=(128, 8)),
        row("z_loss", "tilewise triton", 10.0),
        row("z_loss", "torch eager", 90.0, ours=False),
        row("mala", "tilewise cuda", 20.0, flops=10**7),
    ]
    content = {"ceilings": {"copy_gbs": 100.0, "gemm_float32_gflops": 1.0}, "results": rows}
    results.save(tmp_path / "results" / "all.json", content)
    results.save(tmp_path / "results" / "gpu-bench.json", {"steps": []})
    return tmp_path / "results"


def test_the_furthest_from_their_bound(measured):
    found = profile_kernels.furthest(measured, 6)
    assert [(far.distance, far.op, far.contender, far.shape) for far in found] == [
        (5.0, "z_loss", "tilewise triton", (64, 8)),
        (3.0, "z_loss", "tilewise cuda", (128, 8)),
        (2.0, "mala", "tilewise cuda", (64, 8)),
    ]
    assert [far.bound_ms for far in found] == [2.0, 2.0, 10.0]
    assert len(profile_kernels.furthest(measured, 2)) == 2


NAMES = ["ID", "Kernel Name", "gpu__time_duration.sum", "dram__bytes_read.sum", "launch__registers_per_thread"]
TABLE = "\n".join(
    ["==PROF== Connected", ",".join(f'"{name}"' for name in NAMES), '"","","ns","byte","register/thread"']
    + ['"0","rows(int, float)","1,234.5","2000","32"', '"1","tail","10","n/a",""']
)


@pytest.mark.parametrize(
    "said, status, reason",
    [
        (TABLE, 0, None),
        ("==ERROR== ERR_NVGPUCTRPERM - no permission\nthe end", 77, "==ERROR== ERR_NVGPUCTRPERM - no permission"),
        ("Traceback\nValueError: no\n==ERROR== The application returned an error code (1).", 1, "ValueError: no"),
        (None, 77, "ncu is not on PATH"),
    ],
)
def test_metrics_of_the_profiler(measured, tmp_path, monkeypatch, capsys, said, status, reason):
    monkeypatch.setenv("PATH", str(tmp_path))
    if said is not None:
        (tmp_path / "ncu").write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done < {tmp_path}/said\n')
        (tmp_path / "ncu").chmod(0o755)
        (tmp_path / "said").write_text(said + "\n")
    out = tmp_path / "profile.json"
    folders = [str(tmp_path / "empty"), str(measured)]
    assert profile_kernels.main(["--results", *folders, "--out", str(out)]) == status
    content = json.loads(out.read_text())
    if status == profile_kernels.UNAVAILABLE:
        assert content == {"unavailable": reason, "cases": []}
        assert capsys.readouterr().out.endswith(f"unavailable: {reason}\n")
        return
    assert len(content["cases"]) == 3 and {case["failed"] for case in content["cases"]} == {reason}
    if reason is None:
        first, second = content["cases"][0]["kernels"]
        assert first["kernel"] == "rows(int, float)" and first["ns"] == 1234.5 and first["registers"] == 32
        assert second["ns"] == 10 and not any(second[name] for name in ("registers", "bytes_read", "bytes_written"))


def test_what_the_profiler_looks_at_runs():
    pytest.importorskip("tilewise")
    arguments = ["--device", "cpu", "--quick", "--op", "z_loss", "--label", "64 x 1000 float32"]
    assert profile_kernels.main([*arguments, "--contender", "tilewise"]) == 0
    with pytest.raises(SystemExit, match="z_loss has no case 1 x 1 float32"):
        profile_kernels.find("cpu", "z_loss", "1 x 1 float32", "tilewise", True)
