# robustkd from a fresh clone: python3 (3.10 or newer) and make are enough. `make demo` is the place to begin.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.robustkd-installed
FAST := not slow and not gpu and not trt

.PHONY: help setup demo teacher test test-slow test-gpu lint check bench docs image clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## make .venv with everything but classic TensorRT

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "robustkd needs Python 3.10 or newer; name one: make setup PYTHON=python3.11" >&2; exit 4; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 4; }
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[train,report,rtx,timm,dev]'
	@touch $@

demo: setup  ## the whole chain on embedded images: distill, export, audit, report
	$(BIN)/robustkd run --recipe quickstart

teacher: setup  ## train the shipped teacher again (needs the full Fashion-MNIST)
	$(BIN)/robustkd distill --recipe teacher-fashion-mnist

test: setup  ## the tests that need neither a GPU nor patience
	$(BIN)/python -m pytest -n auto --dist loadfile -m '$(FAST)'

test-slow: setup  ## the tests that take minutes or need real data
	$(BIN)/python -m pytest -m 'slow and not gpu and not trt'

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m 'gpu and not trt'

lint: setup  ## formatting, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## what CI asks for

bench: setup  ## ratios against plain references, ten minutes on two idle cores; results in bench/results
	$(BIN)/python -m bench --quick

docs: setup  ## the documentation site, in site/
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

image:  ## the container image
	docker build -t robustkd .

clean:  ## remove what tools left behind; keeps .venv and runs
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find robustkd tests -name __pycache__ -type d -prune -exec rm -rf {} +
