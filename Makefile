# Two commands do all of it on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv where there is one, else pip; both show what they fetch and how large it is.
INSTALL := $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install)

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train check test-fast test test-all bench docs clean

train: $(VENV)/.installed  ## install, then rehearse the Qwen-Image LoRA on the CPU
	@echo "Rehearsing a LoRA run on tiny random weights; about half a minute on a laptop"
	$(BIN)/diffsynth train --recipe qwen-image-lora --rehearse --device cpu

check: $(VENV)/.installed-test  ## linters, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-fast: check  ## `check`, and the unit tests but slow ones, videos and the browser: in under 3 minutes, at each change
	$(PYTEST) tests/unit -m "not long and not slow and not video and not browser"

test: check  ## `check`, and all tests but those marked as long
	$(PYTEST) tests -m "not long"

test-all: $(VENV)/.installed-test  ## all tests, the long ones too
	$(PYTEST) tests

bench: $(VENV)/.installed-test  ## ratios of speed and memory, measured in one run on this machine
	$(BIN)/python -m pytest tests/bench --measure -s

docs: $(VENV)/.installed-test  ## regenerate the reference pages, the JSON schema and the images of the README
	$(BIN)/python -m diffsynth_core.config.documents docs
	$(BIN)/python -m diffsynth_core.dataset_report.documents docs
	$(BIN)/python -m diffsynth_core.planning.documents docs
	$(BIN)/python docs/make_images.py docs
	$(BIN)/python -m docs.make_report_images docs

$(VENV)/bin/python:
	@echo "Making a Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing diffsynth, torch, diffusers and what they need into $(VENV), nothing outside it:"
	@echo "  2 GB on disk with a CPU build of torch, 5 GB with the CUDA build that is the default on Linux"
	$(INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV)"
	$(INSTALL) --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV)
