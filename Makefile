# Two commands on a fresh machine: `make quickstart` and `make test`.
# PYTHON chooses the interpreter, VENV the folder, PIP_ARGS goes to every pip install (see README for torch's CPU build).
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
PIP_ARGS ?=
ARGS ?=

.PHONY: quickstart test slow clean

quickstart: $(VENV)/installed
	$(VENV)/bin/okavango quickstart $(ARGS)

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal $(ARGS)

slow: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -q -m slow $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q $(PIP_ARGS) torch torchvision
	$(PIP) install -q $(PIP_ARGS) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install -q $(PIP_ARGS) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
