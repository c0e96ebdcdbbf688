# On a fresh machine two commands suffice: `make demo` and `make test`. `make help` lists all.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/.installed

.PHONY: help demo test test-slow lint audit chaos bench clean
.NOTPARALLEL:

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(READY)  ## the whole chain on drawn faces; reports and MLflow runs are in runs/demo
	$(RUN) launch.py

test: $(READY)  ## all tests that need neither a GPU nor much time
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: $(READY)  ## the slow tests
	$(RUN) -m pytest -m "slow"

lint: $(READY)  ## ruff, formatter, mypy, pip check
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pip check

audit: $(READY)  ## known vulnerabilities of the pinned packages; needs pypi.org, so `make lint` leaves it out
	$(RUN) -m pip install -q --disable-pip-version-check pip-audit
	$(RUN) -m pip_audit --strict --no-deps --disable-pip -r constraints.txt

chaos: $(READY)  ## 200 seeded faults: docs/operations/reliability.md
	$(RUN) tools/dev/chaos.py --trials 200 --json runs/chaos.json

bench: $(READY)  ## speed of loader, stages and evaluation; docs/performance.md keeps the figures
	$(RUN) tools/dev/bench.py --json runs/bench.json --markdown runs/bench.md

clean:  ## remove the environment; runs/ stays
	rm -rf $(VENV)
