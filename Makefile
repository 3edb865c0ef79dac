# Everything runs from a fresh clone: the environment is made on first use and nothing is installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test cluster-test lint types format clean

setup: $(STAMP)

# torch first and under the constraints, so that no other package replaces it by a larger build.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/lmp demo --out demo-out

# Two files at a time, in order: those on SLURM come first, for they mostly wait.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
	@echo "all tests passed; 'make demo' shows the whole path, docs/ has a guide for each journey"

# On a real SLURM of virtual nodes; `make test` has these too where its packages are installed.
cluster-test: $(STAMP)
	$(BIN)/python -m pytest -m slurm tests/cluster

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo-out runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
