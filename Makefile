# Everything a fresh machine needs is installed into .venv by the first target that wants it.
#
#   make help              these lines
#   make demo              a real Megatron SFT run on this CPU: the reference loss, ours, and ours without logits
#   make test              the test suite: every promise on every backend
#   make check             what takes longer: the whole products of options, every Megatron, audits, wheels, sanitizers
#   make lint              ruff, mypy and clang-format
#   make format            let both rewrite the files
#   make bench             time and memory of the loss beside every peer, and the figures of README and docs/ from them
#   make gpu               every check and measurement of a GPU, in ten minutes; BUDGET=300 for five
#   make system            name the system packages that are missing, required and optional
#   make megatron-docs     measure the tables of docs/megatron.md anew
#   make docs              the documentation as a site in build/site; a broken link is an error
#   make clean             remove what was built; .venv stays
#
# Parts of make check:
#
#   make long              the tests that make test leaves out
#   make audit             the machine code of every GPU kernel with every option
#   make wheel             wheels in dist/: +cpu, and +cu13 and +rocm7 where there are toolchains for them
#   make wheel-check       install each wheel of dist/ in an empty environment and run the loss
#   make sanitize          the native kernels under AddressSanitizer and UBSan, run by the suite
#   make compute-sanitizer the CUDA kernels on a GPU under NVIDIA's sanitizer, run by tests/gpu/test_gpu.py
#
# A part of make long:
#
#   make megatron          all Megatron tests on every supported megatron-core
#
# FUSED_SFT_LOSS_WITHOUT=all (or names of csrc/toolchains/without.py) treats optional tools as absent, to test that.

PYTHON ?= python3
# A build for another device: make demo TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml
CXX_FILES := $(wildcard $(foreach ending,h cpp cu cuh,csrc/*.$(ending) csrc/*/*.$(ending) bench/without_gpu/*/*.$(ending)))

.PHONY: help demo test check long lint format bench gpu docs wheel wheel-check audit megatron megatron-docs
.PHONY: sanitize compute-sanitizer clean system
.DEFAULT_GOAL := help
.NOTPARALLEL:

ABSENT := $(if $(FUSED_SFT_LOSS_WITHOUT),$(shell FUSED_SFT_LOSS_WITHOUT='$(FUSED_SFT_LOSS_WITHOUT)' $(PYTHON) -B csrc/toolchains/without.py || echo wrong))
ifneq ($(filter wrong,$(ABSENT)),)
    $(error FUSED_SFT_LOSS_WITHOUT is wrong; the line above says what is)
endif
ifneq ($(filter triton,$(ABSENT)),)
    export PYTHONPATH := $(CURDIR)/tests/support/without_triton:$(PYTHONPATH)
endif
PEERS := $(if $(filter liger,$(ABSENT)),,build/peers/.installed)
FURTHER_MEGATRONS := $(if $(filter megatrons,$(ABSENT)),,build/megatron/.installed)

help:
	@sed -n 's/^#   make/make/p' Makefile

demo: $(VENV)/.installed
	$(BIN)/python -m bench sft

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2
test: $(VENV)/.installed $(PEERS)
	$(PYTEST) --dist worksteal -m "not long" $(PYTEST_ARGS)

long: $(VENV)/.installed $(PEERS) $(FURTHER_MEGATRONS)
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m long $(PYTEST_ARGS)

check: long audit wheel wheel-check sanitize compute-sanitizer

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python -m bench readme --check

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.installed
	$(BIN)/python -m bench kernels --model all --tp 1 2 --nproc 0 --scored 1.0 0.7 0.5 0.3 0.1 \
	    --seconds 0.06 --results bench/results
	$(BIN)/python -m bench readme

# A Python whose torch sees a GPU is taken as it is: nothing is installed or downloaded. Otherwise .venv is used.
BUDGET ?= 600
SEES_A_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
    GPU_PYTHON := $(shell $(PYTHON) -c '$(SEES_A_GPU)' 2>/dev/null && echo $(PYTHON))
endif
gpu: $(if $(GPU_PYTHON),,$(VENV)/.installed)
	$(or $(GPU_PYTHON),$(BIN)/python) -m bench gpu --budget $(BUDGET)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: pyproject.toml | $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

# FUSED_SFT_LOSS_BUILD and the variables of docs/install.md choose which, and for what. TOOLCHAINS=folder adds the
# toolkits in a folder, as csrc/toolchains/chroots.sh makes them. A GPU's runtime is never put into a wheel; where
# auditwheel finds no manylinux system that has all a wheel needs, the tag stays `linux`.
REPAIR := PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude 'libamdhip64.so*' --exclude 'libcuda*.so*'
wheel: $(VENV)/.installed
	rm -rf build/wheels dist/*.whl
	mkdir -p dist
	$(BIN)/python -m csrc.toolchains.wheels --outdir build/wheels $(if $(TOOLCHAINS),--toolchains '$(TOOLCHAINS)')
	for wheel in build/wheels/*.whl; do $(REPAIR) -w dist $$wheel || cp $$wheel dist; done
	$(BIN)/python tests/support/wheel_check.py dist/*.whl

wheel-check: $(VENV)/.installed
	@ls dist/*.whl >/dev/null 2>&1 || { echo "there is no wheel in dist/: make wheel"; exit 1; }
	$(BIN)/python tests/support/wheel_check.py --use dist/*.whl

audit: $(VENV)/.installed
	$(BIN)/python -m bench codegen --options

# A second copy of the package in build/, so that the installed one stays as it is. leaks: CPython's own.
SANITIZE := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
NATIVE_TESTS := backends/test_exp $(addprefix loss/test_,against_oracle bugs_of_peers bugs_of_peers_with_masks determinism \
    module_and_metrics grad_in_forward)
sanitize: $(VENV)/.installed
	FUSED_SFT_LOSS_BUILD=cpu CXXFLAGS="$(SANITIZE) -DFSL_TEST_HOOKS" $(BIN)/python setup.py -q build --build-base build/sanitize \
	    --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/lib:.:tests/support \
	OMP_NUM_THREADS=2 FSL_EXPECT_PACKAGE_IN=build/sanitize/lib $(BIN)/pytest -o pythonpath= -q -s \
	    -k "not eager and not simt" $(NATIVE_TESTS:%=tests/%.py)

# Memory, shared memory's races, barriers, and reads of what nobody wrote. Not Inductor's kernels, nor NCCL's.
compute-sanitizer: $(VENV)/.installed
	@if ! PATH="$$PATH:/usr/local/cuda/bin" command -v compute-sanitizer >/dev/null; then \
	    echo "SKIPPED: there is no compute-sanitizer on PATH (it comes with the CUDA toolkit); nothing was checked"; \
	elif ! $(BIN)/python -c 'import torch, sys; sys.exit(not torch.version.cuda or not torch.cuda.is_available())'; then \
	    echo "SKIPPED: there is no NVIDIA device here, or this torch does not use it; nothing was checked"; \
	else for tool in memcheck racecheck synccheck initcheck; do \
	    PATH="$$PATH:/usr/local/cuda/bin" compute-sanitizer --tool $$tool --error-exitcode 9 \
	        $(BIN)/python -m pytest -q tests/gpu/test_gpu.py -k "cuda and not compiled_step and not two_devices" || exit 1; \
	done; fi

$(VENV)/.installed: $(SOURCES)
	@$(MAKE) --no-print-directory system
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	@$(BIN)/python setup.py -q toolchains >/dev/null  # says what was built, and what was left out and why
	touch $@

# What ours is measured beside: never a dependency, hence a folder of its own that only those tests look into.
build/peers/.installed: | $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --target build/peers --upgrade liger-kernel==0.8.5
	touch $@

# Each in a folder of its own, for a fresh process with that folder in PYTHONPATH. 0.17 and later say they need
# Python 3.12, which their wheels for 3.11 do not.
MEGATRONS := 0.14.0 0.16.1 0.19.2
build/megatron/.installed: | $(VENV)/.installed
	for version in $(MEGATRONS); do \
	    $(BIN)/pip install --quiet --no-deps --ignore-requires-python --only-binary :all: --upgrade \
	        --target build/megatron/$$version megatron-core==$$version || \
	    { $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))' && \
	      echo "megatron-core $$version has no wheel for this Python: its tests are skipped"; } || exit 1; \
	done
	touch $@

megatron: $(VENV)/.installed $(FURTHER_MEGATRONS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/megatron/test_megatron_versions.py

# The tables of docs/megatron.md, measured anew: every layout on every version, and the peaks.
megatron-docs: $(VENV)/.installed build/megatron/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/megatron/megatron_docs.py

# Everything that is missing is named at once, before anything is installed.
PYTHON_H := import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
system:
	@status=0; check() { (eval "$$1") >/dev/null 2>&1 || { status=1; echo "missing: $$2: $$3" >&2; }; }; \
	check "$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'" "Python 3.10 or newer as $(PYTHON)" \
	    "apt-get install python3, or name another: make PYTHON=python3.12 ..."; \
	check "$(PYTHON) -c 'import ensurepip, venv'" "Python's venv module, to install into .venv" \
	    "apt-get install python3-venv"; \
	check '$(PYTHON) -c '"'"'$(PYTHON_H)'"'" "Python.h, to compile the native kernels" \
	    "apt-get install python3-dev"; \
	check 'set -- $${CXX:-c++}; command -v "$$1"' "the C++ compiler $${CXX:-c++}, to compile the native kernels" \
	    "apt-get install g++, or set CXX"; \
	if [ $$status = 0 ]; then $(PYTHON) -B -m csrc.toolchains.optional; else \
	    echo "nothing was installed" >&2; exit 1; fi

clean:
	rm -rf build dist *.egg-info fused_sft_loss/*.so bench-out
