# llmkit: `make demo` shows it, `make test` proves it. `make help` lists the rest.
#
#   TORCH=auto   the tested torch in the build that this machine's package index offers (default)
#   TORCH=cpu    its CPU build            TORCH=cu130   its CUDA 13.0 build
#   TORCH=keep   the torch that $(PYTHON) has already, as on clusters; it is never replaced
#
# Everything is installed into .venv, once: a stamp there names the TORCH and the files that decide what is in it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= $(or $(shell cat $(VENV)/torch-choice 2>/dev/null),auto)
BIN := $(VENV)/bin
KEY := $(shell cat pyproject.toml constraints.txt constraints-torch.txt | cksum | tr ' ' '-')
STAMP := $(VENV)/.installed-$(TORCH)-$(KEY)
TESTS ?= tests
# On two cores: some tests wait for what they have started.
JOBS ?= 3

ifeq ($(filter $(TORCH),auto cpu cu130 keep),)
  $(error TORCH=$(TORCH): must be auto, cpu, cu130 or keep)
endif
TORCH_INDEX := $(if $(filter cpu cu130,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

# A busy machine punishes threads inside of processes: tests take one each. The demo takes every core.
test test-slow test-faults test-slurm test-distributed: export OMP_NUM_THREADS ?= 1
test test-slow test-faults test-slurm test-distributed: export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help install demo test test-slow test-faults slurm test-slurm test-distributed check format lint imports types bench bench-tokenize bench-finetune bench-eval bench-compress bench-memory clean distclean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  with TORCH=auto|cpu|cu130|keep to choose the torch build (now: $(TORCH))"

install: $(STAMP)  ## Make .venv with everything in it (the other targets do this by themselves)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmkit needs Python 3.11 or newer; make PYTHON=/path/to/python3.11")'
	@[ ! -e $(VENV)/pyvenv.cfg ] || [ "$$(cat $(VENV)/torch-choice 2>/dev/null)" = "$(TORCH)" ] || rm -rf $(VENV)
ifeq ($(TORCH),keep)
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv --system-site-packages $(VENV)
	@# When PYTHON itself lives in a virtual environment, that one's packages are what "installed" means.
	@$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept.pth"
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt 2>/dev/null \
	  || { echo "TORCH=keep: $(PYTHON) has no torch; install one or choose another TORCH" >&2; exit 3; }
else
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@cp constraints-torch.txt $(VENV)/torch.txt
endif
	@echo $(TORCH) > $(VENV)/torch-choice
	@echo "installing into $(VENV), once; this takes minutes the first time" >&2
	@$(BIN)/python -m pip install --quiet --no-compile $(TORCH_INDEX) -c constraints.txt -c $(VENV)/torch.txt -e '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP)  ## Train a small model on this machine, in minutes
	@$(BIN)/llmkit demo

test: check  ## Everything that must hold: formatting, lint, import direction, types, tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

test-slow: $(STAMP)  ## The tests that take longer
	$(BIN)/python -m pytest -m slow $(TESTS)

test-faults: export LLMKIT_TEST_FIGURES := $(CURDIR)/build/faults
test-faults: $(STAMP)  ## Every fault that tests can make, and a table of the runs that survived
	@rm -rf $(LLMKIT_TEST_FIGURES)
	@status=0; \
	$(BIN)/python -m pytest -m '' -n $(JOBS) --dist worksteal tests/faults || status=1; \
	PYTHONPATH=tests $(BIN)/python tests/faults/matrix.py $(LLMKIT_TEST_FIGURES) || status=1; \
	exit $$status

test-distributed: $(STAMP)  ## Two and four processes against one, in every layout; resumed from each to each
	$(BIN)/python -m pytest -m '' tests/distributed

SLURM_NEEDS := slurmctld slurmd sbatch munged
slurm:  ## Slurm's programs, by apt where there are root and a registry; says so where there are none
	@export PATH="$$PATH:/usr/sbin"; \
	lacking() { for name in $(SLURM_NEEDS); do command -v $$name >/dev/null || return 0; done; return 1; }; \
	if lacking && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } >/dev/null 2>&1 \
	    || echo "slurm: apt-get could not install it" >&2; \
	fi; \
	if lacking || [ "$$(id -u)" != 0 ]; then \
	  echo "slurm: SKIPPED, tests on a real Slurm need root and: apt-get install slurm-wlm munge" >&2; \
	fi

test-slurm: $(STAMP) slurm  ## Jobs on a real Slurm of two virtual nodes
	$(BIN)/python -m pytest -m '' -rs tests/slurm

check: lint imports types  ## All of `make test` but the tests

format: $(STAMP)  ## Put the code in form
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: $(STAMP)  ## Formatting and lint; torch must not creep into the command line
	$(BIN)/ruff format --check
	$(BIN)/ruff check

imports: $(STAMP)  ## A module imports only downward
	$(BIN)/lint-imports

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

bench: $(STAMP)  ## How much of a save training waits for; tokens per second against Hugging Face Trainer
	$(BIN)/python -W ignore -m benchmarks.saving
	$(BIN)/python -m benchmarks.pretrain

bench-tokenize: $(STAMP)  ## From JSON lines to ids against other ways, on 100 MB
	$(BIN)/python -m benchmarks.tokenize

bench-finetune: $(STAMP)  ## Rows per second of fine-tuning against Hugging Face Trainer, filled up and grouped by length
	$(BIN)/python -m benchmarks.finetune

MODEL ?=
DATA ?=
bench-eval: $(STAMP)  ## Questions to a model against lm-evaluation-harness; MODEL=FOLDER DATA=FOLDER, else a tiny one
	$(BIN)/python -m benchmarks.evaluate $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA))

DECODER ?=
ENCODER ?=
bench-compress: $(STAMP)  ## Size, loss and speed of compressed models; DECODER=FOLDER ENCODER=RUN, else random weights
	$(BIN)/python -W ignore -m benchmarks.compress $(if $(DECODER),--decoder $(DECODER)) $(if $(ENCODER),--encoder $(ENCODER))

bench-memory: $(STAMP)  ## The most memory that tokenizing 5 GB takes
	$(BIN)/python -m benchmarks.memory

clean:  ## Remove caches and build products; runs/ and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	[ ! -e $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
