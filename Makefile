# make demo   set up, then the smoke recipe end to end
# make test   set up, then the tests
# make check  lint and types

PYTHON ?= python3
VENV ?= .venv
# Without a GPU the pinned torch is installed first, so that nothing later pulls CUDA libraries. Where the default index
# would still give a CUDA build, point pip to a CPU one: make demo TORCH="torch==2.13.0 --index-url URL".
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
SIZE ?= laptop
DEMO_DIR ?= outputs/demo

INSTALLED := $(VENV)/.installed

.PHONY: demo test check clean

demo: $(INSTALLED)
	$(VENV)/bin/python -m deepspec.demo size=$(SIZE) output_dir=$(DEMO_DIR)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -m pip install --quiet -e ".[dev,deepspeed]"
	touch $@

clean:
	rm -rf $(VENV) outputs
