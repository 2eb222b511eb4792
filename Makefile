# Every target makes the environment it needs by itself. PYTHON is the interpreter it is made from.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup demo paper lint test test-all clean

setup: $(STAMP)

$(STAMP): requirements-cpu.txt pyproject.toml packaging/fbgemm-gpu-cpu-shim/pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements-cpu.txt
	$(PY) -m pip check
	touch $(STAMP)

# DATA: folder of a log (docs/data.md); without it a synthetic log is made. SEEDS: trainings per arm.
OUT ?= out/$(if $(DATA),$(notdir $(DATA:/=)),synthetic)
SEEDS ?= 1
demo: $(STAMP)
	$(PY) -m apps.compare --output $(OUT) --seeds $(SEEDS) $(if $(DATA),--data $(DATA)) $(ARGS)

# TABLE: 1, 2, 3-history, 3-bytes, 3-new or 4 (apps/recipes.py); SEEDS trainings of each row.
TABLE ?= 1
paper: $(STAMP)
	$(PY) -m apps.paper --table $(TABLE) --data $(or $(DATA),../shared/data/ml1m) --seeds $(SEEDS) $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# The quick part: a sample of every matrix, every example in a docstring. test-all adds the tests marked slow.
PYTEST = $(PY) -m pytest -n 2 --dist worksteal $(ARGS)
test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

clean:
	rm -rf out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
