# Everything a person or CI does with this repository. `make demo` and `make test` set up all they need.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
S3 := $(VENV)/s3/bin/moto_server
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-12)

.PHONY: demo test check static bench clean chromium prometheus phoenix

demo: $(STAMP)                    ## the whole loop on real data
	$(BIN)/lepton demo $(ARGS)

test: $(STAMP)-dev chromium prometheus $(S3) ## every test
	$(BIN)/python -m pytest $(ARGS)

check: static                     ## format, lint, types, layers, unit tests
	$(BIN)/python -m pytest -q tests/unit

static: $(STAMP)-dev              ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

bench: $(STAMP)-bench             ## measure beside peers: make bench NAME=stream ARGS=--quick
	$(BIN)/python -m benchmarks.$(or $(NAME),stream) $(ARGS)

clean:                            ## forget the environment and what the demo wrote
	rm -rf $(VENV) lepton-demo

chromium:                         # the report's test opens it in a real browser
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium) \
	  || echo "install chromium: a test opens the demo's report in it" >&2

phoenix: $(VENV)/bin/python       ## a receiver of traces with a user interface: 850 MB, a test sends it the demo
	$(PYTHON) -m venv $(VENV)/phoenix
	$(VENV)/phoenix/bin/pip install -q arize-phoenix

prometheus:                       # tests load the alert rules into a real one
	@command -v prometheus >/dev/null || (apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends prometheus) \
	  || echo "install prometheus: tests load the alert rules into it" >&2

$(S3): $(VENV)/bin/python         # an S3 server of its own environment, for tests/cluster/test_s3.py
	$(PYTHON) -m venv $(VENV)/s3
	$(VENV)/s3/bin/pip install -q 'moto[server]==5.2.5'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(STAMP)-bench: $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	@touch $@ $(STAMP)

$(STAMP)-dev: $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(STAMP)
