# Each target creates .venv when it is missing, and installs again only when pyproject.toml changed.

VENV := .venv
BIN := $(VENV)/bin
CACHE := .tte

# The first interpreter that really runs (a version manager's shim may exist and refuse).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)

# An extra package index for the tests' torch: one of CPU-only builds spares the gigabytes of CUDA
# that the default Linux wheel brings.
TORCH_INDEX ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve demo test test-training test-devices gate proofs crash lint format types protos \
  breaking bench experiments bench-engine bench-index parity train-builtin clean

help:
	@echo "make serve     start the five services and the built-in corpus; search with: $(BIN)/tte search"
	@echo "make demo      start, ingest, search, write demo/out.json and demo/out.png, stop"
	@echo "make test      the test suite, but for make test-training: whole runs of the trainers,"
	@echo "               and make test-devices: serving and training on eight devices"
	@echo "make gate      mini-MMEB with the built-in models against the committed results"
	@echo "make crash     200 times kill -9 in the middle of writes, 30 times of the training loop"
	@echo "make proofs    2,000 requests of random shape, 1,000 mostly cancelled, for each model service"
	@echo "make lint      ruff, buf (make format repairs); make types: basedpyright"
	@echo "make protos    generate the package tte from protos/"
	@echo "make breaking  compare the API with BASE=<git ref> (default origin/main)"
	@echo "make bench     measure, see benchmarks/"
	@echo "make bench-engine  the engine against PyTorch, its services and the machine"
	@echo "make bench-index  the index against FAISS, hnswlib and usearch (BENCH_ARGS: options)"
	@echo "make experiments  the papers' claims in small: docs/results.md; an hour or two (BENCH_ARGS)"
	@echo "make parity    every model family against transformers"
	@echo "make train-builtin  the built-in models from nothing: three hours (TRAIN_ARGS: options)"
	@echo "make install   only make .venv with everything for development"
	@echo "make clean     remove caches and what the demo wrote (not .venv, not the corpus)"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found." \
	"Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	echo "$(PYTHON) is not Python 3.11 to 3.13 (ScaNN has wheels for no other)." >&2; exit 1; }
	@# Half an environment, as Debian leaves one without python3-venv, would pass for a whole one.
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[dev]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed-dev

serve: $(VENV)/.installed
	$(BIN)/tte serve

demo: $(VENV)/.installed
	$(BIN)/tte demo

# A file's tests stay together and share its fixtures; those of tests/system share one system
# (tests/conftest.py). Compiled programs are kept between runs: most of a first run is XLA.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup \
	-m "not many_devices and not training_runs" $(PYTEST_ARGS)

# Whole runs of the trainers: ended by signals, gone on with, compared bit by bit.
test-training: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "training_runs and not many_devices" $(PYTEST_ARGS)

# What compiles for eight devices or two processes takes minutes of its own.
test-devices: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m many_devices $(PYTEST_ARGS)

# Minutes; fails when an arm has become significantly worse.
gate: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gate

# Kills a writing process 200 times, and the training loop or its reranker 30 times; minutes.
crash: $(VENV)/.installed-dev
	TTE_CRASH_ROUNDS=200 $(BIN)/python -m pytest -q tests/index/test_crash.py
	TTE_LOOP_KILLS=30 $(BIN)/python -m pytest -q -s tests/training/mining/test_loop_crash.py

# Of each built-in model service: nothing compiles, nothing is left behind, nothing is lost. Minutes.
proofs: $(VENV)/.installed-dev
	TTE_PROOF_REQUESTS=2000 TTE_PROOF_CANCELS=1000 TTE_PROOF_MODELS=builtin \
	$(BIN)/python -m pytest -q -s --timeout 3600 tests/proofs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

types: $(VENV)/.installed-dev
	$(BIN)/basedpyright

protos: $(VENV)/.installed-dev
	$(BIN)/python protos/generate.py

# A base without protos has nothing to break.
BASE ?= origin/main
breaking: $(VENV)/.installed-dev
	@if git cat-file -e $(BASE):buf.yaml 2>/dev/null; then \
	base=$$(mktemp -d) && trap 'rm -rf "$$base"' EXIT && \
	git archive $(BASE) buf.yaml protos | tar -x -C "$$base" && \
	$(BIN)/buf breaking --against "$$base" && echo "API compatible with $(BASE)"; \
	else echo "$(BASE) has no API to compare with"; fi

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

bench-engine: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.engine

# 100k and 1M vectors take long, most of it for the others' graphs. Every finished piece is kept and
# an interrupted run goes on; BENCH_ARGS="--sizes 100000 --contenders ours" does some pieces only.
BENCH_ARGS ?=
bench-index: $(VENV)/.installed
	$(BIN)/python -c 'import faiss, hnswlib, usearch' 2>/dev/null || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m benchmarks.index $(BENCH_ARGS)

# Needs the emoji data set. Every finished piece is kept and an interrupted run goes on.
experiments: $(VENV)/.installed
	$(BIN)/python -m benchmarks.experiments $(BENCH_ARGS)

parity: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.parity

# Needs npm, for the drawings. An interrupted run goes on; the models come to lie in .data/runs/builtin.
# TRAIN_ARGS="--start tte_jax/builtin/weights --out .data/runs/next" goes on from the shipped ones.
TRAIN_ARGS ?=
train-builtin: $(VENV)/.installed
	$(BIN)/python -m training.data.emoji
	$(BIN)/python -m training.builtin.train $(TRAIN_ARGS)

clean:
	rm -rf demo dist .pytest_cache .ruff_cache .hypothesis $(CACHE)/test-compile-cache
	find tte tte_jax servers training tests protos -name __pycache__ -prune -exec rm -rf {} +
