# Every target builds what it needs. `make demo` and `make test` are all a newcomer has to know.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
EXTRAS := dev,openvino,bench,fast
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check bench venv format clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.base ## train, compress, verify and measure a small network; the result lies in runs/demo
	$(BIN)/python -m karui compress resnet20 --data digits --recipe examples/demo.toml --out runs/demo --overwrite

test: $(VENV)/.dev ## everything: format, lint, types, floors, unit, property, law and effect tests, doctests
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports
	$(BIN)/python -m karui.survey.docs --check
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev ## the fast half: no effect tests and nothing over ten seconds
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports
	$(BIN)/python -m karui.survey.docs --check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not effect and not slow"

bench: $(VENV)/.dev ## the benchmarks kept in results/; ONLY=name runs one of them
	$(BIN)/python benchmarks/run.py $(ONLY)

format: $(VENV)/.dev ## put the code, and the generated documents, in shape
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/python -m karui.survey.docs --write

venv: $(VENV)/.dev ## the development environment

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "karui needs Python 3.11 or newer; $(PYTHON) is older. Say: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing karui into $(VENV) ..."
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing karui and its development tools into $(VENV) ..."
	$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.base

clean: ## remove the environment and every cache
	rm -rf $(VENV) .cache runs .pytest_cache .ruff_cache .hypothesis build dist
