# Everything from a bare machine with Python 3.11 or newer, git and make:
#   make replicate                      the laptop study, from geometry to figures
#   make replicate SPEC=specs/cpu.toml  another study
#   make test                           the test suite
# Every target sets up its own virtual environment first. On a GPU machine the same environment serves: torch's
# default wheels carry CUDA, and `make replicate SPEC=specs/study.toml RUN_FLAGS="--device cuda"` uses it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

SPEC ?= specs/laptop.toml
ARTIFACTS ?= artifacts
CUBE ?= $(ARTIFACTS)/laptop/cube.nc
RUN_FLAGS ?=
FIT_FLAGS ?=
BENCH_FLAGS ?=
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed

# A name on the path may be a stub, so each candidate is asked for its version.
FIND_PYTHON = for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done

.PHONY: help setup lock replicate figures test test-processes test-slow lint bench bench-gate smoke

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
	@echo "targets: setup replicate figures test test-processes test-slow lint bench bench-gate smoke lock"

setup: $(STAMP)

# The locked closure first, then this project itself, editable and without dependencies of its own choosing.
$(STAMP): requirements.lock pyproject.toml
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "no Python 3.11 or newer found; install one and try again" >&2; exit 1; fi; \
	test -x $(PY) || "$$python" -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# New pins: upgrade the environment (`$(PY) -m pip install --upgrade --editable ".[dev]"`), test, then lock.
lock:
	@{ echo "# Exact versions that the results and the tests were made with; written by \`make lock\`."; \
	  $(PY) -m pip --disable-pip-version-check freeze --exclude-editable --exclude nqs-scaling --exclude pip \
	  | sed 's/+[A-Za-z0-9.]*$$//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

# Points that are done are not trained again; a fit or figures newer than their input are kept. A failed point or a
# refused fit does not keep the rest from being drawn: the exit status still tells.
replicate: setup
	@$(PY) -m replicate plan $(SPEC) --artifacts $(ARTIFACTS) | tail -n 1
	@name=$$($(PY) -c 'from replicate.spec import load_study; print(load_study("$(SPEC)").name)'); \
	folder=$(ARTIFACTS)/$$name; status=0; \
	$(PY) -m replicate run $(SPEC) --artifacts $(ARTIFACTS) $(RUN_FLAGS) || status=$$?; \
	if [ $$status -gt 1 ]; then exit $$status; fi; \
	$(PY) -m replicate collect $(SPEC) --artifacts $(ARTIFACTS); \
	if [ ! $$folder/fit.json -nt $$folder/cube.nc ]; then $(PY) -m replicate fit $$folder/cube.nc $(FIT_FLAGS) || status=$$?; fi; \
	if [ ! $$folder/figures/report.html -nt $$folder/fit.json ]; then $(PY) -m figures $$folder/cube.nc; fi; \
	echo "cube: $$folder/cube.nc"; \
	echo "fit: $$folder/fit.json"; \
	echo "figures: $$folder/figures/ (report: $$folder/figures/report.html)"; \
	exit $$status

# From the cube (and the fit beside it) alone.
figures: setup
	$(PY) -m figures $(CUBE)

smoke:
	$(MAKE) replicate SPEC=specs/smoke.toml FIT_FLAGS="--bootstrap 40 --no-selection"

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto

# Sweeps, clusters and ranks as processes of their own.
test-processes: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m "processes and not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m slow
	OMP_NUM_THREADS=1 $(PY) tests/fit_acceptance.py speed

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy replicate figures benchmarks

bench: setup
	$(PY) -m asv machine --yes
	OMP_NUM_THREADS=1 $(PY) -m asv run --environment existing:$(abspath $(PY)) \
	  --set-commit-hash $$(git rev-parse HEAD) --launch-method forkserver $(ASV_FLAGS)
	$(PY) -m asv publish

bench-gate: setup
	$(PY) -m replicate bench gate $(BENCH_FLAGS)
