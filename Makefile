# One verb per habit; each builds .venv when it is missing.
#   make demo     the whole job on synthetic radiographs, then one prediction
#   make check    two minutes, for every edit: sync, types, structure, words, fast tests
#   make test     everything: sync, types, every notebook, every test (the docs are built by one of them)
#   make docs     the docs site, _docs/html/index.html
#   make attack   the long attacks: random tables, pictures, bundles, run folders and requests by the thousand
#   make browser  report and docs opened in a real browser, at desktop and phone width
#   make bench    benchmarks: ratios to named libraries, appended to benchmarks/results/
#   make release  source archive, wheel and bill of materials in dist/: everything up to the upload
#   make small    the small installation, without torch, in an empty venv: size, seconds, first prediction
#   make clean    what the above left behind (make distclean: .venv too)
SHELL := /bin/bash
# Without .pyc files every import of fastai costs 13 s instead of 5.
unexport PYTHONDONTWRITEBYTECODE
# Two workers times two torch threads thrash on two cores: tests take one thread each.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do if $$p -c 'import sys, venv, ensurepip; sys.exit(not (3,10) <= sys.version_info[:2] <= (3,12))' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q
# The files with property tests: `make attack` tries five times as many examples there, and leaves the other tests to `make test`
PROPERTIES = $(shell grep -l max_examples tests/test_*.py)
FAST := tests/test_structure.py tests/test_words.py tests/test_table.py tests/test_evaluate.py tests/test_sources.py tests/test_cache.py tests/test_plots.py tests/test_docs.py

.PHONY: demo check test test-sync-types test-static test-sync test-types test-notebooks test-pytest docs attack browser readme bench release small clean distclean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/covid-cxr demo --out demo

check: test-static
	$(PYTEST) -n 2 --dist worksteal $(FAST)

# The static checks fill the time in which one of the two workers of the notebooks waits.
test: .venv/installed
	@$(MAKE) --no-print-directory -j 2 --output-sync=target test-sync-types test-notebooks
	@$(MAKE) --no-print-directory test-pytest

test-sync-types: .venv/installed
	@$(MAKE) --no-print-directory test-sync
	@$(MAKE) --no-print-directory test-types

test-static: .venv/installed
	@$(MAKE) --no-print-directory -j 2 --output-sync test-sync test-types

test-sync: .venv/installed
	$(BIN)/python tools/notebooks.py check

test-types: .venv/installed
	$(BIN)/mypy

test-notebooks: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TEST_ENV) timeout 2400 $(BIN)/nbdev_test --n_workers 2 --timing

test-pytest: .venv/installed
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder --durations=10 tests

docs: .venv/installed
	$(BIN)/python tools/docs.py

attack: .venv/installed
	HYPOTHESIS_PROFILE=attack $(PYTEST) -n 2 --dist worksteal -m hypothesis $(PROPERTIES)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/attack.py

browser: .venv/installed
	$(PYTEST) -m browser tests

readme: .venv/installed
	$(BIN)/python tools/notebooks.py readme

bench: .venv/installed
	$(BIN)/python benchmarks/input_pipeline.py
	$(BIN)/python benchmarks/near_duplicates.py
	$(BIN)/python benchmarks/near_duplicates.py --real
	$(BIN)/python benchmarks/nih_table.py
	$(BIN)/python benchmarks/audit_matrix.py --quick
	$(BIN)/python benchmarks/measure_facts.py
	$(BIN)/python benchmarks/check_articles.py
	$(BIN)/python benchmarks/lung_box.py
	$(BIN)/python benchmarks/lungs.py
	$(BIN)/python benchmarks/ood_check.py
	$(BIN)/python benchmarks/make_tables.py

release: .venv/installed
	$(BIN)/python tools/release.py $(if $(TAG),--tag $(TAG))

small: .venv/installed
	$(BIN)/python tools/light_install.py

.venv/installed: settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "covid_cxr needs Python 3.10, 3.11 or 3.12 (with venv); none was found on PATH."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev,docs]'
	touch $@

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .hypothesis nbs/models _proc _docs

distclean: clean
	rm -rf .venv
