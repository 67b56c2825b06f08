# Two commands: `make run` makes music and a report, `make test` checks everything.
# Needs Python 3.11 or newer with pip, and make. On Windows see docs/platforms.md.

PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
JOBS ?= 0
else
BIN := $(VENV)/bin
JOBS ?= 2
endif
PROFILE ?= quick
PIP := $(BIN)/python -m pip --disable-pip-version-check

# How long a waiting OpenMP thread spins (lmd/__init__.py): for kernels that import torch first.
export GOMP_SPINCOUNT ?= 10000

.PHONY: run test lint lab install lock clean

run: install ## everything: scores to a streamed wave and outputs/quick/report.html
	$(BIN)/python -m lmd run --profile $(PROFILE)

test: lint ## everything: lint, formatting, import contract, tests in JOBS processes, then those that must be alone
	$(BIN)/python -m pytest -m "not alone" --numprocesses $(JOBS) --dist loadfile \
	  --no-loadscope-reorder --max-worker-restart 0
	$(BIN)/python -m pytest -m alone

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

lab: install ## JupyterLab at the first notebook
	$(BIN)/jupyter lab --ip 127.0.0.1 notebooks/00_listen.ipynb

# Installs again only when the lock file's content has changed since the last time.
install:
	@cmp -s requirements.lock $(VENV)/installed.lock || $(MAKE) --no-print-directory reinstall

.PHONY: reinstall
reinstall:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "found $$($(PYTHON) --version); expected Python 3.11 or newer. Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps -e .
	@cp requirements.lock $(VENV)/installed.lock

lock: ## write the versions of this environment down
	$(BIN)/python tools/lock.py > requirements.lock.new && mv requirements.lock.new requirements.lock

clean: ## remove what `make run` wrote, not the environment
	rm -rf outputs/smoke outputs/quick
