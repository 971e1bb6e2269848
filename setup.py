"""Compiles csrc/ with CMake and Ninja into tilewise/lib. The rest of the package is described in pyproject.toml.

Environment: TILEWISE_CUDA=auto|1|0 (default auto: when nvcc is found), TILEWISE_CUDA_ARCHS="80;90;100" (or "native"),
TILEWISE_SANITIZE=0|1 (make sanitize), CXX, CUDACXX, CUDA_HOME, MAX_JOBS.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # a new venv of Python 3.10 or 3.11 has 65
    raise SystemExit("tilewise needs setuptools >= 77 at build time: pip install --upgrade setuptools.")

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
GIB_PER_JOB = 2
CXX20_PROBE = b"#include <bit>\n#include <concepts>\nint main() { return std::bit_cast<int>(0.0f); }\n"


def find_torch() -> Path:
    """torch's package folder, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError(
            "tilewise needs torch at build time: pip install torch, then pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def find_tool(name: str) -> str:
    """A build tool beside the running Python, where pip puts it, or on PATH."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    tool = shutil.which(name, path=path)
    if tool is None:
        raise SetupError(f"tilewise needs {name} at build time: pip install {name}.")
    return tool


def find_compiler() -> str:
    """The first C++ compiler that compiles C++20."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for compiler in filter(None, map(shutil.which, names)):
        probe = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        if subprocess.run(probe, input=CXX20_PROBE, capture_output=True).returncode == 0:
            return compiler
    raise SetupError(
        f"tilewise needs a C++20 compiler (tried {', '.join(names)}): install g++ >= 11 or clang++ >= 14, or set CXX."
    )


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, or None and the reason why the CUDA library is not built."""
    wanted = os.environ.get("TILEWISE_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        raise SetupError(f"TILEWISE_CUDA must be auto, 1 or 0, got {wanted!r}.")
    if wanted == "0":
        return None, "TILEWISE_CUDA=0 was set"
    cuda_home = os.environ.get("CUDA_HOME")
    nvcc = (
        shutil.which(os.environ.get("CUDACXX", ""))
        or (cuda_home and shutil.which("nvcc", path=f"{cuda_home}/bin"))
        or shutil.which("nvcc")
    )
    if nvcc is None and wanted == "1":
        raise SetupError(
            "TILEWISE_CUDA=1 asks for the CUDA library, but nvcc was not found: "
            "put nvcc on PATH, set CUDA_HOME or CUDACXX, or set TILEWISE_CUDA=0."
        )
    return nvcc, "" if nvcc else "nvcc was not found on PATH, in CUDA_HOME or as CUDACXX"


def job_count() -> int:
    """As many compilers as there are processors and memory for."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(processors, int(memory_gib / GIB_PER_JOB)))


def replace_folder(source: Path, target: Path) -> None:
    """Makes the files of target those of source. A library that a running process has mapped keeps its old contents."""
    target.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in source.iterdir()}
    for stale in target.iterdir():
        if stale.name not in names:
            stale.unlink()
    for name in names:
        shutil.copy2(source / name, target / f"{name}.new")
        os.replace(target / f"{name}.new", target / name)


class CMakeBuild(build_ext):
    """build_ext [--inplace] [--build-temp DIR] [--configure-only]: inplace writes to pysrc/lib."""

    user_options = [*build_ext.user_options, ("configure-only", None, "stop before compiling")]  # noqa: RUF012
    boolean_options = [*build_ext.boolean_options, "configure-only"]  # noqa: RUF012

    def initialize_options(self):
        super().initialize_options()
        self.configure_only = False

    def finalize_options(self):
        # One build folder for wheels, editable and in-place builds: the libraries do not depend on Python.
        self.build_temp = self.build_temp or str(ROOT / "build" / "cmake")
        super().finalize_options()

    def run(self):
        cmake, build = find_tool("cmake"), Path(self.build_temp).resolve()
        self.call(*self.configure_command(cmake, build), quiet=True)
        if self.configure_only:
            return
        self.call(cmake, "--build", str(build), "--parallel", str(job_count()))
        package = ROOT / "pysrc" if self.inplace else Path(self.build_lib, "tilewise")
        replace_folder(build / "lib", package / "lib")

    def configure_command(self, cmake: str, build: Path) -> list[str]:
        torch, (nvcc, no_cuda_reason) = find_torch(), find_nvcc()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_CXX_COMPILER": find_compiler(),
            "TILEWISE_TORCH_DIR": torch,
            "TILEWISE_TORCH_VERSION": importlib.metadata.version("torch"),
            "TILEWISE_NO_CUDA_REASON": no_cuda_reason,
            "TILEWISE_CUDA_ARCHS": os.environ.get("TILEWISE_CUDA_ARCHS", ""),
            "TILEWISE_SANITIZE": os.environ.get("TILEWISE_SANITIZE", "0"),
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        return [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"] + [
            f"-D{name}={value}" for name, value in options.items()
        ]

    def call(self, *command: str, quiet: bool = False) -> None:
        if subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None).returncode != 0:
            raise CompileError("compiling tilewise failed: the reason stands above.")

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(path) for path in Path(self.build_lib, "tilewise", "lib").glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class StableWheel(bdist_wheel):
    """The libraries use torch's stable ABI and not Python's: one wheel per platform serves every Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


# The extension names what is compiled; CMakeBuild ignores its sources.
setuptools.setup(
    ext_modules=[setuptools.Extension("tilewise.lib.libtilewise", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)
