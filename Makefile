# `make demo` and `make test` set up everything they need in .venv; nothing but make and python3 >= 3.11 has to be there.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin
PIP    := $(RUN)/python -m pip install --disable-pip-version-check --quiet
PYTEST := $(RUN)/python -m pytest
ARGS   ?=
BENCH  ?= extraction

# Compiled programs are kept between runs; a cache must not be shared across jaxlib versions.
pin = $(shell sed -n 's/.*"$(1)==\([^"]*\)".*/\1/p' pyproject.toml)
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax/jaxlib-$(call pin,jaxlib)-$(shell uname -m)
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
export JAX_PLATFORMS ?= cpu

FAST := not slow and not long and not torch and not aot and not device
SLOW := slow and not shipped and not long and not torch and not aot
REST := (shipped or torch or aot) and not long

.PHONY: help demo test parity long aot bench format lint ci ci-rest slow clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: $(VENV)/base.stamp ## fine-tune the embedded model on ten pictures and show which ones leak; ARGS="--images DIR" takes your own
	$(RUN)/dmsec demo --out out/demo $(ARGS)

# Most of a test's time goes into compiling: without LLVM's optimisations and through the older, plainer emitters,
# it takes half as long on an empty cache. What is compared with PyTorch, compiled for TPUs or `shipped` runs as it ships.
test slow: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2
test: $(VENV)/test.stamp ## the fast tests
	$(PYTEST) -m "$(FAST)" --ignore=tests/parity -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

parity: $(VENV)/torch.stamp ## compare with PyTorch diffusers and transformers
	$(PYTEST) -m torch $(ARGS)

long: $(VENV)/test.stamp ## more of what the slow tests try: dozens of kills at random moments
	$(PYTEST) -m long $(ARGS)

aot: $(VENV)/aot.stamp ## compile small steps for TPU topologies and look at what they exchange
	$(PYTEST) -m aot $(ARGS)

bench: $(VENV)/base.stamp ## one benchmark: BENCH=extraction ARGS=...
	$(RUN)/python -m benchmarks.$(BENCH) $(ARGS)

format: $(VENV)/test.stamp ## rewrite the code in the project's style
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

lint: $(VENV)/test.stamp ## check the style, change nothing
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

ci: test ci-rest ## everything that must pass before a change is merged

slow: $(VENV)/test.stamp ## the slow tests of our own, as the fast ones are compiled
	$(PYTEST) -m "$(SLOW)" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

ci-rest: lint slow $(VENV)/torch.stamp $(VENV)/aot.stamp
	$(PYTEST) -m "$(REST)" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

clean: ## remove the environment, caches and results
	rm -rf $(VENV) .cache out build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/base.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dmsec_jax needs Python 3.11 or newer, got " + sys.version.split()[0] + "; name one with make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV) (once; a few minutes, most of it downloads)"
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(PIP) --editable '.[test]'
	@touch $@

# torch on its own first: met through another package, a resolver may take a build with gigabytes of CUDA libraries
$(VENV)/torch.stamp: $(VENV)/test.stamp
	$(PIP) torch==$(call pin,torch)
	$(PIP) --editable '.[test,torch,causal-peers]'
	@touch $@

$(VENV)/aot.stamp: $(VENV)/test.stamp
	$(PIP) --editable '.[test,aot]'
	@touch $@
