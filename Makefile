# make demo   the main job on real input: a BERT becomes a MoEBERT, results in runs/demo
# make test   the test suite
# make lint   ruff, mypy and clang-format
# make sanitize   the native code's tests under the address, undefined-behaviour and thread sanitizers
# make serving   exported models in the tools that serve encoders, each in an environment of its own
# make installs   pip install with nvcc, without it, and without any compiler, each in an environment of its own
#
# Each builds what it needs in .venv first. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
CXX_SOURCES := $(wildcard $(addprefix csrc/*.,h cpp cu cuh) $(addprefix tests/native/*.,h cpp))

.PHONY: demo test lint format sanitize serving installs clean
.DEFAULT_GOAL := test

demo: $(VENV)/installed
	$(BIN)/moebert demo --output runs/demo

# Bytecode is kept, even where a machine's environment says not to: a hundred processes are started.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

sanitize:
	tests/native/run.sh plain
	tests/native/run.sh asan
	tests/native/run.sh tsan

serving: $(VENV)/installed
	tests/serving/run.sh $(abspath $(BIN)/python)

installs: $(VENV)/installed
	tests/install_matrix.sh $(abspath $(BIN)/python)

$(VENV)/installed: pyproject.toml constraints.txt $(wildcard setup.py csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "moebert_kernels needs Python 3.10 or newer, but $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,export,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-serving build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
