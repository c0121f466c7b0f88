# What people do with this project. Each verb prepares what it needs.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3,$(shell command -v $(name))))
BIN := .venv/bin

# Two processes on the same cores: OpenMP's waiting threads must not spin.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-ray coverage bench soak fuzz check protos release-protos docs dist

help:  ## Show this.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  PYTHON=... picks the interpreter; pip and npm follow their own configuration and environment.'

venv: .venv/.installed  ## Create .venv with everything installed.

demo: .venv/.installed  ## Watch a draft and a target service generate text together.
	$(BIN)/specpair demo

test: .venv/.installed  ## Run the tests, two files at a time; ARGS='-k health' narrows them, ARGS='-n 0' is one at a time.
	@if ! command -v npm > /dev/null; then echo 'npm is missing: tests with buf, and of examples/node, are skipped'; \
	elif ! $(MAKE) --silent node_modules/.installed examples/node/node_modules/.installed; \
	then echo 'npm failed: tests with buf, and of examples/node, are skipped'; fi
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

coverage: .venv/.installed  ## Run the tests and see what of client, gateway, sampling and serving they reach.
	$(MAKE) test ARGS='--cov --cov-report=term:skip-covered --cov-report=html $(ARGS)'

test-ray: .venv/.installed  ## Install Ray, and test both services under Ray Serve.
	@$(BIN)/python -c 'import ray.serve' 2> /dev/null || $(BIN)/python -m pip install -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/deploy/test_ray.py $(ARGS)

bench: .venv/.installed  ## Measure everything; ARGS='--only sessions' a part, ARGS=--help the parts.
	@$(BIN)/python -c 'import matplotlib' 2> /dev/null || $(BIN)/python -m pip install -c constraints.txt -e '.[bench]' \
	|| echo 'pip failed: there will be no plots'
	env -u OMP_WAIT_POLICY $(BIN)/python bench/complete.py $(ARGS)

soak: .venv/.installed  ## Kill services for an hour, then test many times over; ARGS='--seconds 600', ARGS=--help.
	$(BIN)/python -m tests.soak $(ARGS)

fuzz: .venv/.installed  ## Throw anything at the services: requests, bytes at their sockets, fields at their readers.
	SPECPAIR_TEST_EXAMPLES=$${SPECPAIR_TEST_EXAMPLES:-1000} SPECPAIR_FUZZ_SECONDS=$${SPECPAIR_FUZZ_SECONDS:-600} \
	$(BIN)/python -m pytest tests/fuzz $(ARGS)
	@if $(BIN)/python -c 'import atheris' 2> /dev/null || $(BIN)/python -m pip install -c constraints.txt -e '.[fuzz]'; \
	then $(BIN)/python -m tests.fuzz.readers -max_total_time=60; \
	else echo 'pip failed: fuzzing guided by coverage is skipped'; fi

check: .venv/.installed node_modules/.installed  ## Run linters and type checkers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples
	node_modules/.bin/buf lint protos
	node_modules/.bin/buf breaking protos --against protos/released.binpb
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

protos: .venv/.installed  ## Generate the gRPC stubs from protos/.
	$(BIN)/python tools/generate_stubs.py

release-protos: node_modules/.installed  ## With a release: what protos are compared with from now on.
	node_modules/.bin/buf build protos --exclude-source-info --output protos/released.binpb

docs: .venv/.installed  ## Build the documentation into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

# What is installed says whether it is complete only where nothing else is.
dist: .venv/.installed  ## Build wheel and source distribution, and try the client in a clean environment.
	rm -rf build/clean dist
	$(BIN)/python -m build
	'$(PYTHON)' -m venv build/clean
	build/clean/bin/python -m pip install -q dist/*.whl
	build/clean/bin/python -I -c 'import specpair; print(specpair.SpeculativeClient.__name__, specpair.__version__)'

# The stamps are written last, so that an installation that broke off is done again.
.venv/.installed: pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'error: no python3 found' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed")'
	'$(PYTHON)' -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[cli,target,draft,gateway,dev]'
	@touch $@

# Not `npm ci`, which refuses a lock that, like this one, names the packages of some platforms only.
node_modules/.installed: package.json package-lock.json
	npm install --no-save --no-audit --no-fund
	@touch $@

examples/node/node_modules/.installed: examples/node/package.json examples/node/package-lock.json
	npm install --no-save --no-audit --no-fund --prefix examples/node
	@touch $@
