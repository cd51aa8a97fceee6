# The commands of the book. Each sets up what it needs in .venv, once.

.DEFAULT_GOAL := help
# Two targets at a time would install into one environment.
.NOTPARALLEL:
.PHONY: help book test lint types unit nbval site notebooks lab mutants bench reproduce clean distclean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The environment is made anew when these files change, not when their dates do.
PINS := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
BOOK := $(VENV)/.book-$(PINS)
TEST := $(VENV)/.test-$(PINS)
RUNS := $(VENV)/.reproduce-$(PINS)
# What was installed for other pins is no longer there: their stamps go, or a switch back would trust them.
FORGET = find $(VENV) -maxdepth 1 \( -name '.book-*' -o -name '.test-*' -o -name '.reproduce-*' \) ! -name '*-$(PINS)' -delete
# Its only other requirement is a server of plots, which it does without and which often does not build.
ADV_LIB = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps adv-lib

help:
	@echo "make book       set up, execute every chapter, build the site"
	@echo "make test       set up, run all checks"
	@echo "make lab        open the book in JupyterLab"
	@echo "make notebooks  execute every chapter and store its outputs (ONLY=name for one)"
	@echo "make mutants    break the code on purpose: do the chapters' claims notice?"
	@echo "make bench      measure speed, and show the stored strength against cost (STORE=1 to run it)"
	@echo "make reproduce  compute the papers' tables and figures (TABLE=convex-3 for one, DRY=1 to look)"
	@echo "make clean      remove what was built (make distclean: the environment too)"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || \
	    { rm -f $@; echo "On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(BOOK): | $(VENV)/bin/python
	@echo "Installing the book's packages into $(VENV) (some GB with PyTorch; once) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book]'
	@$(FORGET)
	@touch $@

$(TEST): | $(VENV)/bin/python
	@echo "Installing the book's and the tests' packages into $(VENV) (some GB with PyTorch; once) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,test]'
	$(ADV_LIB)
	@$(FORGET)
	@touch $@ $(BOOK)

$(RUNS): | $(VENV)/bin/python
	@echo "Installing the workflow's packages into $(VENV) (some GB with PyTorch; once) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[reproduce]'
	$(ADV_LIB)
	@$(FORGET)
	@touch $@

book: $(BOOK)
	$(BIN)/python tools/book.py build

notebooks: $(BOOK)
	$(BIN)/python tools/book.py notebooks $(ONLY)

lab: $(BOOK)
	$(BIN)/jupyter lab --notebook-dir=book

test: lint types unit nbval site

lint: $(TEST)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(TEST)
	$(BIN)/mypy

unit: $(TEST)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --cov --cov-report=term --cov-fail-under=95 --ignore=tests/book/test_site.py

# Every notebook is executed once more and compared with its stored outputs. Two at a time with one
# thread each: more threads than cores would get in each other's way.
nbval: $(TEST)
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 PYTHONHASHSEED=0 $(BIN)/pytest -q -n 2 --dist loadscope --nbval \
	    --nbval-current-env --nbval-cell-timeout=600 -p no:cacheprovider -W default \
	    --nbval-sanitize-with tests/book/nbval.cfg book

# The site is built from the stored outputs and opened, page by page, in headless Chromium.
site: $(TEST)
	$(BIN)/pytest -q tests/book/test_site.py

mutants: $(TEST)
	$(BIN)/python tools/mutants.py $(ONLY)

bench: $(TEST)
	$(BIN)/python -m benchmarks $(if $(filter-out 0,$(STORE)),--store)

# What the variables mean: reproduce/README.md.
reproduce: $(RUNS)
	$(BIN)/python -m reproduce $(TABLE) $(FIGURE) $(if $(filter-out 0,$(DRY)),--dry) $(if $(ONLY),--only='$(ONLY)') \
	    $(if $(SKIP),--skip='$(SKIP)') $(if $(PROFILE),--profile='$(PROFILE)') $(if $(CORES),--cores=$(CORES)) \
	    $(if $(RESULTS),--results='$(RESULTS)' --work='$(RESULTS)/work')

clean:
	rm -rf _build book/ledger.md .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

distclean: clean
	rm -rf $(VENV)
