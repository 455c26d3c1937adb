# make setup | demo | test | lint | bench | constraints. Everything runs from .venv; nothing else is touched.

PYTHON ?= python3
# Extra arguments of `pip install`.
PIP_ARGS ?=
# Where pip would fetch CUDA builds of PyTorch and none are wanted: the address of PyTorch's CPU wheel index,
# see pytorch.org/get-started.
TORCH_INDEX ?=
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.setup-done

.PHONY: setup demo test lint bench constraints

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_ARGS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	./scripts/demo.sh

test: lint
	$(BIN)/pytest -n 2 $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks

# The versions that are installed now, without PyTorch's build tag, become the ones everybody gets.
constraints:
	{ sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --exclude fl-llama | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
