# Everything a user or a developer does, one short target each. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RECIPE ?= $(shell $(PY) -m trainer recipe 2>/dev/null || echo cpu)
RUN ?= $(RECIPE)
# Set TORCH_INDEX_URL to PyTorch's CPU wheel index to spare a machine without a GPU several GB of CUDA libraries.
TORCH_INDEX_URL ?=

# pip says a lot and little: show one counting line, and everything when it fails.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) --version): set PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ echo "could not make a virtual environment: on Debian, apt-get install python3-venv"; exit 2; }
	@if [ -n "$(TORCH_INDEX_URL)" ]; then $(PY) -m pip install -c constraints.txt --index-url $(TORCH_INDEX_URL) torch; fi
	@echo "installing $(1) dependencies into $(VENV) (a minute or two, once)"
	@$(PY) -m pip install -c constraints.txt -e '.[$(1)]' > $(VENV)/install.log 2>&1 & pid=$$!; \
		trap 'kill $$pid 2>/dev/null' INT TERM; \
		while kill -0 $$pid 2>/dev/null; do \
			if [ -t 1 ]; then printf '\r  %s packages, %s s' "$$(grep -c -E '^Collecting' $(VENV)/install.log || true)" "$$SECONDS"; fi; sleep 1; \
		done; \
		wait $$pid || { echo; tail -n 20 $(VENV)/install.log; echo "the installation failed; all of it: $(VENV)/install.log"; exit 1; }; \
		if [ -t 1 ]; then echo; fi
	@touch $@
endef

.PHONY: prove-resume help demo up down train test test-slow test-redis prove-queue prove-engine fuzz-api check format bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

$(VENV)/.local: pyproject.toml constraints.txt
	$(call install,local)

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(VENV)/.local

demo: $(VENV)/.local ## the whole loop: data, training, export, then the stack of `make up`
	@$(PY) dev.py demo

up: $(VENV)/.local ## Redis, api, worker and page in the foreground; Ctrl-C stops all of it
	@$(PY) dev.py up

down: ## stop a stack that runs in the background
	@$(PY) dev.py down

train: $(VENV)/.local ## train RECIPE= (default: cpu, or original on a CUDA GPU) as RUN=
	@$(PY) -m trainer train $(RECIPE) --run $(RUN)

test: $(VENV)/.dev ## install what the tests need and run them
	@command -v chromium > /dev/null || { echo "installing chromium for the browser tests (once)"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get -q update > /dev/null && apt-get -q -y install --no-install-recommends chromium > /dev/null; } || \
		{ echo "the browser tests need chromium on PATH (on Debian: sudo apt-get install chromium)"; exit 2; }
	@$(PY) -m pytest -m "not slow"

test-slow: $(VENV)/.dev ## the tests that take minutes
	@$(PY) -m pytest -m slow

test-redis: $(VENV)/.dev ## the queue's and the end-to-end tests on another server: SERVER=/path/to/redis-server
	@$(PY) -m pytest --redis-server $(SERVER) tests/service/queue tests/service/test_worker.py tests/e2e

prove-queue: $(VENV)/.dev ## hundreds of kills of workers, API processes and Redis under load (half an hour)
	@$(PY) -m benchmarks.prove_queue

prove-resume: $(VENV)/.dev ## kill a training 25 times; its end must equal an undisturbed one's, to the bit
	@$(PY) -m benchmarks.prove_resume

prove-engine: $(VENV)/.dev ## a thousand random requests: the engine against the plain loop
	@$(PY) -m benchmarks.oracle

fuzz-api: $(VENV)/.dev ## 100,000 random requests, and half an hour of schemathesis on every route
	@$(PY) -m benchmarks.fuzz_api

check: $(VENV)/.dev ## format, lint, types, import walls
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

format: $(VENV)/.dev ## rewrite the code in the one format
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

bench: $(VENV)/.dev ## the benchmarks, printed as tables
	@$(PY) -m benchmarks

clean: ## forget the environment and the local stack's state; keeps data, runs and models
	rm -rf $(VENV) .smollm .mypy_cache .ruff_cache .pytest_cache
