# `make` alone lists the targets. Each one installs first what it needs.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL_CATALOG ?= embedded
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup demo run test check fix bench bench-gpu

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=$(PYTHON) creates the environment; ARGS=... goes to pytest, the demo or the benchmark."

setup: $(INSTALLED) ## Create .venv and install the pinned packages; nothing to do when unchanged

# No file but these two decides what is installed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or later is needed:" \
	    "make PYTHON=python3.11" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing the packages of constraints.txt; the first time takes a minute or more"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## Start a server, make one picture an era, write them to out/
	@$(BIN)/python tools/demo.py $(ARGS)

run: setup ## Serve; MODEL_CATALOG=embedded (the default) needs no download
	@exec env MODEL_CATALOG=$(MODEL_CATALOG) $(BIN)/controlnet-worker serve $(ARGS)

test: setup ## Run the tests that need no GPU, in two processes
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: setup ## Format, lint, types and import rules, without changing anything
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports

fix: setup ## Format, and mend what the linter can mend by itself
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup ## Measure a running installation over HTTP
	@$(BIN)/python -m benchmarks.http $(ARGS)

bench-gpu: setup ## Measure the engine beside diffusers on this GPU; BENCHMARKS.md explains it
	@$(BIN)/python -m benchmarks.gpu $(ARGS)
