# make demo    sets up .venv and converts and measures the default model (minutes)
# make test    sets up .venv and runs the tests
# make check   linters and types
# make test-slow  the tests that need the default model or minutes
PYTHON ?= python3
BIN := .venv/bin

# Several workers share few cores on small machines: waiting threads must not spin.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-slow check clean

demo: .venv/installed
	$(BIN)/truedepth demo

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
