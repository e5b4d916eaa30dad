# `make run` shows the product; `make test` proves it; `make check` holds the style. Each sets up what it needs.
SHELL := /bin/sh
PYTHON ?= python3
RUN := .venv
DOCS := .venv-docs
DEV := .venv-dev
# The type checker and the import contracts see the repository root as the package `expertslice` through this link.
LINK := .links/expertslice

# The reference is drawn from the packages that it names: the root holds environments too.
REFERENCE := build/reference/expertslice

.PHONY: run test test-all check format no-torch docs clean

run: $(RUN)/.ready
	$(RUN)/bin/expertslice whatif

test: $(DEV)/.ready
	PYTHONSAFEPATH=1 $(DEV)/bin/pytest -n 2 --dist worksteal -p no:benchmark $(PYTEST_ARGS)

test-all: $(DEV)/.ready
	PYTHONSAFEPATH=1 $(DEV)/bin/pytest -m "not gpu" $(PYTEST_ARGS)

check: $(DEV)/.ready $(LINK)
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/codespell
	$(DEV)/bin/basedpyright
	PYTHONPATH=.links $(DEV)/bin/lint-imports

format: $(DEV)/.ready
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

# Traces, policies, the simulator and what-if must work where torch cannot be imported.
no-torch: $(RUN)/.ready
	PYTHONSAFEPATH=1 $(RUN)/bin/python tests/no_torch_check.py

# The documentation's site, into build/site: building it needs no network.
docs: $(DOCS)/.ready
	@rm -rf $(REFERENCE) && mkdir -p $(REFERENCE) && ln -s $(addprefix $(CURDIR)/,__init__.py policies traces sim runtime kernels) $(REFERENCE)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=1,<2'
	@touch $@

$(RUN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(DEV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install --quiet --disable-pip-version-check -e '.[gpu,hf,dev]'
	@touch $@

$(LINK):
	@mkdir -p .links && ln -sfn .. $(LINK)

clean:
	rm -rf $(RUN) $(DEV) $(DOCS) .links .pytest_cache .ruff_cache .hypothesis build *.egg-info
