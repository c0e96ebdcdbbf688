# On a fresh machine two commands suffice: `make demo` and `make test`. `make help` lists all.
PYTHON ?= python3
VENV ?= .venv
PEERS = .venv-peers
RUN = $(VENV)/bin/python
READY = $(VENV)/.installed
TESTS_READY = $(VENV)/.installed-for-tests
# Python compiles what it imports at the first use, if it may keep the result. Where it may not (many images set
# this variable) each start takes 13 s longer. To compile all of it here would take as long as the rest.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = -m pip install -q --disable-pip-version-check --no-compile
PEERS_READY = $(PEERS)/.installed
PEER_LIST = tools/dev/benchmarks/peers/requirements.txt

.PHONY: help demo test test-slow lint audit chaos bench bench-peers performance clean
.NOTPARALLEL:

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(INSTALL) -c constraints.txt -e .
	touch $@

$(TESTS_READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(INSTALL) -c constraints.txt -e '.[test,lint]'
	touch $(READY) $@

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(READY)  ## the whole chain on drawn faces; reports and MLflow runs are in runs/demo
	$(RUN) launch.py

test: $(TESTS_READY)  ## all tests that need neither a GPU nor much time
	$(RUN) -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 20 --durations-min 5

test-slow: $(TESTS_READY)  ## the slow tests
	$(RUN) -m pytest -m "slow"

lint: $(TESTS_READY)  ## ruff, formatter, mypy, pip check
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pip check

audit: $(READY)  ## known vulnerabilities of the pinned packages; needs pypi.org, so `make lint` leaves it out
	$(RUN) -m pip install -q --disable-pip-version-check pip-audit
	$(RUN) -m pip_audit --strict --no-deps --disable-pip -r constraints.txt

chaos: $(TESTS_READY)  ## 200 seeded faults: docs/operations/reliability.md
	$(RUN) tools/dev/chaos.py --trials 200 --json runs/chaos.json

bench: $(TESTS_READY)  ## speed of loader, stages and evaluation, into runs/bench.md
	$(RUN) tools/dev/bench.py --json runs/bench.json --markdown runs/bench.md

$(PEERS_READY): $(PEER_LIST)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) -r $(PEER_LIST)
	touch $@

bench-peers: $(PEERS_READY)  ## the same work done by other libraries, into runs/peers.md
	$(PEERS)/bin/python tools/dev/bench.py --peers --json runs/peers.json --markdown runs/peers.md

performance: $(TESTS_READY) $(PEERS_READY)  ## both, briefly, into docs/performance.md; about 12 minutes on two cores
	$(RUN) tools/dev/bench.py --seconds 0.3 --repeats 3 --json runs/bench.json --page docs/performance.md
	$(PEERS)/bin/python tools/dev/bench.py --peers --seconds 1 --json runs/peers.json --page docs/performance.md

clean:  ## remove the environments; runs/ stays
	rm -rf $(VENV) $(PEERS)
