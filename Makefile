# What people and CI run. Needs Python 3.11 or later and make; everything else goes into .venv on the first run.
#
#   PYTHON=python3.12   the interpreter that creates .venv
#   JOBS=4              test processes (each uses threads of its own)
#   TIMEOUT_S=60        seconds after which a single test counts as hanging
#   PYTEST_ARGS=...     more arguments for pytest, such as "-k layers -x"

PYTHON ?= python3
JOBS ?= 2
TIMEOUT_S ?= 300
PYTEST_ARGS ?=
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
METADATA := pyproject.toml src/groupnorm/_version.py

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs questions gpu-kernels test-gpu bench-gpu clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/  make \1	\2/p' Makefile

demo: $(VENV)/.installed ## install the package and watch it work on a photograph
	$(BIN)/groupnorm demo

test: $(VENV)/.installed-dev ## run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --timeout $(TIMEOUT_S) $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict src

bench: $(VENV)/.installed ## measure this machine, beside every rival installed in .venv
	$(BIN)/groupnorm bench

docs: $(VENV)/.installed ## make the tables and charts of README and docs again from results/
	$(BIN)/groupnorm bench --report

questions: $(VENV)/.installed-dev ## run the commands that docs/questions.md shows, and write what they print
	$(BIN)/python -m groupnorm.bench.questions docs/questions.md

# What needs a GPU runs with any Python that has torch and Triton, from the checkout, with nothing installed by us.
GPU_PYTHON ?= $(PYTHON)

gpu-kernels: $(VENV)/.installed-dev $(VENV)/triton-3.6 ## compile every GPU kernel for three architectures, without a GPU; twenty minutes
	env -u TRITON_INTERPRET $(BIN)/python -m groupnorm.bench.gpu.kernels --save results/offline
	env -u TRITON_INTERPRET PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python -m groupnorm.bench.gpu.kernels --architectures 90 --save results/offline
	env -u TRITON_INTERPRET $(BIN)/python -m groupnorm.bench.gpu.predict --save results/offline

$(VENV)/triton-3.6: # the oldest version that the engine is for
	$(PIP) --no-deps --target $@ triton==3.6.0

test-gpu: ## on a GPU: the contract at full size, the same bits 1000 times, and compute-sanitizer if it is there
	PYTHONPATH=src $(GPU_PYTHON) -m groupnorm.bench.gpu.verify --save results

bench-gpu: ## on a GPU: tune the limits between regimes, then measure every case beside every rival installed
	PYTHONPATH=src $(GPU_PYTHON) -m groupnorm.bench.gpu.measure --save results

clean: ## remove caches and build products (not .venv)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

# ---- the environment: one stamp per set of packages, so that a second run installs nothing ---------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "groupnorm needs Python 3.11 or later; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
	    { rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments; install its venv module" >&2; exit 1; }

$(VENV)/.installed: $(METADATA) | $(BIN)/python
	$(PIP) --editable '.[plots]'
	@touch $@

# torch is pinned: left open, pip may choose a build that is gigabytes larger.
$(VENV)/.installed-dev: $(METADATA) | $(BIN)/python
	$(PIP) '$(TORCH)' --editable '.[dev,plots]'
	@touch $@ $(VENV)/.installed
