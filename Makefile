# Everything starts here: `make quickstart` in a fresh clone needs only Python 3.11-3.13 and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup quickstart check test bench lock

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{printf "%-16s %s\n", $$1, $$2}'

setup: $(READY)  ## install everything into .venv, once per change of requirements.lock

quickstart: $(READY)  ## crawl, pre-train, evaluate and register a small ALBEF, in minutes
	$(BIN)/python jobs/quickstart.py

check: $(READY)  ## format, lint, types, import contracts and spelling, in under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/typos

test: $(READY)  ## every test that this machine can run, and why the others are skipped
	$(BIN)/pytest -ra --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: $(READY)  ## measure a training step
	$(BIN)/python -m benchmarks.step

lock: $(READY)  ## solve pyproject.toml again into requirements.lock
	$(FIND_UV); "$$uv" pip compile pyproject.toml --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate -o requirements.lock

# A uv on the PATH, else one that pip puts under build/: with --target, which needs no rights
# outside the clone, or in a venv of its own where this Python comes without pip.
define FIND_UV
set -e; uv=uv; uv --version >/dev/null 2>&1 || { \
  uv=build/uv/bin/uv; "$$uv" --version >/dev/null 2>&1 || { \
    echo "setup: no uv on the PATH, so pip installs one under build/uv"; rm -rf build/uv; \
    $(PYTHON) -m pip install --quiet --target build/uv uv 2>/dev/null || { \
      $(PYTHON) -m venv --clear build/uv && build/uv/bin/python -m pip install --quiet uv; }; }; }
endef

# uv reads its own configuration; where it has none, it asks the package index that pip asks.
define USE_PIP_INDEX
index=$${PIP_INDEX_URL:-$$($(PYTHON) -m pip config get global.index-url 2>/dev/null || true)}; \
test -e "$${XDG_CONFIG_HOME:-$$HOME/.config}/uv/uv.toml" || test -e /etc/uv/uv.toml || \
  test -z "$$index" || export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"
endef

# The Python is one that the machine has: uv is not to download another. Bytecode is compiled now,
# or each of the ten processes of a small run would compile torch, Ray and MLflow for itself.
$(READY): requirements.lock pyproject.toml
	@$(FIND_UV); $(USE_PIP_INDEX); \
	export UV_PYTHON_DOWNLOADS=never; set -x; \
	"$$uv" venv --quiet --allow-existing --python '>=3.11,<3.14' .venv; \
	"$$uv" pip sync --python $(BIN)/python --compile-bytecode \
	  --require-hashes requirements.lock; \
	"$$uv" pip install --quiet --python $(BIN)/python --no-deps --editable .; \
	touch $@
