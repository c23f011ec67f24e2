# make install   .venv with everything pinned; takes under 2 s when nothing changed
# make serve     serve the default model on 127.0.0.1:8000 (PORT=9000 for another, MODEL=folder)
# make test      format check, lint, types, all tests
# make test-all  the same and the slow tests
# make test-gpu  tests that need a CUDA device, with PYTHON as it is (WHEELS=folder: unpack missing packages)
# make bench-gpu the GPU benchmark, likewise (both: PARTS="steps kernels tiles ..." RESULTS=folder)
# make wheels    collect packages for such a machine without a network (WHEELS=folder PACKAGES="names")
# make bench-sim  the simulator beside the real engine on this CPU, after a profile of it; wants a quiet machine
# make bench-auto the same for every way under a load that changes

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
RESULTS ?= build/gpu
TARGET ?= 3.12
PACKAGES ?= llguidance msgspec
MODEL ?=
BIN := $(VENV)/bin

.PHONY: install serve test test-all test-gpu bench-gpu wheels bench-sim bench-auto lint format

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard semipd/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/semipd serve $(MODEL) --port $(PORT)

lint: install
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: lint
	$(BIN)/python -m pytest -m "not gpu"

bench-sim: install
	$(BIN)/python -m benchmarks.sim_agreement

bench-auto: install
	$(BIN)/python -m benchmarks.changing_load

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# These two run where nothing of ours is installed; without a GPU they say so in one line and succeed.
test-gpu:
	WHEELS="$(WHEELS)" $(PYTHON) -u -m tests.gpu --results $(RESULTS) $(if $(PARTS),--parts $(PARTS))

bench-gpu:
	WHEELS="$(WHEELS)" $(PYTHON) -u -m benchmarks.gpu --out $(RESULTS)/gpu.json $(if $(PARTS),--parts $(PARTS))

# For Linux on x86-64 with the Python of TARGET. Dependencies are not followed: torch alone would bring gigabytes.
wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --python-version $(TARGET) --implementation cp \
		$(foreach n,39 35 34 31 28 27 24 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64 \
		--dest $(or $(WHEELS),build/wheels) $(PACKAGES)
