# The two commands of the README, each complete on a fresh machine: they make .venv and install into it.
#   make demo    train a small Llama on this machine in two minutes        make demo ARGS="--minutes 10"
#   make test    run the tests                                             make test ARGS="-k rms_norm"
# More: make test-slow (whole grid, planted bugs), test-packaging (wheels in fresh environments),
# test-benchmarks (every benchmark once, for what it computes), bench (ten minutes on a CPU), lint, clean.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
# constraints.txt pins what the tests ran with. An open range would take the newest torch, with gigabytes of CUDA
# packages, also on machines that have no use for them.
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SOURCES = setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: demo test test-slow test-packaging test-benchmarks bench lint clean

demo: $(VENV)/.installed
	$(BIN)/pyllm demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto -m slow $(ARGS)

test-packaging: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m packaging $(ARGS)

test-benchmarks: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks --benchmark-disable -q $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyllm needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: install it (Debian: apt install python3-venv), then again"; exit 1; }

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	@echo "installing pyllm into $(VENV) (torch and the compiled kernels: a minute or two; with nvcc, CUDA's too: up to ten, PYLLM_BUILD=cpu leaves them out)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(SOURCES)
	@echo "installing pyllm and its test tools into $(VENV) (a minute or two; with nvcc up to ten)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf build dist *.egg-info $(VENV) kernels/*.so
