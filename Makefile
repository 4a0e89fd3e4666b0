# Every target creates the virtual environment first if it is missing; VENV=path selects another folder.
VENV ?= .venv
PYTHON ?= python3
STAMP := $(VENV)/.localign-installed
BIN := $(VENV)/bin

.PHONY: demo docs test test-all test-slow test-real test-web check format install clean

install: $(STAMP)

$(STAMP): pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh $(VENV)
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/localign demo --out runs/demo

DOCS_STAMP := $(VENV)/.localign-docs-installed

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --disable-pip-version-check --quiet -e ".[docs]"
	touch $(DOCS_STAMP)

# The site, in site/; `python -m http.server -d site` serves it, which its search needs.
docs: $(DOCS_STAMP)
	$(BIN)/python scripts/docs_pictures.py architecture
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Tests of less than five seconds each.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not thorough and not real"

# The slow tests too; CI runs this.
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# More than fifty injected faults, thousands of random inputs, a run of 20,000 steps, rehearsals of the visits to a GPU.
test-slow: $(STAMP)
	FUZZ_EXAMPLES=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" tests/faults tests/fuzz tests/packaging/test_gpu_visit.py

# Real weights, from two Python packages, and real photographs, from ../shared; skipped where they cannot be had.
test-real: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m real -rs tests/real

# The page of `localign explore` in a real browser; installs playwright and, where there is none, a browser.
test-web: $(STAMP)
	sh scripts/web_tests.sh $(BIN)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist site .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
