# One virtual environment in the project folder; every target prepares what it needs and says so.
PYTHON ?= python3.11
BIN := .venv/bin
TORCH_INDEX := https://download.pytorch.org/whl/cpu
ARTIFACT ?= .demo/smollm2-w4a16
# Two at a time, of a thread each: small tensors gain nothing from more, and lose where cores are busy.
UNITS := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help setup setup-dev demo serve test check lint bench

help:
	@grep -E '^## ' Makefile | sed 's/^## //'

## setup   create .venv with the pinned CPU environment
setup: .venv/cpu.stamp
setup-dev: .venv/dev.stamp

.venv/cpu.stamp: requirements/cpu.txt pyproject.toml
	@echo "quantserve: installing the pinned CPU environment into .venv (2-4 minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	@$(BIN)/pip install -q --no-deps $$(grep ^torch== requirements/cpu.txt) 2>/dev/null \
	  || $(BIN)/pip install -q --no-deps --index-url $(TORCH_INDEX) $$(grep ^torch== requirements/cpu.txt)
	@$(BIN)/pip install -q --no-deps -r requirements/cpu.txt
	@$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

.venv/dev.stamp: .venv/cpu.stamp requirements/stores.txt requirements/dev.txt
	@echo "quantserve: adding the object stores' drivers and the test tools to .venv"
	@$(BIN)/pip install -q --no-deps -r requirements/stores.txt -r requirements/dev.txt
	@touch $@

## demo    train a small LoRA, quantize, serve, ask, swap the adapter in, show metrics
demo: setup
	@$(BIN)/python -m bench.demo

## serve   serve the demo's artifact (ARTIFACT=DIR for another) on 127.0.0.1:8000
serve: setup
	@test -d $(ARTIFACT) || $(BIN)/quantserve quantize demo --out $(ARTIFACT)
	@$(BIN)/quantserve serve $(ARTIFACT)

## test    everything: lint, types, unit tests, and the real server under real clients;
##         ISA=avx2 or ISA=avx512: only what depends on arithmetic, as on such a machine
ifdef ISA
test: setup-dev
	@$(BIN)/python -m tests.held $(ISA)
else
test: lint
	@tests/setup-prometheus.sh
	@tests/setup-azurite.sh
	@tests/setup-triton.sh
	@$(UNITS) -m "not e2e"
	@$(BIN)/python -m pytest -m e2e
endif

## check   what to run before a commit: lint, types, unit tests
check: lint
	@$(UNITS) -m "not e2e"

lint: setup-dev
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && $(BIN)/mypy

## bench   the published numbers: kernels, then serving beside plain vLLM (see bench/)
bench: setup
	@$(BIN)/python -m bench.kernels
	@for s in w4a16 w8a16 w8a8; do test -d .demo/smollm2-$$s \
	  || $(BIN)/quantserve quantize demo --scheme $$s --out .demo/smollm2-$$s || exit; done
	@$(BIN)/python -m bench.serve --w4a16 .demo/smollm2-w4a16 --w8a16 .demo/smollm2-w8a16 --w8a8 .demo/smollm2-w8a8
