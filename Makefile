# The first target that needs .venv makes it. Nothing is installed by hand; only gpu-check needs a GPU.
PYTHON ?= python3
TORCH ?= 2.11.0
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
FOLDERS := plan kernels model data parallel checkpoint launch eval train report slurm benchmarks
STAMP := .venv/.minka-installed

.DEFAULT_GOAL := demo
.PHONY: help demo test test-all test-torch lint bench bench-kernels gpu-check gpu-check-first gpu-check-training clean

help: ## print the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1@\2/p' $(MAKEFILE_LIST) | while IFS=@ read -r target text; do \
		printf '%-20s %s\n' "$$target" "$$text"; done

demo: $(STAMP) ## train the demo recipe: minutes on two cores
	$(BIN)/minka train demo

test: $(STAMP) ## the fast tests: at most 15 minutes on two cores
	$(PYTEST) -m "not slow and not long"

test-all: $(STAMP) ## everything
	$(PYTEST)
	$(PYTEST) -m gpu

test-torch: ## the fast tests on a different torch, in an environment of its own
	test -x .venv-torch/bin/python || $(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet 'torch==$(TORCH)' --editable '.[dev]'
	.venv-torch/bin/python -m pytest -m "not slow and not long"

lint: $(STAMP) ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## speed compared with a peer, as ratios with their bounds
	$(BIN)/python -m minka.benchmarks.training

# For a machine that already has torch with CUDA: these use no network and no .venv.
bench-kernels: ## every operation by torch, torch.compile and Triton; writes kernels/choices.toml
	PYTHONPATH=.ns:$$PYTHONPATH $(PYTHON) -m minka.benchmarks.kernels --write

gpu-check: gpu-check-first gpu-check-training ## on a GPU, in two calls of at most nine minutes

gpu-check-first: ## the demo as a command, the tests that need a GPU, bench-kernels
	PYTHONPATH=.ns:$$PYTHONPATH $(PYTHON) -m minka.benchmarks.gpu_check first

gpu-check-training: ## training steps at real sizes; adds rows to plan/measured.csv
	PYTHONPATH=.ns:$$PYTHONPATH $(PYTHON) -m minka.benchmarks.gpu_check training

clean: ## remove what can be made again; runs/ and stores/ stay
	rm -rf .venv .venv-torch build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard $(FOLDERS)) tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: a few minutes the first time"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
