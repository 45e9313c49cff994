# Everything runs in a virtual environment of its own; `make` without a target lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?=
# A worker per processor, a file at a time: much of the suite waits for processes that it started.
WORKERS ?= -n logical --maxprocesses 8 --dist loadfile
OPENVINO := .venv-openvino

.PHONY: help venv test demo lint openvino clean

help:
	@echo "make demo   set up, then optimize the model that ships with the package and show what was gained"
	@echo "make test   set up, then run the tests (without GPU, model zoo and the minutes-long ones)"
	@echo "make lint   set up, then check style, types and the import contracts"
	@echo "make venv   set up only: a virtual environment in $(VENV)"
	@echo "make openvino  a second environment, $(OPENVINO), with onnxruntime-openvino; runs the tests marked openvino"
	@echo "make clean  remove $(VENV) and everything that was built"
	@echo "Another interpreter: make PYTHON=python3.12 ..."

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) --version >/dev/null 2>&1 || { \
		echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version), and 3.11 or newer is needed. Name another: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		name=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		echo "$(PYTHON) cannot make virtual environments: its ensurepip module is missing."; \
		echo "Install it with: apt-get install $$name"; exit 1; }
	@echo "Setting up a virtual environment in $(VENV) (about 770 MB; a minute or two, longer when nothing is cached) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Set up."

test: $(INSTALLED)
	@echo "Running the tests (a few minutes) ..."
	@$(BIN)/pytest -m "not slow and not zoo and not cuda and not openvino" --timeout 300 \
		$(WORKERS) --cov --cov-report term $(PYTEST_ARGS)

demo: $(INSTALLED)
	@echo "Optimizing the model that ships with the package ..."
	@$(BIN)/onnx-lowrank demo

lint: $(INSTALLED)
	@echo "Checking style ..."
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "Checking types ..."
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@echo "Checking that imports run downward only ..."
	@$(BIN)/lint-imports --no-logo

# onnxruntime-openvino is the same module as onnxruntime-gpu: it needs an environment of its own, and pip must not add
# what pyproject.toml declares.
$(OPENVINO)/.installed: benchmarks/openvino.txt pyproject.toml
	@echo "Setting up a virtual environment with onnxruntime-openvino in $(OPENVINO) (about 700 MB) ..."
	@$(PYTHON) -m venv $(OPENVINO)
	@$(OPENVINO)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/openvino.txt
	@$(OPENVINO)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

openvino: $(INSTALLED) $(OPENVINO)/.installed
	@echo "Running the tests that need OpenVINO ..."
	@ONNX_LOWRANK_OPENVINO_PYTHON=$(OPENVINO)/bin/python $(BIN)/pytest -m openvino -rs $(PYTEST_ARGS)

clean:
	@echo "Removing $(VENV), $(OPENVINO), builds and caches ..."
	@rm -rf $(VENV) $(OPENVINO) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
