# The project's commands, all of them. CI and CONTRIBUTING.md call exactly these.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fptquant
TORCH := torch==2.13.0
C_FILES := $(shell find csrc tests/csrc -name '*.[ch]')

.PHONY: help setup test lint docs demo bench clean

help:
	@echo "make demo   install everything, calibrate SmolLM2-135M and print a table (minutes for each)"
	@echo "make test   every test, the C tests under sanitizers included (under 10 minutes)"
	@echo "make lint   formatting, lint and types"
	@echo "make docs   the documentation as a site, in build/docs; a broken link is an error"
	@echo "make bench  the figures in the README, measured anew"
	@echo "make setup  only install, into $(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fptquant needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py $(shell find csrc -name '*.[ch]') | $(BIN)/python
	@echo "installing PyTorch, then fptquant and what it needs, into $(VENV): some minutes"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

setup: $(STAMP)

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

docs: setup
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --conf-dir docs . build/docs
	@echo "open build/docs/docs/index.html"

demo: setup
	$(BIN)/fptquant table demo --overwrite

bench: setup
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build $(VENV) *.egg-info fptquant/*.so
