# Two commands do all of it on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test bench docs clean

train: $(VENV)/.installed  ## install, then rehearse the Qwen-Image LoRA on the CPU
	$(BIN)/diffsynth train --recipe qwen-image-lora --rehearse --device cpu

test: $(VENV)/.installed-test  ## linters, types, import contracts, all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.installed-test  ## ratios of speed and memory, measured in one run on this machine
	$(BIN)/python -m pytest tests/bench --measure -s

docs: $(VENV)/.installed-test  ## regenerate the reference pages, the JSON schema and the pictures of the README
	$(BIN)/python -m diffsynth_core.config.documents docs
	$(BIN)/python -m diffsynth_core.validation.documents docs
	$(BIN)/python -m diffsynth_core.planning.documents docs
	$(BIN)/python docs/make_pictures.py docs
	$(BIN)/python -m docs.make_report_pictures docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
