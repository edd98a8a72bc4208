PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint clean

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,video,dev]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -q

test-all: $(INSTALLED) lint
	$(BIN)/python -m pytest -q

clean:
	rm -rf runs build dist .pytest_cache .ruff_cache
