# One virtual environment in the project folder; every target prepares what it needs.
PYTHON ?= python3.11
BIN := .venv/bin
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup setup-dev demo serve test check bench

setup: .venv/cpu.stamp
setup-dev: .venv/dev.stamp

.venv/cpu.stamp: requirements/cpu.txt pyproject.toml
	@echo "quantserve: creating .venv and installing the pinned CPU environment (2-4 minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	@$(BIN)/pip install -q --no-deps $$(grep ^torch== requirements/cpu.txt) 2>/dev/null \
	  || $(BIN)/pip install -q --no-deps --index-url $(TORCH_INDEX) $$(grep ^torch== requirements/cpu.txt)
	@$(BIN)/pip install -q --no-deps -r requirements/cpu.txt
	@$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

.venv/dev.stamp: .venv/cpu.stamp requirements/dev.txt
	@echo "quantserve: adding the test tools"
	@$(BIN)/pip install -q --no-deps -r requirements/dev.txt
	@touch $@
