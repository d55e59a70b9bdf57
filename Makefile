# Sets up everything in VENV on first use and reuses it afterwards.
#
#   make demo       a small training run on drawn data, on the CPU
#   make test       the tests             make lint    all style and type checks
#   make bench      the benchmarks        make clean   remove what was built (the virtual environment stays)
#   make format     apply the styles      make schema  write configs/schema.json and docs/settings.md
#   make wheel      dist/*.whl, with CUDA code for all architectures, tried by wheel-check
#   make wheel-check  install the newest wheel in a new environment and train with it outside the clone
#   make gpu-check  tests, memory checks and benchmarks on a machine with a GPU
#   make gpu-bundle one file that does the same on a machine without a network: tar xf FILE; bash gpu_check.sh first
#
# `make bench ARGS="contrast --size voc"` hands options to `python -m bench ops`. gpu-check runs two sets of under six
# minutes each; ARGS="first --out DIR" runs one and says where its archive goes. For gpu-bundle, ARGS="--without numpy"
# leaves out a package that the machine has.
# PYTHON chooses the interpreter (3.10 to 3.12), VENV the virtual environment, PRCL_NO_NATIVE=1 builds no native library.
# TORCH_CUDA_ARCH_LIST="8.0;9.0" chooses the architectures of the CUDA code. Without it `make wheel` compiles for all,
# and every other target for the GPU that is there, or for 9.0, in a third of the time.
# `make wheel-check PYTHON=python3.12 TORCH=torch==2.11.0` tries the wheel with another Python and PyTorch.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
FORMATTED := $(filter %.h %.cuh %.cpp %.cu,$(NATIVE_SOURCES) $(shell find tests/support/cuda_emulation -type f))
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  grep -E '^([89]|1[0-9])[.][0-9]$$' | sort -u | paste -s -d ';' -)
ARCHITECTURES = $(or $(TORCH_CUDA_ARCH_LIST),$(GPUS),9.0)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: demo test lint format schema bench gpu-check gpu-bundle install wheel wheel-check clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/prcl demo

test: install
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# The JSON schema of a configuration, from which editors complete keys, and the page of all settings.
schema: install
	$(BIN)/python -m prcl_fast.config > configs/schema.json
	$(BIN)/python -m prcl_fast.config --settings > docs/settings.md

bench: install
	$(BIN)/python -m bench ops --json bench/results/local/bench.json $(ARGS)

gpu-check: install
	$(BIN)/python -m bench gpu $(or $(ARGS),first second)

gpu-bundle: install
	$(BIN)/python -m bench gpu-bundle $(ARGS)

install: $(VENV)/.built

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "make: $(PYTHON) is not Python 3.10, 3.11 or 3.12; choose one, such as: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# PyTorch first: the others are resolved against the pinned one.
$(VENV)/.requirements: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/python -m pip install -q -r constraints.txt
	@touch $@

# The library is built before pip runs, because pip hides what a build prints; its own build then has nothing left to do.
$(VENV)/.built: $(VENV)/.requirements setup.py pyproject.toml $(NATIVE_SOURCES) $(wildcard prcl_fast/reference/*.py)
	TORCH_CUDA_ARCH_LIST='$(ARCHITECTURES)' $(BIN)/python -W ignore setup.py -q build_ext --inplace
	TORCH_CUDA_ARCH_LIST='$(ARCHITECTURES)' $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# In folders of its own: what was built for this machine stays, and no module that is gone gets into the wheel.
wheel: $(VENV)/.requirements
	rm -rf build/wheel
	$(BIN)/python -W ignore setup.py -q build --build-base build/wheel bdist_wheel --bdist-dir build/wheel/contents
	$(MAKE) --no-print-directory wheel-check

# Outside the clone, whose files would stand in for those that the wheel lacks. PyTorch first, as above.
wheel-check:
	rm -rf build/wheel-check
	$(PYTHON) -m venv build/wheel-check/venv
	grep -v '^torch=\|^triton=' constraints.txt > build/wheel-check/constraints.txt
	build/wheel-check/venv/bin/python -m pip install -q '$(TORCH)'
	build/wheel-check/venv/bin/python -m pip install -q -c build/wheel-check/constraints.txt \
	  "$$(ls -t dist/prcl_fast-*.whl | head -n 1)"
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cd "$$folder" && unset PYTHONPATH && \
	  PATH="$(CURDIR)/build/wheel-check/venv/bin:$$PATH" && prcl doctor && \
	  prcl train configs/demo.yaml output=run train.iterations=4 data.synthetic.unlabeled=8 data.synthetic.val=8

clean:
	rm -rf build dist *.egg-info prcl_fast/_native.so prcl_fast/_native_cuda.so $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
