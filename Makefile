# make quickstart   install, generate a small labelled world, train, evaluate, write pictures (minutes, CPU is enough)
# make quickstart-segmentation   the same world, with a class for every pixel
# make quickstart-video   clips whose classes no single frame tells, three heads on one frozen forward
# make test         install and run the tests
# make lint         formatting, lint, types
#
# PYTHON chooses the interpreter (3.10 or newer); everything is installed into VENV, never into the system's Python.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUTPUT ?= output/quickstart_detection
# Processes that run tests, a file each. Where one crashes, the run ends: xdist would start another, and hang at the end.
TESTS_AT_ONCE ?= 2
# Any options of train_net.py, e.g. make quickstart ARGS="SOLVER.MAX_ITER 200"
ARGS ?=

.PHONY: quickstart quickstart-segmentation quickstart-video test test-gpu lint format wheel clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m d2_frozen.data.shapes --output datasets/shapes
	$(BIN)/python train_net.py --config-file configs/quickstart/detection.yaml OUTPUT_DIR $(OUTPUT) $(ARGS)

quickstart-segmentation: OUTPUT = output/quickstart_segmentation
quickstart-segmentation: $(VENV)/.installed
	$(BIN)/python -m d2_frozen.data.shapes --output datasets/shapes
	$(BIN)/python train_net.py --config-file configs/quickstart/segmentation.yaml OUTPUT_DIR $(OUTPUT) $(ARGS)

quickstart-video: OUTPUT = output/quickstart_video
quickstart-video: $(VENV)/.installed
	$(BIN)/python -m video_app.moving_shapes --output datasets/moving_shapes --train 1500
	$(BIN)/python train_net.py --config-file configs/quickstart/video.yaml OUTPUT_DIR $(OUTPUT) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests --numprocesses $(TESTS_AT_ONCE) --dist loadfile --max-worker-restart 0

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -m gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "d2_frozen needs Python 3.10 or newer; choose one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "could not make $(VENV) (on Debian and Ubuntu: apt install python3-venv)"; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed
