# make demo   the whole pipeline on the small model that ships with vlakeep (set VLAKEEP_ROOT to choose where files go)
# make study  a small study: three arms, two seeds, trained and evaluated, minutes on a CPU (docs/study.md)
# make test   all tests; TESTS=tests/test_storage.py runs one file, WORKERS=4 uses more processes
# make test-openvla-env   the tests on the library versions of the official OpenVLA environment
# make mutations   plants the faults of tests/mutations.txt one by one and sees that the tests catch them (an hour; FAULT=expression takes some)
# make fuzz   random files, texts and configurations, EXAMPLES for each property (hours)
# make lint   ruff and mypy
# make wheel  build sdist and wheel into dist/, and run what the wheel installs into an empty virtual environment
# make libero the LIBERO simulator into .venv (about 2 GB), and a check that it renders
# make docs   the pages of vlakeep.protect into build/site, warnings are errors; an environment of 170 MB of its own, without torch
# make clean  remove the virtual environments
#
# All of them make their own virtual environment in .venv on first use, and again when pyproject.toml or constraints.txt change.
# PYTHON=python3.12 chooses the interpreter; TORCH_INDEX="--index-url URL" takes torch from elsewhere, such as PyTorch's CPU-only index. An existing environment (conda openvla) needs none of this: pip install -e .

SHELL := /bin/bash
TESTS ?= tests
WORKERS ?= 2
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
NEWEST ?= (3, 12)
EXTRAS ?= dev,hdf5,lerobot
PY := $(VENV)/bin/python
# Bytecode is made of what is imported, when it is first; of all of torch and transformers it takes longer than the rest of the installation.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS)
unexport PYTHONDONTWRITEBYTECODE
# Before a command that writes into the checkout's own metadata; .ci/run, which has two at a time, puts a lock here.
ALONE ?=

FAULT ?=
EXAMPLES ?= 20000

OPENVLA := VENV=.venv-openvla CONSTRAINTS=constraints-openvla.txt NEWEST='(3, 11)'

# Sets `python` to the interpreter that environments are made of.
FIND_PYTHON = python=""; \
	for candidate in $(PYTHON) python3 python3.12 python3.11 python3.10 python; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= $(NEWEST))' >/dev/null 2>&1; then \
	    python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: no Python from 3.10 to $(NEWEST) with venv found; install one (apt install python3 python3-venv), or make PYTHON=/path/to/python3" >&2; \
	  exit 1; fi

.PHONY: demo study test test-openvla-env setup-openvla-env mutations fuzz lint wheel libero docs clean setup python

demo: setup
	@$(VENV)/bin/vlakeep demo $(ARGS)

study: setup
	@$(VENV)/bin/vlakeep tabletop-data --config configs/method_graded.yaml --probe.name small --probe.size 60
	@$(VENV)/bin/vlakeep study studies/rivals_small.yaml --workers $(WORKERS)

# One thread per process: the tests are small, and two processes on two cores finish sooner than two threads in one. A file stays on one
# process, which makes what its tests share once; tests/conftest.py has the longest files first, so that the processes end together.
test: setup
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# The same suite with the libraries that the official OpenVLA environment pins, in a virtual environment of its own.
test-openvla-env:
	@$(MAKE) --no-print-directory test $(OPENVLA)

setup-openvla-env:
	@$(MAKE) --no-print-directory setup $(OPENVLA)

# In copies of the sources, WORKERS at a time: the checkout stays as it is.
mutations: setup
	@$(PY) tests/mutations.py --workers $(WORKERS) "$(FAULT)"

# What it finds is kept in .hypothesis and tried first the next time.
fuzz: setup
	@VLAKEEP_FUZZ=$(EXAMPLES) OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) tests/test_fuzz.py

lint: setup
	@$(PY) -m ruff check vlakeep tests speed studies examples scripts setup.py
	@$(PY) -m mypy

wheel: setup
	@PY="$(abspath $(PY))" TORCH_INDEX="$(TORCH_INDEX)" .ci/wheel

# The simulator's own pins (robosuite 1.4.0) agree with constraints.txt. What renders in software is a system library; the check names it.
libero: setup
	@$(PIP) --editable '.[libero]' 2> >(grep -v '^WARNING: Location' >&2)
	@$(VENV)/bin/vlakeep libero-check $(ARGS)

# What CI runs too. It is set up again when its pins change.
docs:
	@set -e; want=$$(cksum < constraints-docs.txt); \
	if [ "$$(cat .venv-docs/.ready 2>/dev/null)" != "$$want" ]; then \
	  rm -rf .venv-docs; $(or $(PYTHON),$(firstword $(wildcard $(PY)) python3)) -m venv .venv-docs; \
	  .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-docs.txt 2> >(grep -v '^WARNING: Location' >&2); \
	  echo "$$want" > .venv-docs/.ready; fi
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-docs .venv-openvla .mypy_cache build dist vlakeep.egg-info

# Makes the environment in $(VENV), unless it stands already for these very files.
setup:
	@set -e; \
	want=$$(cat pyproject.toml $(CONSTRAINTS) | cksum); \
	if [ "$$(cat $(VENV)/.ready 2>/dev/null)" = "$$want" ] && $(PY) -c "" 2>/dev/null; then exit 0; fi; \
	$(FIND_PYTHON); \
	echo "[1/3] virtual environment $(VENV) with $$($$python --version)"; \
	rm -rf $(VENV); $$python -m venv $(VENV); \
	echo "[2/3] torch (the largest part; a few minutes on a slow line)"; \
	$(PIP) $(TORCH_INDEX) torch 2> >(grep -v '^WARNING: Location' >&2); \
	$(PIP) $(TORCH_INDEX) --no-deps torchvision 2> >(grep -v '^WARNING: Location' >&2); \
	echo "[3/3] vlakeep and the other libraries"; \
	$(ALONE) $(PIP) --editable '.[$(EXTRAS)]' 2> >(grep -v '^WARNING: Location' >&2); \
	echo "$$want" > $(VENV)/.ready

python:
	@set -e; $(FIND_PYTHON); command -v "$$python"
