"""Building, loading and `python -m tilewise.info`: what they produce, and one sentence for everything missing."""

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilewise
from tilewise import loading

ROOT = Path(__file__).resolve().parents[2]
in_source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")

NO_NVCC = "nvcc was not found on PATH, in CUDA_HOME or as CUDACXX"


@pytest.fixture
def no_nvcc(tmp_path):
    """An environment whose PATH has a C++ compiler and nothing else."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "as", "ld"):
        (tools / name).symlink_to(shutil.which(name))
    hidden = ("CXX", "CUDACXX", "CUDA_HOME", "TILEWISE_CUDA", "TILEWISE_CUDA_ARCHS", "CMAKE_CXX_COMPILER_LAUNCHER")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"PATH": str(tools)}


def configure(folder, env, prelude=""):
    """Runs setup.py up to the compiler; prelude is Python to run before it."""
    code = f"{prelude}\nimport runpy, sys\nsys.argv[0] = 'setup.py'\nrunpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", code, "-q", "build_ext", "--configure-only", "--build-temp", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def sentence(result):
    """The one line that a failed build ends with."""
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert not any("Traceback" in line for line in lines), result.stderr
    return lines[-1].removeprefix("error: ")


@in_source_tree
def test_without_nvcc_only_the_cpu_library_is_built(tmp_path, no_nvcc, monkeypatch):
    result = configure(tmp_path / "build", no_nvcc)
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "libtilewise_cpu.so" in rules
    assert "libtilewise_cuda.so" not in rules

    info = json.loads((tmp_path / "build" / "lib" / "build_info.json").read_text())
    assert (info["cuda_compiler"], info["cuda_architectures"], info["no_cuda_reason"]) == ("", [], NO_NVCC)
    assert info["torch"] == torch.__version__
    monkeypatch.setattr(loading, "build_info", lambda: info)
    assert f"CUDA: not built ({NO_NVCC})" in importlib.import_module("tilewise.info").report()


@in_source_tree
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (
            {"TILEWISE_CUDA": "1"},
            "TILEWISE_CUDA=1 asks for the CUDA library, but nvcc was not found: "
            "put nvcc on PATH, set CUDA_HOME or CUDACXX, or set TILEWISE_CUDA=0.",
        ),
        ({"TILEWISE_CUDA": "yes"}, "TILEWISE_CUDA must be auto, 1 or 0, got 'yes'."),
        (
            {"PATH": ""},
            "tilewise needs a C++20 compiler (tried c++, g++, clang++): "
            "install g++ >= 11 or clang++ >= 14, or set CXX.",
        ),
        (
            {"CXX": "/bin/false"},
            "tilewise needs a C++20 compiler (tried /bin/false): install g++ >= 11 or clang++ >= 14, or set CXX.",
        ),
    ],
)
def test_one_sentence_for_what_a_build_misses(tmp_path, no_nvcc, env, expected):
    assert sentence(configure(tmp_path / "build", no_nvcc | env)) == expected


@in_source_tree
@pytest.mark.parametrize(
    ("prelude", "expected"),
    [
        (
            "import importlib.util\nfind = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)",
            "tilewise needs torch at build time: pip install torch, then pip install --no-build-isolation .",
        ),
        (
            "import setuptools\nsetuptools.__version__ = '65.5.0'",
            "tilewise needs setuptools >= 77 at build time: pip install --upgrade setuptools.",
        ),
        (
            "import sysconfig\nsysconfig.get_path = lambda name: ''",
            "tilewise needs cmake at build time: pip install cmake.",
        ),
    ],
)
def test_one_sentence_for_a_missing_python_package(tmp_path, no_nvcc, prelude, expected):
    assert sentence(configure(tmp_path / "build", no_nvcc, prelude)) == expected


@pytest.fixture
def setup_py(monkeypatch):
    """The names that setup.py defines."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@in_source_tree
def test_one_wheel_serves_every_python(setup_py):
    import setuptools

    extension = setuptools.Extension("tilewise.lib.libtilewise", sources=[])
    wheel = setup_py["StableWheel"](setuptools.Distribution({"ext_modules": [extension]}))
    wheel.finalize_options()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform.startswith(sys.platform)


@in_source_tree
@pytest.mark.parametrize(("gib", "jobs"), [(1, 1), (5, 2), (64, 4)])
def test_jobs_fit_processors_and_memory(setup_py, monkeypatch, gib, jobs):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else gib * 2**30)
    assert setup_py["job_count"]() == jobs


@in_source_tree
def test_replaced_libraries_leave_no_stale_file(setup_py, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "libtilewise_cpu.so").write_text("new")
    target.mkdir()
    (target / "libtilewise_cpu.so").write_text("old")
    (target / "libtilewise_cuda.so").write_text("old")
    opened = (target / "libtilewise_cpu.so").open()
    setup_py["replace_folder"](source, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"libtilewise_cpu.so": "new"}
    assert opened.read() == "old"  # what a running process has mapped is untouched


def test_uncompiled_package_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    with pytest.raises(ImportError, match=r"tilewise has not been compiled: .*libtilewise_cpu\.so is missing; run pip"):
        loading.load_libraries()


def test_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.1"))
    with pytest.raises(ImportError, match=r"tilewise needs torch >= 2\.11, found 2\.10\.1\."):
        loading.load_libraries()


def test_broken_cuda_library_is_reported(tmp_path, monkeypatch):
    (tmp_path / "libtilewise_cuda.so").write_text("not a library")
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    monkeypatch.setattr(loading, "build_info", lambda: {"no_cuda_reason": ""})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(UserWarning, match="the CUDA library could not be loaded"):
        assert loading._load_cuda().startswith("it could not be loaded (")


def run_info(**env):
    command = [sys.executable, "-W", "error", "-m", "tilewise.info"]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True, timeout=120).stdout


def test_info_tells_what_was_built_loaded_and_chosen():
    text, built = run_info(), loading.build_info()
    first, *rest = text.splitlines()
    assert first.startswith(f"tilewise {tilewise.__version__}, torch {torch.__version__}, Python ")
    assert [line for line in rest if not line.startswith(" ")] == ["built", "loaded", "chosen", "not to be had"]
    assert f"CPU: {', '.join(built['cpu_instruction_sets'])}, by {built['cxx_compiler']}" in text
    assert "libtilewise_cpu: yes" in text
    assert f"CPU tensors: C++ ({loading.cpu_isa()})" in text
    if torch.version.cuda is None:
        assert "libtilewise_cuda: no, " in text
        assert "CUDA tensors: nothing: " in text


@pytest.mark.skipif(loading.cpu_isas() == ["baseline"], reason="one build serves all processors of this architecture")
@pytest.mark.parametrize("isa", ["v2", "v3", "v4", "avx2", ""])
def test_instruction_set_is_the_one_asked_for(isa):
    if isa in loading.cpu_isas():
        assert f"CPU instruction set: {isa}\n" in run_info(TILEWISE_CPU_ISA=isa)
        return
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run_info(TILEWISE_CPU_ISA=isa)
    expected = f"expected TILEWISE_CPU_ISA to be one of {', '.join(loading.cpu_isas())} on this processor, got {isa!r}"
    assert expected in failure.value.stderr
