# Two commands on a fresh machine: `make demo` and `make test`. They need Python 3.11 or 3.12 with venv, g++ and git.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN ?= runs/demo
DRILL ?= runs/drill
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
TOO_OLD := "error: $(PYTHON) is Python %d.%d, and 3.11 or newer is needed: give PYTHON=python3.11" % sys.version_info[:2]
export DS_SKIP_CUDA_CHECK := 1

.PHONY: demo test lint drill install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and $(TOO_OLD))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[demo,dev]"
	touch $@

demo: install
	$(BIN)/python launch/pipeline.py --config launch/configs/demo.yaml --run.dir $(RUN) --data.shards $(RUN)/shards

test: install
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

drill: install
	ROADWORK_DRILL=long $(BIN)/python -m pytest tests/training/test_atomic.py tests/faults/test_random_kills.py
	$(BIN)/python -m tests.faults.kills --folder $(DRILL) --save
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python docs/generate_reliability.py

clean:
	rm -rf $(VENV) runs build *.egg-info
