# Two commands for a newcomer: `make demo` and `make test`. Each sets up a virtual environment first, if there is none.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
READY := $(VENV)/.ready

.PHONY: demo test check sample clean help

help:
	@echo "make demo    convert, load, run and evaluate the sample model; writes demo-output/report.html"
	@echo "make test    run all tests"
	@echo "make check   lint and types"
	@echo "make sample  train the sample model again (about an hour)"
	@echo "make clean   remove the virtual environment and what was built"

demo: $(READY)
	$(VENV)/bin/llama4-quant demo --output demo-output --overwrite

test: $(READY)
	$(VENV)/bin/python -m pytest

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

sample: $(READY)
	$(VENV)/bin/python -m llama4_quant.sample.train

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamp is written last, so an interrupted set-up starts again. Versions are pinned in .ci/constraints.txt.
$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c .ci/constraints.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt --editable '.[dev]'
	@touch $@
