# Two commands matter: `make serve` and `make test`. Both make .venv first, from the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTERPRETED := tests/kernels/triton# these keep one core busy each, and start nothing: two at a time

.PHONY: serve test lint unit protos evaluate clean

serve: $(VENV)/.runtime
	@exec $(BIN)/manta serve --config configs/demo.yaml $(FLAGS)

test: lint unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.dev
ifeq ($(strip $(ARGS)),)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(INTERPRETED)
	$(BIN)/python -m pytest --ignore=$(INTERPRETED)
else
	$(BIN)/python -m pytest $(ARGS)
endif

# Execution accuracy of the demo model, through a server that `make serve` runs in another terminal.
evaluate: $(VENV)/.dev
	$(BIN)/python examples/text2sql/evaluate.py $(ARGS)

protos: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -I.typing --python_out=.typing --pyi_out=.typing --grpc_python_out=.typing \
	    .typing/manta/protos/*.proto

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else \
	    "Manta needs Python 3.11 to 3.13 and %s is %d.%d; name one with PYTHON=..." \
	    % ("$(PYTHON)", *sys.version_info[:2]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the packages pinned in constraints.txt into $(VENV) (the first time takes a few minutes)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the packages pinned in constraints.txt into $(VENV) (the first time takes a few minutes)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
