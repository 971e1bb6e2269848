"""`make gpu` runs its stages in order and loses nothing to a failure, an overrun or a stop: with tools that pretend."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bench_modules import bench_modules

gpu, roofline, smoke = bench_modules("gpu", "roofline", "smoke")

ROOT, REAL_PYTHON = Path(gpu.__file__).parents[1], sys.executable
STAGES = ["gpu-build", "gpu-smoke", "gpu-test-cuda", "gpu-bench", "gpu-test-triton", "gpu-sanitize", "gpu-profile"]
# Stands for Python and every tool: notes what it was called with and what the stages' JSON said, then does as planned.
FAKE = """#!{python} -SE
import json, os, pathlib, subprocess, sys, time
here = pathlib.Path(__file__).parent.parent
said = pathlib.Path(sys.argv[0]).name + " " + " ".join(sys.argv[1:])
states = {{}}
for path in here.glob("out/gpu-*.json"):
    content = json.loads(path.read_text())
    states[content["stage"]] = [step["state"] for step in content["steps"]]
names = ("TILEWISE_BACKEND", "TILEWISE_CUDA_ARCHS", "PYTHONPATH", "OMP_NUM_THREADS")
seen = {{name: os.environ.get(name) for name in names}}
with (here / "calls").open("a") as calls:
    print(json.dumps([said, states, seen]), file=calls)
for needle, act in json.loads((here / "plan").read_text()):
    if needle in said + " " + str(seen["TILEWISE_BACKEND"]):
        if act == "hang":
            print("half done", flush=True)
            child = subprocess.Popen([{python!r}, "-SEc", "import time; time.sleep(60)"])
            (here / "child.new").write_text(str(child.pid))
            (here / "child.new").rename(here / "child")
            time.sleep(60)
        status, line = act
        print("first line\\n" + line)
        sys.exit(status)
print("done: " + said[:20])
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder that is all of PATH; `plan` says what the next run's commands do."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "plan").write_text("[]")
    for name in ("python", "make", "compute-sanitizer"):
        (tmp_path / "bin" / name).write_text(FAKE.format(python=sys.executable))
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA Test, 9.0\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.delenv("TILEWISE_BACKEND", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(gpu, "IN_PLACE", tmp_path / "bin")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def plan(machine, acts):
    """What a command with this word in it does: the first that fits."""
    (machine / "plan").write_text(json.dumps(list(acts.items())))


def table_of(machine):
    return gpu.steps(machine / "out", ROOT / "bench" / "results" / "nvidia-test", "90")


def calls(machine):
    return [json.loads(line) for line in (machine / "calls").read_text().splitlines()]


def steps_of(machine, stage):
    return {step["name"]: step for step in json.loads((machine / "out" / f"{stage}.json").read_text())["steps"]}


def gone(pid):
    """Ended: also where nobody has asked for its status yet."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_all_stages_in_order_each_with_its_json(machine, capsys):
    assert gpu.main([]) == 0
    made = calls(machine)
    table = table_of(machine)
    assert list(gpu.grouped(table)) == STAGES
    assert [said for said, *_ in made] == [" ".join([Path(s.command[0]).name, *s.command[1:]]) for s in table]
    done = {}
    for step, (_, states, _) in zip(table, made, strict=True):
        done.setdefault(step.stage, []).append("passed")
        assert states == done | {step.stage: [*done[step.stage][:-1], "running"]}
    for stage, states in done.items():
        content = json.loads((machine / "out" / f"{stage}.json").read_text())
        assert content["gpu"] == "NVIDIA Test" and [s["state"] for s in content["steps"]] == states
        assert all(s["detail"].startswith("done: ") for s in content["steps"])
    assert capsys.readouterr().out.splitlines()[-len(table)].startswith("gpu-build        build                passed")


def test_environment_of_the_steps(machine):
    assert gpu.main([]) == 0
    seen = {said: environment for said, _, environment in calls(machine)}
    assert {e["PYTHONPATH"].split(os.pathsep)[0] for e in seen.values()} == {str(gpu.IN_PLACE)}
    assert next(e for said, e in seen.items() if said.startswith("make"))["TILEWISE_CUDA_ARCHS"] == "90"
    tested = [e["TILEWISE_BACKEND"] for said, e in seen.items() if "-m pytest" in said]
    assert tested == ["cuda", "triton"] and all(e["TILEWISE_CUDA_ARCHS"] is None for e in list(seen.values())[1:])


def test_tests_share_the_gpu_where_xdist_is_there(machine, monkeypatch):
    monkeypatch.setattr(gpu, "processors", lambda: 6)
    for found, ending, environment in ((None, [], {}), (object(), ["-n", "4", "--dist"], {"OMP_NUM_THREADS": "1"})):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name, found=found: found)
        step = gpu.tests(machine, "cuda", 4, 9.0)
        after = step.command[step.command.index(str(machine / "test-cuda.json")) + 1 :]
        assert after[:3] == ending and "-x" not in step.command and "--maxfail=30" in step.command
        assert environment.items() <= step.environment.items() and step.environment["TILEWISE_BACKEND"] == "cuda"


def test_a_failure_is_recorded_and_hides_nothing(machine, capsys):
    plan(machine, {"make": [2, "no nvcc"], "-m pytest": [1, "E 3 failed"], "racecheck": [1, "a race"]})
    assert gpu.main([]) == 1
    assert len(calls(machine)) == len(table_of(machine))
    for stage, name, reason in (
        ("gpu-build", "build", "no nvcc"),
        ("gpu-test-cuda", "tests", "E 3 failed"),
        ("gpu-test-triton", "tests", "E 3 failed"),
        ("gpu-sanitize", "racecheck triton", "a race"),
    ):
        step = steps_of(machine, stage)[name]
        assert (step["state"], step["detail"]) == ("failed", reason)
    assert steps_of(machine, "gpu-sanitize")["memcheck triton"]["state"] == "passed"
    assert "--- gpu-build, build: the end of its output\nfirst line\nno nvcc" in capsys.readouterr().out


def test_no_earlier_result_is_taken_for_this_one(machine):
    """What a run would have written is not there when it came to nothing; benchmarks are replaced one by one."""
    names = ["ceilings", "launches-cuda", "launches-triton", "test-cuda", "test-triton", "warmed", "profile"]
    (machine / "out").mkdir()
    for name in [*names, "z_loss"]:
        (machine / "out" / f"{name}.json").write_text('{"stage": "", "steps": []}')
    plan(machine, {"": [1, "wrong"]})
    assert gpu.main([]) == 1
    assert {path.stem for path in (machine / "out").glob("*.json")} == {*STAGES, "z_loss"}
    written = [str(step.writes) for step in table_of(machine) if step.writes]
    assert all(path in " ".join(said for said, *_ in calls(machine)) for path in written)


@pytest.mark.parametrize("stage", STAGES)
def test_one_failure_is_enough(machine, stage):
    plan(machine, {"": [1, "wrong"]})
    assert gpu.main([stage]) == 1
    plan(machine, {})
    assert gpu.main([stage]) == 0


@pytest.mark.parametrize("needle, stage, status", [("-m pytest", "gpu-test-cuda", 1), ("run.py", "gpu-bench", 0)])
def test_an_overrun_is_stopped_with_all_it_started(machine, monkeypatch, needle, stage, status):
    """Tests have to end; a measurement has written what it found."""
    table = table_of(machine)
    short = [replace(step, seconds=0.7 if step.stage == stage else 20.0) for step in table]
    monkeypatch.setattr(gpu, "steps", lambda *_: short)
    plan(machine, {needle: "hang"})
    assert gpu.main([stage, "gpu-profile"]) == status
    (step,) = steps_of(machine, stage).values()
    assert step["state"] == "overran" and step["detail"] == "half done" and step["seconds"] < 15
    assert gone(int((machine / "child").read_text()))
    assert steps_of(machine, "gpu-profile")["ncu"]["state"] == "passed"


def test_a_stop_loses_nothing_that_was_done(machine):
    plan(machine, {"racecheck": "hang"})
    code = f"""import sys; sys.path.insert(0, {str(ROOT / "bench")!r}); import gpu, pathlib
gpu.IN_PLACE = pathlib.Path({str(gpu.IN_PLACE)!r}); sys.executable = {sys.executable!r}
sys.exit(gpu.main(["gpu-build", "gpu-sanitize", "gpu-profile"]))"""
    driver = subprocess.Popen([REAL_PYTHON, "-c", code], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not (machine / "child").exists() and time.monotonic() < until:
        time.sleep(0.05)
    driver.terminate()
    assert driver.wait(20) == 128 + signal.SIGTERM
    assert gone(int((machine / "child").read_text()))
    assert steps_of(machine, "gpu-build")["build"]["state"] == "passed"
    states = {name: step["state"] for name, step in steps_of(machine, "gpu-sanitize").items()}
    assert states == {"memcheck cuda": "passed", "racecheck cuda": "running"}
    assert not (machine / "out" / "gpu-profile.json").exists()


def test_what_is_missing_or_refuses_is_unavailable(machine):
    plan(machine, {"memcheck": [1, "Error: Device not supported"], "profile_kernels": [77, "unavailable: no ncu"]})
    assert gpu.main(["gpu-sanitize", "gpu-profile"]) == 0
    found = steps_of(machine, "gpu-sanitize") | steps_of(machine, "gpu-profile")
    assert {name: step["state"] for name, step in found.items()} == {
        "memcheck cuda": "unavailable",
        "racecheck cuda": "passed",
        "memcheck triton": "unavailable",
        "racecheck triton": "passed",
        "ncu": "unavailable",
    }
    assert found["ncu"]["detail"] == "unavailable: no ncu"
    (machine / "bin" / "compute-sanitizer").unlink()
    assert gpu.main(["gpu-sanitize"]) == 0
    assert {(s["state"], s["detail"]) for s in steps_of(machine, "gpu-sanitize").values()} == {
        ("unavailable", "compute-sanitizer is not on PATH")
    }


def test_what_cannot_run_says_why(machine, monkeypatch, capsys):
    assert gpu.main(["gpu-tests"]) == 2
    assert f"no such stage: gpu-tests; there are {', '.join(STAGES)}" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "IN_PLACE", machine / "nothing")
    assert gpu.main(["gpu-smoke"]) == 1
    assert steps_of(machine, "gpu-smoke")["launches cuda"]["detail"] == "tilewise is not built in place: make gpu-build"
    (machine / "bin" / "nvidia-smi").unlink()
    assert gpu.main([]) == 2
    assert "nvidia-smi finds none" in capsys.readouterr().out


def test_table_of_the_benchmarks(tmp_path):
    log = tmp_path / "log"
    assert gpu.bench_table(log) == ""
    log.write_text("case by case\n")
    assert gpu.bench_table(log) == ""
    log.write_text("case by case\n\ncase   contender\nfirst  1.0\n")
    assert gpu.bench_table(log) == "\ncase   contender\nfirst  1.0\n"


def test_benchmarks_stand_beside_their_predictions(machine, capsys):
    """The stage prints both by their names; of a GPU without predictions nothing."""
    row = {"case": "z_loss", "shape": [8192, 32000], "dtype": "float32", "contender": "tilewise cuda", "phase": "both"}
    (machine / "out").mkdir()
    (machine / "out" / "z_loss.json").write_text(json.dumps({"results": [row | {"median_ms": 2.5}]}))
    assert gpu.main(["gpu-bench"]) == 0
    assert "predicted ms" not in capsys.readouterr().out
    (machine / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H100 80GB HBM3, 9.0\n")
    assert gpu.main(["gpu-bench"]) == 0
    head, line, *_ = capsys.readouterr().out.partition("case ")[2].splitlines()
    assert head.split() == ["phase", "predicted", "ms", "measured", "ms", "ratio"]
    assert line.split()[:4] == ["z_loss", "8192x32000", "float32", "both"] and line.split()[5] == "2.5"


def test_stages_fit_their_minutes_and_are_targets(tmp_path):
    table = gpu.grouped(table_of(tmp_path))
    assert max(sum(step.seconds for step in chosen) for chosen in table.values()) <= 490
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{stage}: ## " in makefile for stage in table)
    assert f"\n{' '.join(STAGES)}:\n\t@$(PYTHON) bench/gpu.py $@\n" in makefile


def in_pytest(folder, *arguments):
    """A run with this suite's conftest.py over tests that are made up."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--tb=short"]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command += ["--rootdir", str(folder), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_failures_are_listed_as_they_come(tmp_path):
    """In a run that ends in the middle: what failed by then, why, and that it did not finish."""
    module = tmp_path / "test_made_up.py"
    text = "import os\ndef test_a(): pass\ndef test_b(): assert 1 == 2, 'first\\nlast'\n"
    found = {}
    for ending in ("def test_c(): os._exit(9)\n", "def test_c(): pass\n"):
        module.write_text(text + ending)
        in_pytest(tmp_path, "--failures", "found.json", module.name)
        content = json.loads((tmp_path / "found.json").read_text())
        found[content["state"]] = content
        (failed,) = content["failed"]
        assert failed["test"] == "test_made_up.py::test_b"
        assert failed["error"] == "AssertionError: first" and failed["last_line"] == "assert 1 == 2"
    assert {state: content["passed"] for state, content in found.items()} == {"running": 1, "finished": 2}


LOST = """import conftest, torch
def test_a(request):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
    request.config.pluginmanager.register(conftest.Replaceable())
def test_b(): pass
"""


def test_a_process_ends_with_its_gpu(tmp_path):
    """xdist then starts another; each later test would only say that the GPU is lost."""
    (tmp_path / "test_made_up.py").write_text(LOST)
    done = in_pytest(tmp_path, "test_made_up.py")
    assert done.returncode == 1 and done.stderr == ""
    assert not any(word in done.stdout for word in ("passed", "failed", "error"))


def test_names_of_tests_hold_no_numbers_that_change(tmp_path):
    """With xdist they would be other tests in each process, and none would run."""
    text = "import pytest, torch\n@pytest.mark.parametrize('x', [torch.rand(2)], ids=str)\ndef test_a(x): pass\n"
    (tmp_path / "test_made_up.py").write_text(text)
    done = in_pytest(tmp_path, "--co", "test_made_up.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "a name that is another one in the next process: test_made_up.py::test_a[tensor(" in done.stderr


def test_each_launch_and_ceiling_fails_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tilewise")
    monkeypatch.setenv("TILEWISE_BACKEND", "cpu")
    assert smoke.launches(["no_such_loss", "z_loss"], 1, tmp_path / "launches.json") == 1
    content = json.loads((tmp_path / "launches.json").read_text())
    assert content["failed"] == {"no_such_loss": "KeyError: 'no_such_loss'"} and list(content["passed"]) == ["z_loss"]
    assert capsys.readouterr().out.endswith("1 of 2 functions ran; not no_such_loss\n")

    def fails():
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(roofline, "ceilings", lambda *_: {"copy_gbs": fails, "launch_us": lambda: 3.0})
    assert smoke.ceilings("cpu", True, tmp_path / "ceilings.json") == 1
    expected = {"ceilings": {"launch_us": 3.0}, "failed": {"copy_gbs": "RuntimeError: out of memory"}}
    assert json.loads((tmp_path / "ceilings.json").read_text()) == expected
    assert len(smoke.in_short(ValueError("x" * 999))) < 310
