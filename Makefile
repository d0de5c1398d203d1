# Every target makes and reuses .venv by itself: `make quickstart` and `make test` are all a
# newcomer types. Another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The stamps are written last, so a .venv whose making was interrupted is never taken for a good one.
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
SOURCES := $(wildcard src tests benchmarks)

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format bench clean
# A recipe that fails must not leave its target behind as if it had been made.
.DELETE_ON_ERROR:

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: $(STAMP) ## install, then train and compare Standard MDLM and MemDLM in minutes
	$(BIN)/memdlm quickstart $(ARGS)

test: $(DEV_STAMP) ## install, then run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(DEV_STAMP) ## ruff (rules and formatting) and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(DEV_STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(DEV_STAMP) ## time, memory and FLOPs of one training step
	$(BIN)/python -m benchmarks.speed.train

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache src/.mypy_cache .pytest_cache .ruff_cache build dist
	find src tests $(wildcard benchmarks) -type d -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11;" \
	       "name a newer one, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@rm -f $(STAMP) $(DEV_STAMP)
	@test ! -d $(VENV) || $(BIN)/python -m pip --version >/dev/null 2>&1 || rm -rf $(VENV)
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
