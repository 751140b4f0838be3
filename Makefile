# What people do daily. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Debian's OpenBLAS makes MLX's float32 on Linux about 25 times faster; nothing is preloaded where it is missing, or on macOS.
BLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libblas.so.3))
RUN := $(if $(BLAS),LD_PRELOAD=$(BLAS)) $(BIN)/

.DEFAULT_GOAL := help
.PHONY: help demo chat serve test test-all test-cpu test-metal test-without-linux heavy check fuzz quality bench docs build clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / /' | awk '{name=$$1; $$1=""; printf "make %-18s %s\n", name, $$0}'

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -I cli/ifprune_cli/machine_check.py || { echo "with another Python: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed  ## answer three instructions, dense beside sliced (ARGS=--json for one line)
	$(RUN)ifprune demo $(ARGS)

chat: $(VENV)/installed  ## chat with the embedded model
	@$(RUN)ifprune chat $(ARGS)

serve: $(VENV)/installed  ## serve the embedded model, with a page to chat in the browser (ARGS="--port 8081")
	@$(RUN)ifprune serve --ui $(ARGS)

# One BLAS thread a process: the processes are as many as the cores.
# Its sitecustomize.py begins every process of the tests, also those that tests start.
DISGUISE := $(CURDIR)/tests/disguise
PYTEST := OPENBLAS_NUM_THREADS=1 $(RUN)python -m pytest -n auto

test: $(VENV)/installed  ## run the quick tests: minutes, no real model
	$(PYTEST) -m 'not (real or slow or heavy)' $(ARGS)

test-all: test  ## run the quick tests, then those with the real model and the long ones
	$(PYTEST) -m '(real or slow) and not heavy' $(ARGS)

test-cpu: $(VENV)/installed  ## as test-all, on the CPU where there is a GPU as well
	PYTHONPATH=$(DISGUISE) IFPRUNE_TEST_DEVICE=cpu $(MAKE) test-all

test-metal: $(VENV)/installed  ## run the tests of what a GPU may do otherwise: minutes
	$(RUN)python -m pytest -m 'metal and not (slow or heavy)' $(ARGS)

test-without-linux: $(VENV)/installed  ## run the tests without what only Linux has, and without OpenBLAS
	PYTHONPATH=$(DISGUISE) IFPRUNE_TEST_HIDE_LINUX=1 $(BIN)/python -m pytest -n auto -m 'not (real or heavy)' $(ARGS)

heavy: $(VENV)/installed  ## run the tests that take long or need llama-cpp-python as well
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[heavy]'
	$(RUN)python -m pytest -m heavy $(ARGS)

fuzz: $(VENV)/installed  ## damage files and requests for ten minutes and see that nothing breaks (ARGS="--seed 1")
	OPENBLAS_NUM_THREADS=1 $(RUN)python -m tests.fuzz $(ARGS)

# Types are checked as both systems see them: each has calls that the other has not.
check: $(VENV)/installed  ## lint, check formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --platform darwin
	$(BIN)/mypy --platform linux

quality: $(VENV)/installed  ## evaluate the shipped default beside its controls (ARGS="--limit 30": minutes)
	$(RUN)python scripts/evaluate_default.py $(ARGS)

bench: $(VENV)/installed  ## measure the embedded model, dense and sliced
	$(RUN)ifprune bench $(ARGS)

docs: $(VENV)/installed  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/installed  ## build wheel and sdist into dist/
	$(BIN)/python -m build --outdir dist

clean:  ## remove .venv, caches and build results
	rm -rf $(VENV) .cache dist site .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
