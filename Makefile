# `make demo` and `make test` are all the set-up there is: each makes .venv and installs what it lacks, once.
# Needs Python >= 3.10, make and, the first time, a package index. Another interpreter: make PYTHON=python3.12 test

PYTHON  ?= python3 python3.13 python3.12 python3.11 python3.10 python
VENV    := .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check --no-input install -q -q -c constraints.txt
TORCH   := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
WORKERS ?= 2
PYTHON_OLDEST ?= python3.11
CORE_TESTS := $(addprefix tests/test_,combine.py skip.py guider.py apply_module.py inputs.py pipelines.py caches.py)

# Two test workers with one torch thread each beat one with two, and never fight over the cores.
PYTEST  := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo bench docs test test-slow test-oldest test-with slow lint format typecheck build clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.demo ## make videos with and without guidance in demo/, on a CPU
	$(PY) -m stg_hooks.demo --out demo

bench: $(VENV)/.test ## what a guided step costs: tables, JSON and plots in benchmarks/results/ (BENCH="--quick" to try it)
	$(PY) -m benchmarks.cost $(BENCH)

docs: $(VENV)/.test ## the documentation in site/; needs no network
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

test: lint typecheck ## lint, types, and every test that is not slow
	$(PYTEST) -m "not slow"

test-slow: test slow ## the same, then the slow tests

# $(1): a folder, $(2): versions
define test_in_a_fresh_environment
	rm -rf $(1)
	$(PYTHON_OLDEST) -m venv $(1)
	$(1)/bin/python -m pip install -q -q setuptools $(2) einops hypothesis pillow pytest pytest-timeout pytest-xdist
	OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n $(WORKERS) -m "not slow" $(CORE_TESTS)
endef

test-oldest: ## fast tests of the core, skip, Guider and apply with the oldest supported versions, in a fresh .venv-oldest
	$(call test_in_a_fresh_environment,.venv-oldest,$(shell sed '/^\#/d' constraints-oldest.txt))

test-with: ## the same with others, in a fresh .venv-with: make test-with VERSIONS="diffusers==0.38.0 transformers accelerate"
	$(call test_in_a_fresh_environment,.venv-with,$(if $(findstring torch==,$(VERSIONS)),,$(TORCH)) scipy $(VERSIONS))

slow: $(VENV)/.test
	@echo "slow tests:"
	@$(PYTEST) -m slow || { code=$$?; test $$code -eq 5 && echo "there are no slow tests" || exit $$code; }

lint: $(VENV)/.test ## ruff: rules and format
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(VENV)/.test ## let ruff fix what it can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

typecheck: $(VENV)/.test ## mypy, strict
	$(PY) -m mypy

# The wheel is built from the sdist, in a temporary folder, so no stale build/ can leak into it.
build: $(VENV)/.test ## sdist and wheel in dist/, looked into and imported
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist
	$(PY) -m twine check --strict dist/*
	STG_HOOKS_WHEEL="$$(ls $(CURDIR)/dist/*.whl)" $(PY) -m pytest -q tests/test_packaging.py

clean: ## remove what the targets made, .venv included
	rm -rf $(VENV) .venv-oldest .venv-with build dist demo site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than everything it was made from; a failed step leaves none. torch goes first and by its exact version:
# a range would admit a newer release, and with it gigabytes that nothing here needs.
$(VENV)/.torch: constraints.txt
	@test -n "$(TORCH)" || { echo "constraints.txt pins no torch version" >&2; exit 1; }
	@set -e; \
	for candidate in $(PYTHON); do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if test -z "$$python"; then \
		echo "stg_hooks needs Python >= 3.10; found none among: $(PYTHON)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	test -x $(PY) || { echo "making $(VENV) with $$($$python --version)"; $$python -m venv $(VENV); }
	@echo "installing $(TORCH) (once; a minute or more)"
	@$(PIP) setuptools $(TORCH)
	@touch $@

$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing stg-hooks[$*] in $(VENV)"
	@$(PIP) --no-build-isolation -e ".[$*]"
	@test $* != test || $(PIP) --no-deps k-diffusion dctorch DeepCache
	@touch $@
