PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIBRARY = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
TOKENS := runs/python-library
SYSTEMS ?= dense ultramem_v2

.PHONY: help quickstart compare-small docs test test-thorough test-gpu check format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

quickstart: $(TOKENS)/manifest.json  ## train a small UltraMemV2 on Python's standard library, evaluate it, sample, report
	$(BIN)/ultramem train configs/quickstart.yaml
	$(BIN)/ultramem evaluate runs/quickstart
	$(BIN)/ultramem generate runs/quickstart 'def main(' 'import os' --max-new-tokens 64 --seed 1 --save
	$(BIN)/ultramem report runs/quickstart

compare-small: $(TOKENS)/manifest.json  ## train small models of SYSTEMS on the same tokens and print a table
	$(BIN)/python -m benchmarks.comparison $(SYSTEMS) --size small --config configs/quickstart.yaml \
		--directory runs/compare-small

$(TOKENS)/manifest.json: | $(VENV)/installed
	$(BIN)/ultramem tokenize '$(LIBRARY)' --include '*.py' --exclude 'site-packages/*' --train-bpe 4096 \
		--heldout 0.03 --on-error skip --processes 2 --output $(TOKENS)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

docs: $(VENV)/installed  ## write docs/configuration.md anew
	$(BIN)/python docs/generate_configuration.py

test: $(VENV)/installed  ## run the test suite
	$(BIN)/python -m pytest -n auto

test-thorough: $(VENV)/installed  ## run the property tests with 500 examples each, more than 10,000 in all
	$(BIN)/python -m pytest -n auto $(shell find tests -name test_properties.py) --hypothesis-profile=thorough

test-gpu: $(VENV)/installed  ## run the tests that use a GPU, the kernels' among them
	$(BIN)/python -m pytest tests/ops tests/tables tests/layers tests/hosts tests/training -m "kernels or gpu"

check: $(VENV)/installed  ## formatting, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed  ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
