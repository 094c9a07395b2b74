# Every target below does the set-up first (.venv, from setup.py and constraints.txt).
#   make quickstart | test | slow | lint | bench | tensorboard | peers | .venv      PYTHON=/path/to/python3.11 chooses the interpreter

VENV = .venv
BIN = $(VENV)/bin
READY = $(VENV)/installed
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
RUNS = runs/quickstart

# A candidate must really run (a version manager's placeholder may not) and be able to make a virtual environment.
PROBE = import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))
CANDIDATES = $(or $(PYTHON),python3.11 python3.10 python3)
FOUND = $(shell for p in $(CANDIDATES); do if "$$p" -c '$(PROBE)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)
HELP = no working Python 3.10 or 3.11 with venv among: $(CANDIDATES). Get one with `uv python install 3.11`, `pyenv install 3.11` or `apt install python3.11-venv`, or name one: make PYTHON=/path/to/python3.11

.PHONY: quickstart test slow lint bench tensorboard peers .venv

quickstart: $(READY)
	$(BIN)/python main.py --config=configs/quickstart.py:teacher --workdir=$(RUNS)/teacher
	$(BIN)/python main.py --config=configs/quickstart.py:scratch --workdir=$(RUNS)/scratch
	$(BIN)/python main.py --config=configs/quickstart.py:distilled --workdir=$(RUNS)/distilled
	$(BIN)/python tools/compare_runs.py $(RUNS)/teacher $(RUNS)/scratch $(RUNS)/distilled

test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Speed and memory beside timm's (after `make peers`): half an hour, on a machine that does nothing else.
bench: $(READY)
	@mkdir -p runs/bench
	$(BIN)/python tools/benchmark.py set --config=configs/deit_tiny_flowers.py --out=runs/bench/$(shell date +%Y-%m-%d-%H%M).md

tensorboard: $(READY)
	$(BIN)/tensorboard --logdir runs

# torch, timm and transformers: what reads .pth files, and what the tests compare with. The CPU build where there is one.
peers: $(READY)
	@$(PIP) --editable ".[peers]"

.venv: $(READY)

# The stamp is written last: an interrupted installation is started anew, and so is one older than the lists of packages.
$(READY): setup.py constraints.txt
	@$(if $(FOUND),,$(error $(HELP)))
	@echo "Installing into $(VENV) with $(FOUND): 2 GB, a few minutes"
	@"$(FOUND)" -m venv --clear $(VENV)
	@$(PIP) --upgrade pip setuptools wheel
	@$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@
