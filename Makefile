# Everything runs in .venv, made here with the versions of constraints.txt. Needs Python 3.11 or newer, and make.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NOTORCH := .venv-notorch/bin/python
OLDEST := .venv-oldest/bin/python
PYTEST := $(BIN)/python -m pytest

# Bytecode is kept: else every process that a test starts would compile the package again, and pytest all tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast slow check check-notorch check-oldest clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## Convert a Hugging Face Llama to Meta's layout and back, and compare every file
	@$(BIN)/python recipes/demo.py

test: $(INSTALLED) ## Run the tests, but for the slow ones; at most 840 CPU-seconds
	@tests/browser.sh --install >/dev/null || true  # the tests that need it fail with the same words
	@tests/compiler.sh --install >/dev/null || true
	@tests/azurite.sh --install >/dev/null || true
	$(BIN)/python -m tests.budget 840 $(PYTEST) -m "not slow" --numprocesses auto --dist loadfile

test-fast: $(INSTALLED) ## Run the tests of single modules; at most 60 CPU-seconds
	$(BIN)/python -m tests.budget 60 $(PYTEST) -m fast

slow: $(INSTALLED) ## Run the tests that kill, fail and restart processes at every call
	@for trainer in torchtune torchtnt composer; do tests/trainers.sh $$trainer --install >/dev/null || true; done
	$(PYTEST) -m slow --numprocesses auto --dist loadfile

check: $(INSTALLED) ## Check style (ruff), types (mypy) and who imports whom (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

check-notorch: $(INSTALLED) ## Run every command in .venv-notorch, without torch, and compare what it prints and writes
	@test -x $(NOTORCH) || $(PYTHON) -m venv .venv-notorch
	@$(NOTORCH) -m pip install -q --disable-pip-version-check -c constraints.txt .
	@! $(NOTORCH) -c 'import torch' 2>/dev/null
	$(BIN)/python -m tests.without_torch $(NOTORCH)

check-oldest: $(INSTALLED) ## The same in .venv-oldest, with the oldest versions that pyproject.toml allows
	@test -x $(OLDEST) || $(PYTHON) -m venv .venv-oldest
	@$(BIN)/python -m tests.without_torch --oldest >.venv-oldest/constraints.txt
	@$(OLDEST) -m pip install -q --disable-pip-version-check -c .venv-oldest/constraints.txt .
	$(BIN)/python -m tests.without_torch $(OLDEST)

clean: ## Remove .venv, .venv-notorch and .venv-oldest, the directories demo and runs with all that is in them, and all caches
	rm -rf .venv .venv-notorch .venv-oldest demo runs build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv (torch is large: this can take minutes) ...'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
