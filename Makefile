# `make demo` and `make test` each do all of their own set-up in $(VENV); nothing else is needed but
# Python >= 3.10 with venv, a Rust toolchain and a C compiler.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# One process a core, each with one thread; whoever has nothing left to do takes tests from another. At most
# four: a container may see more cores than it gets.
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal
SOURCES := pyproject.toml README.md $(shell find rust -name target -prune -o -type f -print)

export HF_HUB_OFFLINE := 1
# Where clippy, the tests and the wheel find what another has built. All three use the release profile, so that
# dependencies are compiled once; in tests our own crates, and what only tests need, are as in a debug build.
export CARGO_TARGET_DIR := $(CURDIR)/rust/target
DEBUG := $(foreach setting,debug-assertions=true overflow-checks=true opt-level=0,\
  $(foreach crate,barqtrain-core barqtrain-text proptest,--config profile.release.package.$(crate).$(setting)))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# While pip waits for the network, cargo compiles.
MAKEFLAGS += --jobs=2
unexport MAKEFLAGS MFLAGS # cargo and rustdoc would look for a job server in them

.PHONY: demo test test-rust lint lint-python lint-rust format clean

# The user's own data: make demo DATA=path. Further options: make demo ARGS="--seed 1".
demo: $(VENV)/.demo
	@echo "make demo: training a small model twice$(if $(DATA),,: about two minutes on two CPU cores)."
	$(BIN)/barqtrain demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: lint-python test-rust
	$(PYTEST)

test-rust: lint-rust
	cd rust && cargo test --release --quiet $(DEBUG)

lint: lint-python lint-rust

lint-python: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-rust:
	cd rust && cargo fmt --all --check
	cd rust && cargo clippy --release --quiet --all-targets -- -D warnings

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd rust && cargo fmt --all

clean:
	rm -rf $(VENV) rust/target demo-output

$(BIN)/python:
	@echo "make: creating $(VENV), where everything below goes; some seconds."
	$(PYTHON) -m venv $(VENV)

# Python compiles what is imported; pip would compile all that was installed, three times as much.
$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	@echo "make demo: installing the package. pip downloads PyTorch and the rest, some GB, and cargo compiles"
	@echo "the Rust part: about ten minutes the first time on two CPU cores. The next time it starts at once."
	$(BIN)/pip install --no-compile --editable '.[bench]'
	@if command -v nvidia-smi >/dev/null; then \
	  echo "make demo: installing CuPy, which compiles the CUDA kernels at their first use."; \
	  $(BIN)/pip install --quiet --editable ".[cuda$$($(BIN)/python -c 'import torch; print((torch.version.cuda or "13").split(".")[0])')]"; \
	fi
	touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	@echo "make: installing what tests, linters and the extras need; some GB, and many minutes the first time."
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@
