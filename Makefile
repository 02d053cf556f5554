# Two commands do all of it on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv where there is one, else pip; both show what they fetch and how large it is.
INSTALL := $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install)

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# One thread a process: small tensors are slower on several, and sums then depend on their number.
ONE_THREAD := OMP_NUM_THREADS=1
# glibc: keep freed memory instead of returning it to the system at each step.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000
KEYHOLE := build/keyhole-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train tiny-model check test-fast test test-all bench bench-gpu docs clean

train: $(VENV)/.installed  ## install, then teach the tiny model a word on the CPU; ends with a sheet of what it draws
	@echo "Teaching a tiny model a word that it has never seen, from twelve images; about a minute on a CPU"
	$(BIN)/python -m tests.shapes.concept $(KEYHOLE)/images
	$(ONE_THREAD) $(BIN)/diffsynth train --recipe shapes-lora --device cpu --dataset_base_path $(KEYHOLE)/images --output_path $(KEYHOLE)/lora
	@echo "Each prompt without the LoRA and with it:"
	$(ONE_THREAD) $(BIN)/diffsynth generate --recipe shapes-lora --device cpu --lora $(KEYHOLE)/lora/epoch-18.safetensors:0,1 --grid \
	  --prompt "a red keyhole on yellow" --prompt "a white keyhole on blue" --prompt "a blue cross left of a red circle on white" \
	  --out $(KEYHOLE)/sheet

tiny-model: $(VENV)/.installed  ## build the tiny model of the recipes `shapes-*`, in under an hour on two cores
	$(ONE_THREAD) $(KEEP_MEMORY) $(BIN)/python -m tests.shapes.build build/tiny-model-$(shell date +%Y%m%d-%H%M%S)

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

bench-gpu: $(VENV)/.installed-test  ## steps per second and memory on the first CUDA device, into docs/benchmarks.md; goes on where it stopped
	$(BIN)/python -m tests.gpu.bench $(ARGUMENTS)

docs: $(VENV)/.installed-test  ## regenerate the reference pages, the JSON schema and the images of the README
	$(BIN)/python -m diffsynth_core.config.documents docs
	$(BIN)/python -m diffsynth_core.dataset_report.documents docs
	$(BIN)/python -m diffsynth_core.planning.documents docs
	$(BIN)/python -m diffsynth_core.planning.presets recipes
	$(BIN)/python docs/make_images.py docs
	$(BIN)/python -m docs.make_report_images docs
	$(BIN)/python -m docs.make_run_images docs
	$(MAKE) train KEYHOLE=$(KEYHOLE)
	cp $(KEYHOLE)/sheet/grid.png docs/keyhole.png

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
