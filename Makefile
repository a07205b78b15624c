# Every target sets up what it needs: see scripts/bootstrap.py. PYTHON picks another interpreter.
PYTHON ?= python3
RUN = $(PYTHON) scripts/bootstrap.py
# Arguments for demo, bench and the test targets: make test ARGS="-k routing"
ARGS ?=
JOBS ?= 2
CPU_TESTS = $(wildcard tests/unit tests/kernels tests/integrations tests/examples tests/test_examples.py)

.PHONY: help demo test test-cpu test-compile test-compile-here test-compile-newest test-kernels-newest \
	test-transformers test-gpu bench lint format docs wheel clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

demo: ## a Mixture-of-Experts model generating through Tilewise, checked against its own code
	$(RUN) run -m tilewise.cli demo $(ARGS)

test: ## everything that runs without a GPU
	@$(MAKE) --no-print-directory test-compile-here; compiled=$$?; \
	$(MAKE) --no-print-directory test-cpu && exit $$compiled

# The interpreter must be chosen before the kernels are imported.
test-cpu: ## units, kernels in Triton's interpreter, integrations, examples
	TRITON_INTERPRET=1 $(RUN) test -m pytest $(CPU_TESTS) -n $(JOBS) $(ARGS)

# A process of its own: an interpreted function cannot be compiled.
test-compile-here:
	$(RUN) test -m pytest tests/compile -n $(JOBS) $(ARGS)

test-compile-newest: # without torch
	$(RUN) triton-newest -m pytest tests/compile -n $(JOBS) $(ARGS)

# Beside the tests' own version; --no-deps, since everything else is there. 5.10 wants older tokenizers.
TRANSFORMERS_OLDEST = transformers==5.10.1 "tokenizers>=0.22,<0.23"
TRANSFORMERS_NEWEST = transformers==5.23.0
HOST_TESTS = tests/integrations/test_transformers.py tests/integrations/test_families.py

test-transformers: ## the oldest and the newest transformers that are supported
	$(RUN) test -m pip install -q --no-deps --target .hosts/oldest $(TRANSFORMERS_OLDEST)
	PYTHONPATH=.hosts/oldest $(RUN) test -m pytest $(HOST_TESTS) -n $(JOBS)
	$(RUN) test -m pip install -q --no-deps --target .hosts/newest $(TRANSFORMERS_NEWEST)
	PYTHONPATH=.hosts/newest $(RUN) test -m pytest $(HOST_TESTS) -n $(JOBS)

NEWEST_TRITON = $(shell sed -n 's/^NEWEST_TRITON = "\(.*\)"/\1/p' scripts/bootstrap.py)

test-kernels-newest: ## kernels in the interpreter of the newest Triton that is supported
	$(RUN) test -m pip install -q --no-deps --target .hosts/triton $(NEWEST_TRITON)
	TRITON_INTERPRET=1 PYTHONPATH=.hosts/triton $(RUN) test -m pytest tests/kernels -n $(JOBS) $(ARGS)

test-compile: test-compile-here test-compile-newest ## with the Triton of the tests, and the newest

test-gpu: ## kernels and integrations on the GPU of this machine
	$(RUN) test-gpu -m pytest tests/kernels tests/gpu tests/integrations $(ARGS)

bench: ## measure this machine's GPU against the other libraries
	$(RUN) bench -m bench $(ARGS)

lint: ## ruff and mypy
	$(RUN) lint -m ruff check .
	$(RUN) lint -m ruff format --check .
	$(RUN) lint -m mypy

format: ## let ruff fix what it can
	$(RUN) lint -m ruff check --fix .
	$(RUN) lint -m ruff format .

docs: ## run the code blocks and follow the links of every page
	$(RUN) test -m pytest tests/test_examples.py -k of_page $(ARGS)

wheel: ## build the wheel, install it apart from the sources, use it
	$(RUN) run scripts/check_wheel.py

clean: ## remove environments, caches and build outputs
	rm -rf .venv .venv-triton-newest build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
