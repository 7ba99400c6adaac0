VENV ?= .venv
PYTHON ?= python3
OUT ?= build/gpu
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: test test-interpreted test-compiled bench lint gpu clean

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,bench,dev]"
	touch $@

# Triton decides at import whether a kernel is interpreted or compiled: two processes.
test: test-compiled test-interpreted

test-compiled: $(READY)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/aot

test-interpreted: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python bench/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a CUDA GPU, with its own torch and triton: tests, memory checks, then benchmarks with peers.
gpu:
	mkdir -p $(OUT)
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
	TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/gpu --junitxml=$(OUT)/tests.xml
	for tool in memcheck initcheck; do \
		TRITON_INTERPRET=0 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest tests/gpu -k sanitizer || exit 1; \
	done
	$(PYTHON) bench/run.py --only all --full --device cuda --json $(OUT)/bench.json --plot $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info
