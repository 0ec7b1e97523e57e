# `make demo` and `make test` each do all of their own set-up in $(VENV); nothing else is needed but
# Python >= 3.10 with venv, a Rust toolchain and a C compiler.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := pyproject.toml README.md $(shell find rust -name target -prune -o -type f -print)

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format clean

# The user's own data: make demo DATA=path. Further options: make demo ARGS="--seed 1".
demo: $(VENV)/.demo
	$(BIN)/barqtrain demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: lint
	cd rust/core && cargo test --quiet
	cd rust/py && cargo test --quiet
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for crate in rust/core rust/py; do \
	  (cd $$crate && cargo fmt --check && cargo clippy --quiet --all-targets -- -D warnings) || exit 1; \
	done

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	for crate in rust/core rust/py; do (cd $$crate && cargo fmt); done

clean:
	rm -rf $(VENV) rust/core/target rust/py/target demo-output

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[bench]'
	if command -v nvidia-smi >/dev/null; then \
	  $(BIN)/pip install --quiet --editable ".[cuda$$($(BIN)/python -c 'import torch; print(torch.version.cuda.split(".")[0])')]"; \
	fi
	touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
