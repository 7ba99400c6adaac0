VENV ?= .venv
PYTHON ?= python3
OUT ?= build/gpu
WHICH ?= not slow
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPERATORS := tests/attention tests/combiner tests/ttm tests/tubes
NEWEST := $(CURDIR)/build/triton-newest

.PHONY: test test-slow test-interpreted test-compiled test-lowest test-newest bench lint gpu clean

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,bench,dev]"
	touch $@

# Triton decides at import whether a kernel is interpreted or compiled, and two versions of it are compiled for: three
# processes, each of which keeps one core busy.
test: $(READY) $(NEWEST)/.ready
	$(MAKE) --jobs=3 --output-sync=target test-interpreted test-lowest test-newest

# What takes long: `make test` leaves it out, CI does not.
test-slow: $(READY) $(NEWEST)/.ready
	$(MAKE) --jobs=3 --output-sync=target WHICH=slow test-interpreted test-lowest test-newest

test-compiled: $(READY) $(NEWEST)/.ready
	$(MAKE) --jobs=2 --output-sync=target test-lowest test-newest

test-lowest: $(READY)
	$(BIN)/python -c "import triton; print('Triton', triton.__version__)"
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -p no:cacheprovider -m "$(WHICH)" tests/aot

test-newest: $(READY) $(NEWEST)/.ready
	PYTHONPATH=$(NEWEST) $(BIN)/python -c "import triton; print('Triton', triton.__version__)"
	TRITON_INTERPRET=0 PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -p no:cacheprovider -m "$(WHICH)" tests/aot

# Beside the environment, not in it: the package has one version, and this one compiles only.
$(NEWEST)/.ready: $(READY) constraints-newest.txt
	rm -rf $(NEWEST)
	$(BIN)/python -m pip install -q --no-deps --target $(NEWEST) -r constraints-newest.txt
	touch $@

test-interpreted: $(READY)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(WHICH)" --durations=10

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
	TRITON_INTERPRET=0 $(PYTHON) -m pytest $(OPERATORS) tests/test_model.py --junitxml=$(OUT)/tests.xml
	for tool in memcheck initcheck; do \
		TRITON_INTERPRET=0 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest $(OPERATORS) -k sanitizer || exit 1; \
	done
	$(PYTHON) bench/run.py --only all --full --device cuda --json $(OUT)/bench.json --plot $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info
