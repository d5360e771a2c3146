# Each target sets up all it needs: a virtual environment in .venv with the package (editable) and tested versions.
#   make demo    the quickstart and a forecast of a real time series
#   make quick   in two minutes: one test of each feature, backend and solver
#   make test    all tests that need no GPU
#   make check   lint, format, types, documentation
#   make matrix  the tests under other versions of Python, torch, Triton and transformers; gigabytes, an hour
#   make docs    the documentation as a site, in site/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A warning is an error: a dead link, a name that a docstring cites and no page has.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: demo quick test check matrix docs bench clean

demo: $(READY)
	$(BIN)/python examples/minimal_usage.py
	$(BIN)/python examples/forecast_sunspots.py

# Two processes of one thread each: on small tensors threads cost more than they bring.
quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "quick and not slow and not gpu" -n 2 tests

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu" -n 2 tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(SITE)

matrix: $(READY)
	$(BIN)/python -m tests.matrix

docs: $(READY)
	$(SITE)
	@echo "site/index.html"

bench: $(READY)
	$(BIN)/python -m pytest -q benchmarks

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "flashlla needs Python 3.10 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Setting up $(VENV) (the first time only) ..."
# Without a GPU, torch's CPU build where pip can reach one: the default build brings gigabytes of CUDA libraries.
	@if command -v nvidia-smi >/dev/null 2>&1 || \
	  ! $(BIN)/python -m pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)+cpu" 2>/dev/null; \
	  then $(BIN)/python -m pip install -q -c constraints.txt torch; fi
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .matrix
