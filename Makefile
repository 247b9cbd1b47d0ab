# Every target does its own set-up; a second run starts at once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile

RUNS ?= runs

.PHONY: help setup run board test check test-slow test-integration bench clean

help:
	@echo "make run        cluster the built-in digits; pictures in runs/deepcluster-digits/report"
	@echo "make board      live curves of all runs in TensorBoard, on http://localhost:6006; RUNS=FOLDER of workdirs, by default runs"
	@echo "make test       all tests but the slow and the wide ones"
	@echo "make check      lint, types and the fast tests"
	@echo "make test-slow  several seeds, whole pipelines, more cases"
	@echo "make test-integration  launch/ in a real Slurm, and by other programs; says which to install"
	@echo "make bench      speed beside PyTorch, faiss and scikit-learn, half an hour or more; DATA=FOLDER of JPEG files for one part"
	@echo "make setup      only the environment, in .venv"

setup: $(READY)

$(READY): setup.py requirements.lock
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	@# setuptools warns of a package in its own folder, which is where it is meant to be
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint requirements.lock --editable '.[cpu,test]'
	@touch $@

run: $(READY)
	$(BIN)/python -m jaxclust.main --config=configs/deepcluster.py

board: $(READY)
	@test -d '$(RUNS)' || { echo "there is no folder '$(RUNS)' yet: start a training, or say make board RUNS=FOLDER"; exit 1; }
	$(BIN)/tensorboard --logdir '$(RUNS)'

test: $(READY)
	$(PYTEST) -m "not slow and not wide"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not wide and not medium"

test-slow: $(READY)
	$(PYTEST) -m "slow or wide"

test-integration: $(READY)
	$(BIN)/python -m pytest tests/integration

bench: $(READY)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[cpu,bench]'
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.kmeans
	$(BIN)/python -m benchmarks.spice_mstep
	$(BIN)/python -m benchmarks.dscl_memory
	$(BIN)/python -m benchmarks.clustering_scale
ifdef DATA
	$(BIN)/python -m benchmarks.round --data=$(DATA)
else
	@echo "left out: benchmarks.round, which needs DATA=FOLDER with a folder of JPEG files for each class"
endif

clean:
	rm -rf $(VENV) build *.egg-info
