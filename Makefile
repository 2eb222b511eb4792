# Every target makes the environment it needs by itself: demo and paper a user's, lint and test a developer's.
# PYTHON is the interpreter it is made from: the first of these that is there.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13,$(shell $(p) -c 'import venv; print("$(p)")' 2>/dev/null)))
VENV := .venv
PY := $(VENV)/bin/python
FOR_USERS := $(VENV)/.user
FOR_DEVELOPERS := $(VENV)/.developer
PINS := requirements-cpu.txt pyproject.toml setup.py packaging/fbgemm-gpu-cpu-shim/pyproject.toml

.PHONY: setup demo paper lint test test-all mutants check-docs docs dist serve-setup clean

setup: $(FOR_DEVELOPERS)

$(PY):
	$(if $(PYTHON),,$(error Python 3.11, 3.12 or 3.13 is needed and none is found; name one: make PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)

$(FOR_USERS): $(PINS) | $(PY)
	$(PY) -m pip install --quiet -r requirements-cpu.txt
	$(PY) -m pip check
	touch $@

$(FOR_DEVELOPERS): requirements-dev.txt $(PINS) | $(PY)
	$(PY) -m pip install --quiet -r requirements-dev.txt
	$(PY) -m pip check
	touch $(FOR_USERS) $@

# DATA: folder of a log (docs/data.md); without it a synthetic log is made. SEEDS: trainings per arm.
OUT ?= out/$(if $(DATA),$(notdir $(DATA:/=)),synthetic)
SEEDS ?= 1
demo: $(FOR_USERS)
	$(PY) -m apps.compare --output $(OUT) --seeds $(SEEDS) $(if $(DATA),--data $(DATA)) $(ARGS)

# TABLE: 1, 2, 2-bare, 3-history, 3-bytes, 3-new or 4 (apps/recipes.py); SEEDS trainings of each row; ROWS: a file
# of rows of your own (docs/results.md).
TABLE ?= 1
paper: $(FOR_USERS)
	$(PY) -m apps.paper --table $(TABLE) --data $(or $(DATA),../shared/data/ml1m) --seeds $(SEEDS) $(if $(ROWS),--rows_file $(ROWS)) $(ARGS)

lint: $(FOR_DEVELOPERS)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# The quick part: a sample of every matrix, every example in a docstring. test-all adds the tests marked slow.
PYTEST = $(PY) -m pytest -n 2 --dist worksteal $(ARGS)
test: lint
	$(PYTEST) -m "not slow"

test-all: lint serve-setup
	$(PYTEST)

# Whether tests notice single changes to the code (tests/mutants); ARGS="--room catalog" for some of them.
mutants: $(FOR_DEVELOPERS)
	$(PY) -m tests.mutants $(ARGS)

# The pages: links, anchors, commands, every example that is run, numbers against docs/tables.
check-docs: $(FOR_DEVELOPERS)
	$(PY) -m pytest tests/test_docs.py tests/apps/test_saved_tables.py tests/test_readme.py tests/test_move_to_sids.py tests/*/test_docs.py

# The reference of the library, from its docstrings: out/api/index.html.
docs: $(FOR_DEVELOPERS)
	$(PY) -m pdoc --docformat google --output-directory out/api torchrec_sid

# A folder to install from elsewhere: pip install -r dist/requirements-cpu.txt
dist: $(FOR_USERS)
	rm -rf build dist
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist . ./packaging/fbgemm-gpu-cpu-shim
	(echo "--find-links ."; sed -e '/^#/d' -e 's|^\./packaging.*|fbgemm-gpu==1.8.0+cpu.shim|' -e 's|^-e \.|torchrec-sid|' \
		requirements-cpu.txt) > dist/requirements-cpu.txt

# A server has an environment of its own (requirements-serve.txt); its tests bring a client.
serve-setup: .venv-serve/.installed

.venv-serve/.installed: requirements-serve.txt packaging/serving/pyproject.toml
	test -x .venv-serve/bin/python || $(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python -m pip install --quiet -r requirements-serve.txt "tritonclient[all]"
	.venv-serve/bin/python -m pip check
	touch $@

clean:
	rm -rf out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
