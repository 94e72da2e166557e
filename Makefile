# Everything happens in .venv/ at the project's root; `make demo` and `make test` set it up when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py

.PHONY: demo test bench lint format build clean sanitize gpu-check static-cost triton-versions

demo: build
	$(BIN)/twa demo -o twa-demo --overwrite

# Two processes; a file's tests stay together, in order.
test: build
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: build
	$(BIN)/python -m pytest -o python_files="benchmark_*.py" -p no:cacheprovider bench --benchmark-only --benchmark-disable-gc --benchmark-columns=median,iqr,rounds --save cpu
	$(BIN)/python bench/peak_memory.py

# For a machine with a GPU and PyTorch already installed: its own Python, no network. Build, tests, compute-sanitizer, roofline table.
gpu-check:
	$(PYTHON) bench/gpu_check.py

# Registers, spills and instructions per weight of the CUDA and the Triton kernels, from their machine code; needs no GPU.
static-cost: build
	$(BIN)/python bench/static_cost_cuda.py
	$(BIN)/python bench/static_cost.py

# Every shipped Triton kernel through Triton 3.6 to 3.9, which pip installs into build/; needs no GPU.
triton-versions: build
	$(BIN)/python bench/triton_versions.py

# The kernel tests once more, with a native module and emulated CUDA kernels built for AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := build/sanitize
sanitize: build
	mkdir -p $(SANITIZED)/twa_kernels
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B $(SANITIZED)/cmake -DTWA_CUDA=off -DTWA_SANITIZE=address,undefined -DPYBIND11_FINDPYTHON=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(SANITIZED)/twa_kernels
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)/cmake --target _C _emulated
	cp -r twa_kernels/*.py twa_kernels/_triton $(SANITIZED)/twa_kernels/
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=halt_on_error=1 TWA_EMULATOR_BUILD=$(CURDIR)/$(SANITIZED)/cmake \
	  $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	  $(addprefix $(CURDIR)/tests/test_,pack.py project.py reconstruct.py step.py gram.py cuda.py orthonormalize.py orthonormalize_cuda.py)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/emulator/*.h' 'tests/emulator/*.cpp')

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/emulator/*.h' 'tests/emulator/*.cpp')

build: $(VENV)/.built

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements $(NATIVE) pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info twa_kernels/*.so $(VENV)/.built
