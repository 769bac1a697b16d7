PYTHON ?= python3.11
FOURM = .venv/bin/python -m fourm

.PHONY: help install demo demo-quick test test-slow check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.venv/installed: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --progress-bar on torch torchvision
	.venv/bin/python -m pip install --quiet --progress-bar on -e '.[earth,dev]'
	touch $@

install: .venv/installed  ## build .venv with everything the demo and the tests need

demo: install  ## real pictures to any-to-any model to runs/demo/report.html, at most 30 minutes on 2 cores
	$(FOURM) run --config configs/demo/full.yaml

demo-quick: install  ## the same way with small budgets, at most 4 minutes
	$(FOURM) run --config configs/demo/quick.yaml

test: install  ## the test suite, at most 8 minutes on 2 cores
	.venv/bin/python -m pytest -m "not slow"

test-slow: install  ## the tests that take minutes each
	.venv/bin/python -m pytest -m slow

check: install  ## format, lint, types
	.venv/bin/ruff format --check fourm tests tools
	.venv/bin/ruff check fourm tests tools
	.venv/bin/mypy

clean:  ## remove runs and caches
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
