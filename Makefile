VENV ?= .venv
PYTHON ?= python3
OUT ?= build/gpu
WHICH ?= not slow
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPERATORS := tests/attention tests/combiner tests/ttm tests/tubes
INTERPRETED := interpreted-operators interpreted-rest
NEWEST := $(CURDIR)/build/triton-newest

.PHONY: test test-slow test-interpreted $(INTERPRETED) test-compiled test-lowest test-newest test-emulated emulated-lowest
.PHONY: emulated-newest test-browser demo-picture bench figures readme lint gpu clean

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,bench,dev,peers]"
	touch $@

# Triton decides at import whether a kernel is interpreted or compiled, and two versions of it are compiled for: processes of
# their own, each of which keeps one core busy, as do the halves of what is interpreted.
test: $(READY) $(NEWEST)/.ready
	$(MAKE) --jobs=3 --output-sync=target $(INTERPRETED) test-lowest test-newest

# What takes long: `make test` leaves it out, CI does not.
test-slow: $(READY) $(NEWEST)/.ready
	$(MAKE) --jobs=3 --output-sync=target WHICH=slow $(INTERPRETED) test-lowest test-newest

test-compiled: $(READY) $(NEWEST)/.ready
	$(MAKE) --jobs=2 --output-sync=target test-lowest test-newest

test-lowest: $(READY)
	$(BIN)/python -c "import triton; print('Triton', triton.__version__)"
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -p no:cacheprovider -m "$(WHICH)" tests/aot

test-newest: $(READY) $(NEWEST)/.ready
	PYTHONPATH=$(NEWEST) $(BIN)/python -c "import triton; print('Triton', triton.__version__)"
	TRITON_INTERPRET=0 PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -p no:cacheprovider -m "$(WHICH)" tests/aot

# Compiled kernels run on a CPU. `make test-emulated WHICH=slow` runs every rule in every configuration: an hour.
test-emulated: $(READY) $(NEWEST)/.ready
	$(MAKE) --jobs=2 --output-sync=target emulated-lowest emulated-newest

emulated-lowest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -m "$(WHICH)" tests/emulator --durations=5

emulated-newest: $(READY) $(NEWEST)/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -p no:cacheprovider -m "$(WHICH)" tests/emulator \
		-k "emulated or mutants" --durations=5

# Beside the environment, not in it: the package has one version, and this one compiles only.
$(NEWEST)/.ready: $(READY) constraints-newest.txt
	rm -rf $(NEWEST)
	$(BIN)/python -m pip install -q --no-deps --target $(NEWEST) -r constraints-newest.txt
	touch $@

# Renew tests/figures.json, what key paths cost: every change is held against it, and what changes in it is for the review.
figures: $(READY) $(NEWEST)/.ready
	rm -f tests/figures.json
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --renew-figures tests/guards
	TRITON_INTERPRET=0 $(BIN)/python -m pytest --renew-figures tests/aot/test_paths_aot.py
	TRITON_INTERPRET=0 PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest --renew-figures tests/aot/test_paths_aot.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --renew-figures tests/emulator -k "test_what_a_path or test_what_a_clip"

test-interpreted: $(INTERPRETED)

interpreted-operators: $(READY)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(WHICH)" --durations=10 $(OPERATORS)

interpreted-rest: $(READY)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(WHICH)" --durations=10 $(OPERATORS:%=--ignore=%)

# The demo's page in Chromium: `apt-get install chromium`, or MIRASOL_BROWSER=/path/to/chrome. SHOTS: a folder for pictures.
test-browser: $(READY)
	$(BIN)/python -m pytest -p no:cacheprovider tests/browser --durations=5 $(if $(SHOTS),--shots $(SHOTS))

# Renew docs/demo.png: `make demo-picture RUN=run/ CLIP=clip.mp4 ASKED='1.9 "What sounded first?"'`, seconds and a question.
demo-picture: $(READY)
	$(BIN)/python tests/browser/driver.py $(RUN) $(CLIP) docs/demo.png $(ASKED)

bench: $(READY)
	$(BIN)/python bench/run.py

# The numbers of README.md and docs/results.md, from bench/results.
readme: $(READY)
	$(BIN)/python bench/readme.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a CUDA GPU, with its own torch and triton, in one call of ten minutes: every step has a limit in seconds, and
# what fails or is cut off costs only itself. An interrupt lets pytest and the benchmarks write what they have.
GPU_STEPS := gpu-install gpu-tests gpu-memcheck gpu-initcheck gpu-racecheck
GPU_SUITES := gpu-attention gpu-ttm gpu-combiner gpu-tubes
INSTALL_LIMIT ?= 20
TESTS_LIMIT ?= 130
gpu-memcheck: CHECK_LIMIT := 60
gpu-initcheck gpu-racecheck: CHECK_LIMIT := 40
gpu-attention: SUITE_LIMIT := 200
gpu-ttm: SUITE_LIMIT := 45
gpu-combiner gpu-tubes: SUITE_LIMIT := 20
LIMIT := timeout --signal=INT --kill-after=5
TLX_PYTHON ?= # interpreter of an environment with torch and fbtriton

.PHONY: $(GPU_STEPS) $(GPU_SUITES) gpu-tune gpu-tune-attention gpu-tune-blocks

gpu:
	mkdir -p $(OUT)
	$(MAKE) --keep-going $(GPU_STEPS) $(GPU_SUITES)

gpu-install:
	$(LIMIT) $(INSTALL_LIMIT) $(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .

gpu-tests:
	TRITON_INTERPRET=0 $(LIMIT) $(TESTS_LIMIT) $(PYTHON) -m pytest $(OPERATORS) tests/test_model.py tests/streaming/test_on_gpu.py --junitxml=$(OUT)/tests.xml

gpu-memcheck gpu-initcheck gpu-racecheck: gpu-%:
	TRITON_INTERPRET=0 $(LIMIT) $(CHECK_LIMIT) compute-sanitizer --tool $* --error-exitcode 1 \
		$(PYTHON) -m pytest $(OPERATORS) -k sanitizer

$(GPU_SUITES): gpu-%:
	$(LIMIT) $(SUITE_LIMIT) $(PYTHON) bench/run.py --only $* --device cuda $(if $(TLX_PYTHON),--tlx-python $(TLX_PYTHON)) \
		--json $(OUT)/$*.json --plot $(OUT)

# Two further calls of ten minutes: block sizes of attention, and of the TTM and the Combiner.
gpu-tune: gpu-tune-attention gpu-tune-blocks

gpu-tune-attention gpu-tune-blocks: gpu-tune-%:
	mkdir -p $(OUT)
	$(LIMIT) 590 $(PYTHON) bench/tune/search.py $* --seconds 540 --json $(OUT)/tune-$*.json

clean:
	rm -rf $(VENV) build dist *.egg-info
