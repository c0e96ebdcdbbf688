# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/.installed

.PHONY: demo test test-slow lint audit chaos bench clean
.NOTPARALLEL:

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

demo: $(READY)  ## the whole chain on toy faces: report and MLflow runs under runs/demo
	$(RUN) launch.py

test: $(READY)  ## everything that needs neither a GPU nor much time
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	$(RUN) -m pytest -m "slow"

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pip check

audit: $(READY)  ## known vulnerabilities of the pinned packages; asks pypi.org, so it is no part of `make lint`
	$(RUN) -m pip install -q --disable-pip-version-check pip-audit
	$(RUN) -m pip_audit --strict --no-deps --disable-pip -r constraints.txt

chaos: $(READY)  ## 200 seeded faults: docs/reliability.md
	$(RUN) tools/dev/chaos.py --trials 200 --json runs/chaos.json

bench: $(READY)  ## speed of loader and train stage: docs/bench.md
	$(RUN) tools/dev/bench.py --json runs/bench.json --markdown docs/bench.md

clean:  ## the environment only; runs/ stays
	rm -rf $(VENV)
