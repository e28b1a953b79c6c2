# For users
#   make demo [PHOTOS=folder]
#                      explain photographs by a network that was trained on ImageNet: those that
#                      installed packages ship, or your own
#   make demo DATA=digits|mnist|fashion-mnist|cifar10 [FOLDER=where the files are]
#                      draw MIP-IN beside other methods, and print how complete its signal is
# For maintainers
#   make test          lint, types, tests and doctests, as continuous integration runs them
#   make test-all      the same, with the long tests (pytest marker `full`)
#   make test-oldest   tests with the oldest dependencies that pyproject.toml allows
#   make lint          ruff and mypy alone
#   make format        mend what ruff can mend
#   make docs          write docs/operations.md, the tables of all pages from benchmarks/results/, and
#                      the site, build/site/index.html, which needs no network
#   make notebooks     run the notebooks and keep what they show
#   make bench [BENCH=speed_methods] [ARGS="..."]
#                      run a script of benchmarks/, which writes benchmarks/results/
#   make dist          build the sdist and the wheel, and check them
#   make release-check the same, then install the wheel in a fresh environment and run README's
#                      first example from it
#   make clean         remove what these targets made
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
DATA ?= photographs
BENCH ?= speed_methods
BIN := $(VENV)/bin
PYTEST := -m pytest -q -n 2 --dist loadfile

.PHONY: demo test test-all test-oldest lint format docs notebooks bench dist release-check clean

demo: $(VENV)/demo
	$(BIN)/python benchmarks/demo.py $(DATA) --out demo_output $(if $(FOLDER),--data $(FOLDER)) $(if $(PHOTOS),--photos "$(PHOTOS)")

test test-all test-oldest: export OMP_NUM_THREADS = 1

test: lint
	$(BIN)/python $(PYTEST)

test-all: lint
	$(BIN)/python $(PYTEST) -m "full or not full"

test-oldest: $(OLDEST)/dev
	$(OLDEST)/bin/python $(PYTEST)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs
	$(BIN)/python docs/operations.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python docs/make_site.py

notebooks: $(VENV)/dev
	$(BIN)/python notebooks/execute.py

bench: $(VENV)/dev
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

dist: $(VENV)/dev
	$(BIN)/pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

release-check: dist
	$(BIN)/python .ci/release_check.py dist

clean:
	rm -rf $(VENV) $(OLDEST) demo_output build dist *.egg-info

$(VENV)/demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '.[demo]'
	touch $@

$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/demo

$(VENV)/docs: $(VENV)/dev
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

# "torch>=2.9" in pyproject.toml becomes torch==2.9.*, and so on: needs Python 3.10 to 3.12
$(OLDEST)/dev: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	grep -oE '"[a-z-]+>=[0-9.]+' pyproject.toml | sed 's/^"//; s/>=\(.*\)/==\1.*/' > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/pip install --quiet -e '.[dev]' -c $(OLDEST)/oldest.txt
	touch $@
