# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --quiet
SPEC   := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo study quality bench bench-gpu test test-cluster test-faults system-test-packages fuzz lint types docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: glann needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); use make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "error: could not make $(VENV); on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; }

# A stamp is written only after a complete installation, so an interrupted one is done again.
$(VENV)/.installed-run: $(BIN)/python $(SPEC)
	@echo "installing glann into $(VENV) (a few minutes, once)"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-run
	@echo "installing the test tools into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@echo "installing the linter and the type checker into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[test,dev]'
	@touch $@

demo: $(VENV)/.installed-run  ## train on 10,000 digits with two workers, from nothing to report.html
	@$(BIN)/glann train configs/digits.yaml

study: $(VENV)/.installed-run  ## 12 trials over both stages; the best is registered, promoted and served
	@$(BIN)/glann tune digits
	@$(BIN)/glann registry register studies/digits-study --as digits
	@$(BIN)/glann registry promote digits --why "the best of digits-study"
	@$(BIN)/python docs/serve_once.py models:/digits@champion --out studies/digits-study/served.png

quality: $(VENV)/.installed-run  ## samplers on one stage 1 of the digits, and the published recipe beside them
	@$(BIN)/glann compare quality

bench: $(VENV)/.installed-test  ## ratios to what one would otherwise use, in one table (15 minutes on two cores)
	@$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

bench-gpu: $(VENV)/.installed-run  ## the same of 1024 px on a GPU; BENCH_ARGS='--bundle FILE.tar.gz' packs it to be carried
	@$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

# Programs that some tests drive: root on Debian gets them; anybody else's tests are skipped and say why.
SYSTEM_TEST_PACKAGES := chromium chromium-driver

system-test-packages:
	@dpkg -s $(SYSTEM_TEST_PACKAGES) >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
	  || { echo "installing $(SYSTEM_TEST_PACKAGES)"; export DEBIAN_FRONTEND=noninteractive; apt-get -qq update \
	       && apt-get -qq install -y --no-install-recommends $(SYSTEM_TEST_PACKAGES) >/dev/null; } \
	  || echo "could not install $(SYSTEM_TEST_PACKAGES): the tests that drive them are skipped" >&2

test: $(VENV)/.installed-test system-test-packages  ## run the test suite, on at most four cores
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 $(PYTEST_ARGS)

test-cluster: $(VENV)/.installed-test  ## nodes in network namespaces, and every fault (root)
	@$(BIN)/python -m pytest tests/netns -m "netns or matrix" -s $(PYTEST_ARGS)

test-faults: SYSTEM_TEST_PACKAGES := postgresql
test-faults: $(VENV)/.installed-test system-test-packages  ## faults, drains, changes of size, jobs, secrets, MLflow on PostgreSQL
	@$(BIN)/python -m pytest tests/dist tests/e2e -m matrix -s $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-test  ## 10,000 tampered files, new ones every time, and every command with odd values and environments
	@GLANN_FUZZ_CASES=10000 $(BIN)/python -m pytest tests/fuzz --timeout 3600 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## check types
	@mkdir -p .mypy_cache/root && ln -sfn ../.. .mypy_cache/root/glann
	@$(BIN)/mypy

docs: $(VENV)/.installed-test  ## write the tables of keys in docs/ from the models, and the API reference into docs/site/
	@$(BIN)/python docs/generate.py
	@$(BIN)/python docs/reference.py

clean:  ## remove the environment and the caches (not runs/ and data/)
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
