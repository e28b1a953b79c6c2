# make demo [DATA=digits|mnist|fashion-mnist|cifar10] [FOLDER=where the files are]   side-by-side figure and completeness
# make test                                                                          lint, types, tests, doctests
PYTHON ?= python3
VENV ?= .venv
DATA ?= digits
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/demo
	$(BIN)/python benchmarks/demo.py $(DATA) --out demo_output $(if $(FOLDER),--data $(FOLDER))

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '.[demo]'
	touch $@

$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) demo_output build *.egg-info
