# The first `make test` or `make bench` sets everything up: it needs Python >= 3.10 and a C++20 compiler, and compiles
# the CUDA library when nvcc is on PATH. Requirements (and the pinned torch) are in requirements/.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CMAKE := $(VENV)/bin/cmake
# Only errors: pip warns at length about harmless things.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NATIVE_SOURCES := $(wildcard tests/native/* csrc/common/*)
PY_FILES := setup.py pysrc triton_kernels tests bench

.DELETE_ON_ERROR:
.PHONY: help venv build native lint format test test-cpu test-triton aot sanitize race resources trace predict bench \
	headlines bench-compare readme inplace gpu gpu-build gpu-smoke gpu-test-cuda gpu-bench gpu-test-triton \
	gpu-sanitize gpu-profile check-cuda wheel check-wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/requirements.stamp ## .venv with everything in requirements/
$(VENV)/requirements.stamp: requirements/build.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("tilewise needs Python >= 3.10.")'
	@echo "installing requirements into $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) $(PIP_INSTALL) -r requirements/dev.txt
	@touch $@

build: export NVCC_APPEND_FLAGS = -Werror=all-warnings
build: $(VENV)/build.stamp ## compile csrc/ and install tilewise editable
$(VENV)/build.stamp: $(VENV)/requirements.stamp $(SOURCES)
	@echo "building tilewise"
	@$(PY) setup.py -q build_ext --inplace
	@$(PY) $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

native: build/native.stamp ## the Python module over csrc/common that tests/package/test_common.py uses
build/native.stamp: $(VENV)/requirements.stamp $(NATIVE_SOURCES)
	@echo "building the native test module"
	@$(CMAKE) -S tests/native -B build/native -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) -DPYBIND11_FINDPYTHON=ON \
		-Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" > /dev/null
	@$(CMAKE) --build build/native
	@touch $@

lint: venv ## ruff and clang-format, changing nothing
	@$(PY) -m ruff check -q $(PY_FILES)
	@$(PY) -m ruff format -q --check $(PY_FILES)
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: venv ## let ruff and clang-format change the files
	@$(PY) -m ruff check -q --fix $(PY_FILES)
	@$(PY) -m ruff format -q $(PY_FILES)
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

test: build native lint ## lint and run every test that needs no GPU
	@$(MAKE) --no-print-directory --jobs 2 test-triton test-cpu

# Side by side: the interpreter, and most other tests, keep one core busy. Threads that wait leave it to the others.
test-cpu test-triton: export OMP_WAIT_POLICY = PASSIVE
test-cpu:
	@$(PY) -m pytest -x -q tests
	@for isa in $$($(PY) -c 'from tilewise import loading; print(*loading.cpu_isas()[:-1])'); do \
		echo "each fifth case of the contract again, on instruction set $$isa"; \
		TILEWISE_CPU_ISA=$$isa $(PY) -m pytest -x -q -m "contract and not slow" -k "not compile" --every 5 tests || exit 1; \
	done
	@echo "the contract again, on the PyTorch reference"
	@TILEWISE_BACKEND=reference $(PY) -m pytest -x -q -m contract tests

test-triton:
	@echo "the contract again, on the Triton kernels in their interpreter"
	@TILEWISE_BACKEND=triton TRITON_INTERPRET=1 $(PY) -m pytest -x -q -m contract tests

SANITIZED := build/sanitize/package
# Python itself is not built with sanitizers: their libraries are loaded before it. Their build has no vectors, so one
# long sum, whose rounding a test of squares_beyond_the_type knows, is longer than in any other.
SANITIZED_PY = PYTHONPATH=$(CURDIR)/$(SANITIZED) OMP_NUM_THREADS=1 \
	LD_PRELOAD=$$(for name in asan ubsan stdc++; do c++ -print-file-name=lib$$name.so; done | paste -sd:) \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0 \
	UBSAN_OPTIONS=print_stacktrace=1 $(PY)
FUZZ_CALLS ?= 20000

OLDER_TRITON := build/triton-3.6.0
aot: build ## every Triton kernel compiled for sm_80, 90 and 100, by the Triton installed and by that of PyTorch 2.11
	@test -d $(OLDER_TRITON) || $(PY) $(PIP_INSTALL) --no-deps --target $(OLDER_TRITON) triton==3.6.0
	@TILEWISE_AOT_ARCHS=80,90,100 $(PY) -m pytest -q tests/gpu/test_triton_aot.py
	@TILEWISE_AOT_ARCHS=80,90,100 PYTHONPATH=$(OLDER_TRITON) $(PY) -m pytest -q tests/gpu/test_triton_aot.py

sanitize: venv ## the contract and the fuzzer on a CPU library with AddressSanitizer and UndefinedBehaviorSanitizer
	@TILEWISE_CUDA=0 TILEWISE_SANITIZE=1 $(PY) setup.py -q build_ext --build-temp build/sanitize/cmake --build-lib $(SANITIZED)
	@ln -sfn $(CURDIR)/triton_kernels $(filter-out %/lib,$(wildcard $(CURDIR)/pysrc/*)) $(SANITIZED)/tilewise
	@$(SANITIZED_PY) -m pytest -x -q -p no:cacheprovider -m "contract and not slow" \
		-k "not 50257 and not 20011 and not memory and not compile and not squares_beyond" tests
	@$(SANITIZED_PY) -W ignore tests/fuzz.py --memory 0 --sweep
	@$(SANITIZED_PY) -W ignore tests/fuzz.py --memory 0 --calls $(FUZZ_CALLS)

resources: build ## what the CUDA library's machine code says: instructions of hot loops, registers, warps that fit
	@$(PY) tests/gpu/resources.py $(if $(WRITE),--write) $(KERNEL)

RACE := build/race
RACE_FLAGS := -std=c++20 -O1 -g -fsanitize=thread -Wno-unknown-pragmas -Wno-pragmas -Icsrc -Itests/gpu/cuda_emulator
RACE_OBJECTS := $(patsubst %,$(RACE)/%.o,$(wildcard csrc/*/*_cuda.cu tests/gpu/cuda_emulator/*.cpp tests/gpu/race/*.cpp))

race: $(RACE)/race ## the CUDA kernels under ThreadSanitizer on this CPU: races, and shared memory that is wrong
	@$(RACE)/race

$(RACE)/race: $(RACE_OBJECTS)
	@$(CXX) $(RACE_FLAGS) $^ -o $@

$(RACE)/%.o: % Makefile
	@mkdir -p $(@D)
	@$(CXX) $(RACE_FLAGS) -MMD -MP -x c++ -c $< -o $@

-include $(RACE_OBJECTS:.o=.d)

resources trace predict: export PYTHONPATH = bench:tests/gpu/cuda_emulator
trace: venv ## what every operator launches on a GPU at benchmark sizes, recorded here: grids, shared memory, idle share
	@$(PY) tests/gpu/cuda_emulator/launch_trace.py

predict: venv ## predicted times of these launches on A100, H100, H200 and B200, into bench/results/predicted
	@$(PY) bench/predict.py

bench: build ## benchmarks on this machine, and the language model trained both ways
	@$(PY) bench/run.py
	@$(PY) bench/call_cost.py

headlines: build ## the papers' claims on whole training steps (about 15 min), then the report with them
	@$(PY) bench/headlines/z_loss.py
	@$(PY) bench/headlines/multi_similarity.py
	@$(PY) bench/headlines/mala.py
	@$(PY) bench/headlines/monge_gap.py
	@$(PY) bench/headlines/sparse_ot.py
	@$(PY) bench/headlines/wta_crs.py
	@$(PY) bench/report.py

bench-compare: build ## the CPU regression suite, against its last saved run
	@$(PY) -m pytest -q tests/benchmarks/bench_ops.py --benchmark-autosave --benchmark-compare

readme: build ## README.md's figures and docs/figures.md from bench/results
	@$(PY) bench/report.py --readme

# Installs nothing: for machines whose Python has torch already. tilewise is then importable from build/inplace.
inplace: ## compile with PYTHON's own torch, install nothing
	@$(PYTHON) setup.py -q build_ext --inplace
	@rm -rf build/inplace && mkdir -p build/inplace/tilewise
	@ln -s $(CURDIR)/pysrc/* $(CURDIR)/triton_kernels build/inplace/tilewise

gpu: ## on a machine with an NVIDIA GPU, installing nothing: the stages below, in their order (bench/gpu.py)
	@$(PYTHON) bench/gpu.py

gpu-build: ## compile in place for the GPU that is there
gpu-smoke: ## its measured ceilings, and a small launch of every function on both backends
gpu-test-cuda: ## the tests that need a GPU, on the CUDA kernels
gpu-bench: ## the benchmarks, both backends side by side
gpu-test-triton: ## the tests that need a GPU, on the Triton kernels
gpu-sanitize: ## compute-sanitizer on small launches of both
gpu-profile: ## Nsight Compute on the six cases of gpu-bench that are furthest from their bound
gpu-build gpu-smoke gpu-test-cuda gpu-bench gpu-test-triton gpu-sanitize gpu-profile:
	@$(PYTHON) bench/gpu.py $@

check-cuda: build ## the CUDA library built here loads into an older CUDA build of torch (several GB)
	@test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	@.venv-cuda/bin/python $(PIP_INSTALL) torch==2.11.0 numpy
	@.venv-cuda/bin/python tests/gpu/check_cuda.py

wheel: venv ## a wheel in dist/
	@rm -rf dist build/lib.*
	@$(PY) -m pip wheel -qq --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

check-wheel: ## install the wheel in a new venv and run the contract outside the source tree
	@rm -rf build/check-wheel && mkdir -p build/check-wheel
	@$(MAKE) --no-print-directory wheel
	@$(PYTHON) -m venv build/check-wheel/venv
	@build/check-wheel/venv/bin/python $(PIP_INSTALL) -r requirements/dev.txt dist/*.whl
	@outside=$$(mktemp -d) && trap 'rm -rf '$$outside EXIT && cp -r tests pyproject.toml $$outside && cd $$outside && \
		contract="$(CURDIR)/build/check-wheel/venv/bin/python -m pytest -x -q -p no:cacheprovider -m contract tests" && \
		$$contract && TILEWISE_BACKEND=triton TRITON_INTERPRET=1 $$contract

clean: ## remove what was built, keep .venv
	@rm -rf build dist pysrc/lib *.egg-info $(VENV)/build.stamp
