VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: test bench lint gpu clean

$(BIN)/.ready: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,bench,dev]"
	touch $@

test: $(BIN)/.ready
	$(BIN)/python -m pytest

bench: $(BIN)/.ready
	$(BIN)/python bench/run.py

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
