# Set-up, runs and tests. `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Where pip finds no CPU build of torch by itself, PyTorch's own index of CPU builds has it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==\(.*\)/torch==\1+cpu/p' requirements.lock)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-fast bench gpu experiments lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

setup: $(VENV)/complete ## make .venv with the exact versions of requirements.lock and the CPU build of torch

$(VENV)/complete: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-deps '$(TORCH)' || $(BIN)/pip install --no-deps '$(TORCH)' --index-url $(TORCH_CPU_INDEX)
	$(BIN)/pip install --no-deps -r requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	touch $@

run: setup ## align, fine-tune with Lisa on SST-2 with 10 % harmful rows, evaluate
	$(BIN)/python run.py experiment=sst2_lisa

test: setup ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup ## all but those that run whole commands, every config or method, models of true widths or published sets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

bench: setup ## measure against the published implementations, into benchmarks/results (twenty minutes)
	$(BIN)/python -m benchmarks

gpu: ## check this machine's GPU, and measure it into benchmarks/results (ten minutes; in an environment with a GPU's torch)
	python -m pytest -m gpu -p no:xdist tests/test_gpu.py

experiments: setup ## measure a claim of experiments/: make experiments CLAIM=harmful_ratio MORE="seed=1"
	$(BIN)/python -m experiments $(CLAIM) $(MORE)

lint: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

clean: ## remove .venv and caches of tools; outputs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
