# `make help` says what there is. Nothing but python3 (3.10 or newer) and make is assumed, and a C++ compiler by the tests.

PYTHON ?= python3
PIP_ARGS ?=
NB ?=
PORT ?= 8000

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SITE := _build/html
export PIP_ARGS
export JUPYTER_PLATFORM_DIRS = 1

.DEFAULT_GOAL := help
.PHONY: help venv book test test-all check run execute refresh lab serve release clean

help: ## this list
	@echo "GPTlite: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done
	@echo
	@echo "Another Python: make book PYTHON=python3.12.  Options for pip: PIP_ARGS='...'."

venv: $(READY) ## make .venv from requirements.txt and install gptlite in it (the other targets do so themselves)

$(READY): requirements.txt pyproject.toml scripts/make_venv.py
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "make: there is no $(PYTHON) here; install Python 3.10 or newer, or name one with PYTHON=..."; exit 1; }
	@$(PYTHON) scripts/make_venv.py $(VENV)
	@touch $(READY)

book: $(READY) ## build the site, warnings as errors, and print the page to open
	@echo "Building the book"
	@$(PY) scripts/site/build_book.py $(SITE)

test: $(READY) ## unit tests, built site, browser, the chapters that changed (needs Chromium and a C++ compiler)
	@$(PY) scripts/run_tests.py

test-all: $(READY) ## the same, and every chapter executed
	@$(PY) scripts/run_tests.py --all

check: $(READY) ## unit tests and notebook checks alone, in under 2 minutes
	@$(PY) scripts/run_tests.py --check

run: $(READY) ## re-execute one notebook in place: make run NB=kv_cache
	@test -n "$(NB)" || { echo "make: name a notebook: make run NB=kv_cache"; exit 1; }
	$(PY) scripts/notebooks/run_notebooks.py $(NB)

execute: $(READY) ## re-execute every notebook in place
	$(PY) scripts/notebooks/run_notebooks.py

refresh: $(READY) ## store the listings of one notebook, or of all, anew, without executing anything: make refresh NB=kv_cache
	$(PY) scripts/notebooks/refresh_listings.py $(NB)

lab: $(READY) ## open the first chapter in JupyterLab
	JUPYTER_CONFIG_PATH=$(CURDIR)/scripts/lab $(PY) -m jupyterlab notebooks/baseline.ipynb

serve: book ## build the site and serve it on this machine, at PORT (8000)
	@$(PY) scripts/site/serve.py $(SITE) $(PORT)

release: $(READY) ## version, changelog, wheel, commit and tag: make release VERSION=0.2.0
	@$(PY) scripts/release.py $(VERSION)

clean: ## delete what the build made; .venv stays (rm -r .venv deletes it)
	rm -rf _build .pytest_cache .ruff_cache .hypothesis .import_linter_cache gptlite.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
