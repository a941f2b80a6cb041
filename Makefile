# Everything a fresh machine needs is installed into .venv by the first target that wants it.
#
#   make demo      the main job: a real Megatron SFT run, reference loss against ours, on this CPU
#   make test      the whole test suite
#   make lint      ruff and clang-format
#   make bench     time and memory of the loss on this CPU
#   make wheel     a wheel in dist/
#   make sanitize  the native kernels under AddressSanitizer and UBSan, exercised by the suite

PYTHON ?= python3
# A build for another device: make demo TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp)

.PHONY: demo test lint format bench wheel sanitize clean system
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/python -m bench sft

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.installed
	$(BIN)/python -m bench cpu

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel

# A second copy of the package in build/, so that the installed one stays as it is. leaks: CPython's own.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
NATIVE_TESTS := test_against_oracle test_exp test_traps test_traps_of_masks test_determinism test_module_and_metrics
sanitize: $(VENV)/.installed
	CXXFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build --build-base build/sanitize \
	    --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/lib:. \
	OMP_NUM_THREADS=2 FSL_EXPECT_PACKAGE_IN=build/sanitize/lib $(BIN)/pytest -o pythonpath= -q -s \
	    -k "not eager" $(NATIVE_TESTS:%=tests/%.py)

$(VENV)/.installed: $(SOURCES) | system
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	touch $@

system:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is too old or missing: Python 3.10 or newer is needed (make PYTHON=python3.11 ...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sysconfig, pathlib, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || \
	    { echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	    { echo "no C++ compiler: apt-get install g++ (or set CXX)"; exit 1; }

clean:
	rm -rf build dist *.egg-info fused_sft_loss/*.so bench-out
