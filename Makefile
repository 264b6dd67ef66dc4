# One verb per habit; each builds .venv when it is missing.
#   make demo    the whole job on synthetic radiographs, then one prediction
#   make test    notebooks and modules in step, every notebook, pytest, README fresh
#   make bench   benchmarks: ratios to named rivals, appended to benchmarks/results/
#   make clean   what the above left behind (make distclean: .venv too)
SHELL := /bin/bash
# Without .pyc files every import of fastai costs 13 s instead of 5.
unexport PYTHONDONTWRITEBYTECODE
# Two workers times two torch threads thrash on two cores: tests take one thread each.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do if $$p -c 'import sys, venv, ensurepip; sys.exit(not (3,10) <= sys.version_info[:2] <= (3,12))' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin

.PHONY: demo test test-sync test-notebooks test-pytest readme bench clean distclean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/covid-cxr demo --out demo

test: test-sync test-notebooks test-pytest

test-sync: .venv/installed
	$(BIN)/python tools/notebooks.py check

test-notebooks: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TEST_ENV) timeout 1200 $(BIN)/nbdev_test --n_workers 2 --timing

test-pytest: .venv/installed
	$(TEST_ENV) $(BIN)/python -m pytest -q --durations=10 tests

readme: .venv/installed
	$(BIN)/python tools/notebooks.py readme

bench: .venv/installed
	$(BIN)/python benchmarks/input_pipeline.py --data ../shared/data
	$(BIN)/python benchmarks/near_duplicates.py
	$(BIN)/python benchmarks/near_duplicates.py --data ../shared/data
	$(BIN)/python benchmarks/nih_table.py --data ../shared/data
	$(BIN)/python benchmarks/audit_matrix.py --quick
	$(BIN)/python benchmarks/measure_facts.py --data ../shared/data
	$(BIN)/python benchmarks/check_articles.py --articles ../shared/articles
	$(BIN)/python benchmarks/lung_box.py --data ../shared/data
	$(BIN)/python benchmarks/input_gate.py --data ../shared/data

.venv/installed: settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "covid_cxr needs Python 3.10, 3.11 or 3.12 (with venv); none was found on PATH."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf demo build *.egg-info .pytest_cache .hypothesis nbs/models _proc _docs

distclean: clean
	rm -rf .venv
