# What `make setup` installs torch from; an installed torch (a GPU image's, say) is used as it is.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HAS_TORCH := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo yes)

.PHONY: setup check test lint bench report clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)
	$(if $(HAS_TORCH),,$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

check: setup
	$(BIN)/sparse-mla check --html report.html

test: setup
	$(BIN)/python -m pytest --cov --cov-report=term

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/sparse-mla bench

report: setup
	$(BIN)/sparse-mla check --json results.json --html report.html

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis report.html results.json
