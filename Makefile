# The two commands for everybody: `make quickstart` and `make test`. Each makes its own virtual environment below .venv and
# installs what it needs; again only when setup.py or pyproject.toml has changed.
#
# PYTHON: an interpreter of 3.10 or newer. TORCH: what pip installs as torch; the default pins a release, since an unpinned
# torch can pull gigabytes of CUDA packages. For a CUDA build: make TORCH='torch==X --index-url …', see README.md.

usable = $(1) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
PYTHON ?= $(shell for p in python3.11 python3.10 python3.12 python3; do $(call usable,$$p) && echo $$p && break; done)
TORCH ?= torch==2.13.0
# For two cores: the tests wait for processes, disks and timeouts during a quarter of their time.
WORKERS ?= 3
# Arguments of `make image-root`, such as --build-arg NAME=VALUE.
IMAGE_ARGS ?=
KILLS ?= 1200
INPUTS ?= 10000
BITS ?= 500
PROTSPACE ?= protspace==4.8.2
# Folder for what a target makes, where it takes one.
OUT ?=

QUICKSTART := .venv/quickstart
DEV := .venv/dev
# The other supported pair of Python and megatron-core.
PY312 := .venv/py312
PYTHON312 ?= python3.12
# Results are never overwritten or removed: quickstart, then quickstart-2, quickstart-3, …
FRESH = $(shell out=quickstart; n=1; while [ -e $$out ]; do n=$$((n + 1)); out=quickstart-$$n; done; echo $$out)
# The tools find each other (torchrun, shellcheck) through the environment's own bin.
DEV_RUN := PATH="$(CURDIR)/$(DEV)/bin:$$PATH"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart setup lint type test test-all kills fuzz rot gpu multinode slurm versions protspace pages site tutorials image-root example format reading-order \
  migration-keys clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

quickstart: $(QUICKSTART)/.installed ## simulate proteins, pretrain a tiny model on 2 CPU processes, evaluate, plot, embed (minutes)
	$(QUICKSTART)/bin/esm2mega quickstart --out $(or $(OUT),$(FRESH))

setup: $(DEV)/.installed ## the environment for development
	@echo "activate it with: . $(DEV)/bin/activate"

format: $(DEV)/.installed ## write the code in the common format
	$(DEV_RUN) ruff check --fix --quiet .
	$(DEV_RUN) ruff format .

lint: $(DEV)/.installed ## style of Python, shell and Dockerfiles, spelling, and the contract of imports
	$(DEV_RUN) ruff check .
	$(DEV_RUN) ruff format --check .
	$(DEV_RUN) lint-imports --no-logo
	$(DEV_RUN) codespell
	$(DEV_RUN) hadolint Dockerfile $(wildcard docker/*.Dockerfile)
	$(DEV_RUN) shellcheck .ci/run $(wildcard examples/*.sh examples/*/*.sh examples/slurm/*.sbatch tests/slurm/*.sh)

type: $(DEV)/.installed ## types
	$(DEV_RUN) mypy

# One thread per process: the tests start groups of processes that would fight over the cores. A worker that has none
# left takes tests of another one, whose share happened to hold the long ones.
test: lint type ## style, types, and all tests that need minutes and no GPU
	$(DEV_RUN) OMP_NUM_THREADS=1 pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: lint type ## also the slow tests, and those for a GPU where there is one
	$(DEV_RUN) OMP_NUM_THREADS=1 pytest -q $(PYTEST_ARGS)

kills: $(DEV)/.installed ## kill every command at random moments, see docs/runs.md; OUT=DIR holds the journal, and what failed
	$(DEV_RUN) OMP_NUM_THREADS=1 python -m tests.kills --out $(or $(OUT),$(error name a folder, as in make kills OUT=/tmp/kills)) --kills $(KILLS)

fuzz: $(DEV)/.installed ## read changed files of every format, see docs/debugging.md; OUT=DIR holds the journal, and what failed
	$(DEV_RUN) OMP_NUM_THREADS=1 python -m tests.fuzz --out $(or $(OUT),$(error name a folder, as in make fuzz OUT=/tmp/fuzz)) --inputs $(INPUTS)

rot: $(DEV)/.installed ## the same with one flipped bit each, and compare every number
	$(DEV_RUN) OMP_NUM_THREADS=1 python -m tests.fuzz --rot --out $(or $(OUT),$(error name a folder, as in make rot OUT=/tmp/rot)) --inputs $(BITS)

gpu: $(DEV)/.installed ## on a machine with a GPU: the tests for it, then its measurements, see docs/performance.md
	$(DEV_RUN) pytest -q -m gpu $(PYTEST_ARGS)
	$(DEV_RUN) python benchmarks/gpu.py

multinode: $(DEV)/.installed ## two hosts in network namespaces lose one another in a training, see docs/multi-node.md
	$(DEV_RUN) python -m tests.multinode

slurm: $(DEV)/.installed ## the examples for Slurm on a Slurm of one node, see docs/multi-node.md
	$(DEV_RUN) python -m tests.slurm

versions: $(DEV)/.installed $(PY312)/.installed ## a run goes on under the other version of megatron-core, which needs PYTHON312, and back
	$(DEV_RUN) OMP_NUM_THREADS=1 pytest -q tests/distributed/test_versions.py

# Its dependencies are many, and the reader needs none that is not there.
protspace: $(DEV)/.installed ## the reader of ProtSpace itself opens what `map` writes for it
	$(DEV)/bin/pip install --quiet --no-deps --upgrade --target .venv/protspace $(PROTSPACE)
	$(DEV_RUN) PYTHONPATH=.venv/protspace OMP_NUM_THREADS=1 pytest -q tests/unit/autoeval/test_embedding_map.py -k protspace

pages: $(DEV)/.installed ## the pages of reports in headless Chromium, wide and narrow, light and dark; OUT=DIR holds their pictures
	$(DEV_RUN) python -m tests.pages --out $(or $(OUT),$(error name a folder, as in make pages OUT=/tmp/pages))

site: $(DEV)/.installed ## the documentation as a searchable site in build/site, with all keys, commands and the Python API
	$(DEV_RUN) sphinx-build -q -W --keep-going -c docs . build/site
	@echo build/site/index.html

tutorials: $(DEV)/.installed ## the tutorials of docs/tutorials as printed, with the time of each step; OUT=DIR holds their files
	$(DEV_RUN) python -m tests.tutorials --out $(or $(OUT),$(error name a folder, as in make tutorials OUT=/tmp/tutorials))

example: $(DEV)/.installed ## the CPU example, in reduced form
	$(DEV_RUN) STEPS=4 OUT="$$(mktemp -d)" bash examples/pretrain_cpu.sh

image-root: $(DEV)/.installed ## as root: execute docker/cpu.Dockerfile in a clean Debian root, and the README in it
	$(DEV_RUN) python -m tests.image.run $(IMAGE_ARGS)

reading-order: $(DEV)/.installed ## write docs/reading-order.md from the docstrings
	$(DEV_RUN) python docs/reading_order.py

migration-keys: $(DEV)/.installed ## write docs/migrate/keys.md from the tables of keys of earlier systems
	$(DEV_RUN) python docs/migration_keys.py

clean: ## remove the environments and caches
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# The stamp is written last: an interrupted installation is done again.
$(QUICKSTART)/.installed: setup.py pyproject.toml
	$(call install,$(QUICKSTART),.)

$(DEV)/.installed: setup.py pyproject.toml
	$(call install,$(DEV),.[dev])

$(PY312)/.installed: PYTHON = $(PYTHON312)
$(PY312)/.installed: setup.py pyproject.toml
	$(call install,$(PY312),.[dev])

define install
	@$(if $(strip $(PYTHON)),,echo "no Python 3.10 or newer with the venv module found; name one with PYTHON=…" >&2; exit 2)
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(1)/bin/python -m pip install --quiet $(TORCH)
	$(1)/bin/python -m pip install --quiet --editable "$(2)"
	@touch $@
endef
