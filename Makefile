# Everything runs in .venv, which the first call makes from pyproject.toml and constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help setup demo test test-long test-torchmeta lint docs clean

help:
	@echo "make demo       MAML against MAML + gradient sharing on letters of unseen scripts (under 4 minutes)"
	@echo "make test       the tests"
	@echo "make test-long  the tests with many more hypothesis examples, and the slow ones"
	@echo "make test-torchmeta  torchmeta's own tests, with our mends"
	@echo "make lint       format, lint, types, and the direction of imports"
	@echo "make docs       the documentation site, in site/"
	@echo "make clean      remove what these made (but not runs/)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "metaplug needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint,docs,torchmeta]'
	$(BIN)/pip install --quiet --no-deps torchmeta==1.8.0
	@touch $(READY)

demo: $(READY)
	@rm -rf runs/demo
	$(BIN)/metaplug compare --tasks glyphs --ways 5 --shots 1 --variant maml --variant maml+gradient-sharing --iterations 200 --set runtime.threads=1 --out runs/demo

test: $(READY)
	$(BIN)/pytest

test-long: $(READY)
	HYPOTHESIS_PROFILE=long $(BIN)/pytest --run-slow

# Its package has its tests; one of them wants flaky, which stays out of .venv, as it would run in our tests too.
test-torchmeta: $(READY)
	$(BIN)/pip install --quiet --upgrade --target build/flaky flaky==3.8.1
	PYTHONPATH=build/flaky $(BIN)/python -c 'from metaplug.tasks.torchmeta_mends import apply; apply(); import pytest; \
		raise SystemExit(pytest.main(["-q", "-rs", "-c", "/dev/null", "-p", "no:cacheprovider", "--pyargs", "torchmeta.tests"]))'

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build site .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
