# Everything lives in .venv here; models and texts are cached in ~/.cache/nemo_minitron (or $NEMO_MINITRON_CACHE).

PYTHON ?= python3
# Interpreters of `make compat`.
PYTHON311 ?= python3.11
PYTHON3112 ?= /usr/bin/python3.11
PYTHON312 ?= python3.12
PYTHON313 ?= python3.13
RUN ?= runs/demo
TESTS ?= tests
# Test files that run at a time; the ones that start ranks take about 1 GB per rank.
WORKERS ?= 2
# Where torch comes from; empty for pip's ordinary index, whose build for Linux brings some gigabytes of CUDA. PyTorch
# keeps an index of builds for CPUs, a tenth of that: make install TORCH_INDEX_URL=...
TORCH_INDEX_URL ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip draws progress on a terminal; elsewhere only errors are of use.
PIP_INSTALL := $(PIP) install $(if $(MAKE_TERMOUT),,--quiet --quiet) --constraint constraints.txt

.DEFAULT_GOAL := help

.PHONY: help
help:  ## show this list
	@echo "make TARGET  (PYTHON=$(PYTHON) RUN=$(RUN) TESTS=$(TESTS) WORKERS=$(WORKERS))"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 15

.PHONY: install
install: $(STAMP)  ## make .venv and install the tested set into it (three to ten minutes, 3 GB without CUDA)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 install" >&2; exit 1; }
	@echo "Installing 180 packages into $(VENV): three to ten minutes, 3 GB on disk without CUDA. Nothing outside it changes."
	@command -v nvidia-smi >/dev/null || test -n "$(TORCH_INDEX_URL)" || test "$$(uname)" != Linux \
	  || echo "No NVIDIA GPU here. If pip starts on packages named nvidia-*, TORCH_INDEX_URL (see Makefile) saves 4 GB."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1/2 torch"
	@$(if $(TORCH_INDEX_URL),PIP_INDEX_URL=$(TORCH_INDEX_URL)) $(PIP_INSTALL) torch==2.13.0
	@echo "2/2 nemo_minitron with NeMo, Megatron-Core, Lightning and the tools of its tests"
	@$(PIP_INSTALL) --editable '.[train,eval,test]'
	@echo "Installed; $(BIN)/nemo-minitron doctor says what is there."
	@touch $@

.PHONY: demo
demo: $(STAMP)  ## prune and distill a real model, SmolLM2-135M, into RUN
	$(BIN)/nemo-minitron demo --run-dir $(RUN)

PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: test
test: lint  ## lint, then the tests in TESTS that are not slow (under a quarter of an hour on two cores)
	$(PYTEST) -m "not slow" $(TESTS)

.PHONY: test-all
test-all: lint  ## lint, then every test in TESTS, as CI does (under forty minutes)
	$(PYTEST) $(TESTS)

.PHONY: lint
lint: $(STAMP)  ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: compat
compat:  ## run the tiny recipe with each pinned set; writes docs/compatibility.md (16 GB, an hour)
	python3 tests/compat/matrix.py --python 3.11=$(PYTHON311) --python 3.11.2=$(PYTHON3112) \
	  --python 3.12=$(PYTHON312) --python 3.13=$(PYTHON313)

.PHONY: constraints
constraints: $(STAMP)  ## write constraints.txt from what is installed in .venv
	{ sed -n '/^#/p' constraints.txt; \
	  $(PIP) freeze --exclude-editable | sed -n '/==/{s/+.*//;p}' | grep -viE '^(nvidia|cuda|triton)'; } > constraints.new
	mv constraints.new constraints.txt

# On a machine with a card `make gpu` takes the interpreter that has its torch; it installs nothing.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
DIR ?= gpu-bundle
SETS ?= base

.PHONY: gpu
gpu:  ## everything that only a card can show, in 8 minutes at most (GPU_PYTHON; OUT: where results go; TINY=1: on a CPU)
	$(GPU_PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

.PHONY: gpu-bundle
gpu-bundle:  ## collect into DIR what `make gpu` needs on a machine without an index (SETS="base nemo model engine peers")
	$(GPU_PYTHON) -m benchmarks.gpu.bundle $(DIR) --sets $(SETS)

.PHONY: clean
clean:  ## remove caches and build products; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
