# `make` sets up and runs the pipeline, `make test` sets up and tests. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONHASHSEED := 0
# Compiled modules are kept, whatever the caller's environment says: without them every stage compiles its libraries anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: all setup repro test test-slow test-all check serve bench
all: repro

setup: $(VENV)/ready

# pip takes torch, so that an index with a CPU build is used where pip is set up for one; uv takes the rest, in parallel. Where
# uv cannot reach the index (it does not read pip's settings), pip does it.
$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; `$(PYTHON)` is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Setting up $(VENV) from requirements.txt (about 3 GB, one to three minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@python -m pip install --quiet --disable-pip-version-check -c requirements.txt pip uv torch
	@uv pip install --quiet -r requirements.txt || python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@if [ -e .git ]; then trunkline setup; fi
	@touch $@

repro: setup
	@trunkline repro; code=$$?; trunkline summary && exit $$code

test: setup
	@pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: setup
	@pytest -m "slow and not gpu"

test-all: setup
	@pytest -m "not gpu"

check: setup
	@ruff check . && ruff format --check . && mypy && python -m conf --check

serve: setup
	@python -m stages.serve

bench: setup
	@python -m tests.bench
