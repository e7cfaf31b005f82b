# One word each, in the environment that scripts/test.sh makes (.venv).
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help environment lint types unit all generated format

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

environment:  ## make .venv with everything for the tests
	bash -c 'source scripts/environment.sh && make_environment test'

lint:  ## ruff, and imports between packages
	ruff check .
	ruff format --check .
	lint-imports

types:  ## mypy
	mypy

unit:  ## tests that start no processes of their own: minutes
	pytest -q -n auto -m "not integration and not cluster and not network"

all:  ## what CI runs: lint, types, every test that this machine allows
	bash scripts/test.sh

generated:  ## write every file that is made from another one
	python scripts/build/config_reference.py
	python scripts/build/tables.py
	python tests/cli/test_options.py

format:  ## ruff, writing
	ruff check --fix .
	ruff format .
