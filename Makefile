# `make` alone lists the targets.

PYTHON ?= python3
# Extra pip arguments for torch alone, to choose its build. A small one for the CPU:
#   make venv TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=

VENV := .venv
DIVERSE := src/ipdiverse/critters/weights/adapters/ip-adapter-diverse_critters.safetensors
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
TORCH := $(shell sed -n 's/^torch==.*/&/p' requirements.lock)

# What only an extra brings may be missing; anything else that fails to import is a fault.
define IMPORT_EVERYTHING
import importlib, pkgutil, ipdiverse
optional, count = {"gradio", "tensorboard"}, 0
for module in pkgutil.walk_packages(ipdiverse.__path__, "ipdiverse."):
    if module.name.endswith(".__main__"):
        continue
    try:
        importlib.import_module(module.name)
        count += 1
    except ModuleNotFoundError as error:
        if error.name not in optional:
            raise
        print(f"skipped {module.name}: {error.name} is not installed")
print(f"{count} modules import")
endef
export IMPORT_EVERYTHING

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test check house docs fmt benchmarks base gates adapters spaces study study-quick study-real clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create .venv with the locked versions (PYTHON=python3.12 picks another)

# torch first and alone: resolved together with the rest, a plain torch brings gigabytes of CUDA
# where a CPU build was asked for; once it is there, the lock's torch==X accepts X+cpu as it is.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ipdiverse needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) '$(TORCH)'
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

demo: $(STAMP) ## draw a first set of images into out/demo, on the embedded model
	$(BIN)/ipdiverse demo --out out/demo

# One thread a process: two workers with two threads each only get in each other's way.
test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

house: $(STAMP) ## count files, lines, import circles and what one image walks through
	$(BIN)/python -m workshop.house

check: $(STAMP) docs house ## format, lint, types, layers, docs, and that every module imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -c "$$IMPORT_EVERYTHING"

docs: $(STAMP) ## build the site into build/site; a warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

fmt: $(STAMP) ## format, and mend what can be mended
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

# --small is the embedded base; what docs/inference.md tells of Stable Diffusion 1.5 takes far longer.
# On a GPU add `python benchmarks/inference.py --base sd15 sdxl --sizes 512 1024 --steps 30 --out FILE`.
ROUNDS ?= 15
CLUSTER ?= driver workers model
benchmarks: $(STAMP) ## time all that has a peer, into out/benchmarks.md (ROUNDS=1 for a look)
	mkdir -p out/benchmarks
	$(BIN)/python benchmarks/render.py
	for part in generate dial fast attention training peers; do \
		$(BIN)/python benchmarks/$$part.py --rounds $(ROUNDS) --out out/benchmarks/$$part.json \
			|| exit 1; done
	$(BIN)/python benchmarks/inference.py --small --rounds $(ROUNDS) \
		--out out/benchmarks/inference.json
	$(BIN)/python benchmarks/cluster.py $(CLUSTER) --out out/benchmarks/cluster.json
	$(BIN)/python benchmarks/page.py out/benchmarks --json out/benchmarks.json --page out/benchmarks.md

study-quick: $(STAMP) ## a coarse curve of variety against fidelity, in minutes
	$(BIN)/ipdiverse evaluate --quick --out out/study-quick

study: adapters ## the whole study (hours; it resumes)
	$(BIN)/python studies/fusion_maps.py runs/adapters/*-gated-seed0/adapter.safetensors \
		runs/adapters/*-blend*-seed0/adapter.safetensors --out docs/study
	$(BIN)/python -m workshop study studies/imagined.toml --out out/imagined --publish docs/study/imagined
	$(BIN)/python -m workshop study studies/fusion-alone.toml --out out/fusion-alone \
		--publish docs/study/alone --readings docs/study/alone/readings
	$(BIN)/python -m workshop dose --folder runs/dose --out docs/study/dose/predicted.json
	$(BIN)/python -m workshop train-adapters --folder runs/dose --images 3000 \
		--arms shared-0 shared-50 shared-100
	$(BIN)/python -m workshop study studies/dose.toml --out out/dose --publish docs/study/dose \
		--readings docs/study/dose/readings
	$(BIN)/python -m workshop study studies/edits.toml --out out/edits --publish docs/study/edits \
		--readings docs/study/edits/readings
	$(BIN)/python -m workshop study studies/steps.toml --out out/steps --publish docs/study/steps \
		--readings docs/study/steps/readings
	$(BIN)/python -m workshop study studies/ends.toml --out out/ends --publish docs/study/ends \
		--readings docs/study/ends/readings
	$(BIN)/python -m workshop study studies/variety.toml --out out/study --publish docs/study \
		--readings docs/study/readings

# With photos of yours in references/ and prompts in prompts.txt; the same study for both presets.
study-real: $(STAMP) ## the study on SD 1.5 plus and SDXL plus (hours on one GPU; it resumes)
	test -f data/subjects/metadata.jsonl || $(BIN)/ipdiverse prepare Yuanshi/Subjects200K --out data/subjects
	mkdir -p spaces out
	for preset in sd15-plus sdxl-plus; do \
		test -f spaces/$$preset.safetensors \
			|| $(BIN)/ipdiverse fit data/subjects --config recipes/fit-$$preset.toml --yes || exit 1; \
		sed "s/sd15-plus/$$preset/" studies/real.toml > out/real-$$preset.toml; \
		$(BIN)/ipdiverse evaluate --config out/real-$$preset.toml --out out/real-$$preset --yes || exit 1; \
	done

base: $(STAMP) ## train the embedded base from nothing (hours; it resumes) and ship it
	$(BIN)/python -m workshop train-base

gates: $(STAMP) ## measure the embedded base against its gates
	$(BIN)/python -m workshop gates

adapters: $(STAMP) ## train every adapter of the study (hours; it resumes) and ship the best
	$(BIN)/python -m workshop train-adapters --ship
	$(BIN)/ipdiverse calibrate --adapter diverse --levers interpolation interval \
		--pairs 40 --images 8 --steps 15 --work out/calibration --out $(DIVERSE)
	$(BIN)/python -m workshop train-adapters --seeds 1 2 --arms self-none diverse alone-paired-gated \
		alone-paired-shuffled alone-paired-projection alone-paired-attention
	$(MAKE) spaces

# A shipped bank is small: everything embedded must stay under 40 MB.
spaces: $(STAMP) ## fit the variation spaces of the plain adapters (minutes) and ship them
	test -f runs/spaces/metadata.jsonl || $(BIN)/ipdiverse prepare critters --n 4000 --out runs/spaces
	for kind in plus base; do $(BIN)/ipdiverse fit runs/spaces --adapter $$kind --bank 1000 \
		--out src/ipdiverse/critters/weights/spaces/$$kind.safetensors || exit 1; done

clean: ## remove what was built, not .venv
	rm -rf out build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src workshop tests benchmarks examples studies integrations docs/hooks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
