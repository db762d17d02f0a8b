# Everything but gpu-report runs in .venv, which the first call makes from pyproject.toml and
# constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
PEERS := .venv-peers/bin
ARGS ?=
CHECK := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "metaplug needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
# Two workers of one thread each take two cores; a worker that has no test left takes over half of
# another's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: help setup demo test test-long test-isa test-torchmeta bench-peers gpu-report lint docs clean

help:
	@echo "make demo       MAML against MAML + gradient sharing on letters of unseen scripts (under 4 minutes)"
	@echo "make test       the tests"
	@echo "make test-long  the tests with many more hypothesis examples, and the slow ones"
	@echo "make test-isa   the tests as processors without AVX, with AVX2 and with AVX-512 would run them"
	@echo "make test-torchmeta  torchmeta's own tests, with our fixes"
	@echo "make bench-peers  metaplug bench beside the libraries of others, in .venv-peers; options as ARGS=\"--workload sinusoid-25x5\""
	@echo "make gpu-report  one page about a GPU: tests, times, memory, a short training (10 minutes); installs nothing: PYTHON=python3"
	@echo "make lint       format, lint, types, and the direction of imports"
	@echo "make docs       the documentation site, in site/"
	@echo "make clean      remove what these made (but not runs/)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(CHECK)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint,docs,torchmeta]'
	$(BIN)/pip install --quiet --no-deps torchmeta==1.8.0
	@touch $(READY)

demo: $(READY)
	@rm -rf runs/demo
	$(BIN)/metaplug compare --tasks glyphs --ways 5 --shots 1 --variant maml --variant maml+gradient-sharing --iterations 200 --set runtime.threads=1 --out runs/demo

test: $(READY)
	$(PYTEST) $(ARGS)

test-long: $(READY)
	HYPOTHESIS_PROFILE=long $(PYTEST) --run-slow $(ARGS)

# torch's own kernels, oneDNN's and MKL's each choose their instructions at start, by these variables.
# One that the processor lacks is not imitated: torch then takes the best that it has.
test-isa: $(READY)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(PYTEST) $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(PYTEST) $(ARGS)
	ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512 $(PYTEST) $(ARGS)

# Its package has its tests; one of them wants flaky, which stays out of .venv, as it would run in our tests too.
test-torchmeta: $(READY)
	$(BIN)/pip install --quiet --upgrade --target build/flaky flaky==3.8.1
	PYTHONPATH=build/flaky $(BIN)/python -c 'from metaplug.tasks.torchmeta.compatibility import apply; apply(); import pytest; \
		raise SystemExit(pytest.main(["-q", "-rs", "-c", "/dev/null", "-p", "no:cacheprovider", "--pyargs", "torchmeta.tests"]))'

bench-peers: .venv-peers/ready
	$(PEERS)/metaplug bench $(ARGS)

# Their pins are older than what works, hence --no-deps beside what they really need; betty-ml's are no valid form for a newer pip. The C sources
# that learn2learn comes with do not compile since Python 3.11, those that a new Cython makes do. What cannot be had here, the bench says.
.venv-peers/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/pip install --quiet 'pip<24.1' setuptools wheel cython
	$(PEERS)/pip install --quiet --constraint constraints.txt --editable '.[test]' optree graphviz tqdm requests
	for peer in torchopt==0.7.3 parallel-metalearn==0.5.6 betty-ml==0.1.1 gym==0.26.2 qpth==0.0.18; do \
		$(PEERS)/pip install --quiet --no-deps $$peer || true; done
	$(PEERS)/pip install --quiet --constraint constraints.txt jax==0.10.2 || true
	mkdir -p build && cd build && ../$(PEERS)/pip download --quiet --no-deps --no-binary learn2learn learn2learn==0.2.0 && \
		tar -xzf learn2learn-0.2.0.tar.gz && ../$(PEERS)/cython -3 learn2learn-0.2.0/learn2learn/data/*.pyx && \
		../$(PEERS)/pip install --quiet --no-deps --no-build-isolation ./learn2learn-0.2.0 || true
	@touch .venv-peers/ready

# With the Python that is given, as it is: torch with CUDA is there, and may be all that is.
gpu-report:
	@$(CHECK)
	$(PYTHON) -m metaplug.gpu_report $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-peers build site .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
