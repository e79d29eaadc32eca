# Every target is a few plain commands; without make, run them by hand (make -n TARGET prints them).
#
# A CPU-only machine can save gigabytes by taking torch from PyTorch's own CPU index:
#   make quickstart PIP_TORCH_ARGS="--index-url <the CPU index named on pytorch.org>"

PYTHON ?= python3
VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
PIP_TORCH_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
ELSEWHERE = not gpu and not ray and not sglang and not slow and not slurm

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
export OMP_NUM_THREADS = 1

.PHONY: help install quickstart test lint format test-browser test-gpu test-ray test-sglang test-slow test-slurm chaos docs base bench wheel clean

help:
	@echo "make quickstart   install into $(VENV) and train the small model on this CPU"
	@echo "make test         unit and integration tests"
	@echo "make lint         ruff, mypy, import-linter"
	@echo "make test-slow    what takes a process minutes: signals, ranks, memory, whole examples"
	@echo "make test-browser the report's page in Chromium, which \`make test\` does, too, where there is one"
	@echo "make chaos        something breaks every few seconds of a run: MINUTES=60 EVERY_S=30 SEED=1"
	@echo "make test-sglang | test-slurm | test-ray | test-gpu   tests that need the real thing"
	@echo "make docs         the pages and the API as a site of static files: build/site/index.html"
	@echo "make base         make the quickstart's model and data again, from nothing"
	@echo "make bench        this package against TRL;  make wheel: build the package"

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/lightning-grpo fit --config quickstart.yaml

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "$(ELSEWHERE)" $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and $(subst and not slow ,,$(ELSEWHERE))" $(PYTEST_ARGS)

# Also part of `make test`, where a browser is on the path.
test-browser: $(VENV)/.test
	$(BIN)/python -m pytest -m browser tests/integration/report $(PYTEST_ARGS)

test-slurm test-ray: $(VENV)/.test
	$(BIN)/python -m pytest -m $(subst test-,,$@) $(PYTEST_ARGS)

# Ten minutes in each of two modes by default, and one undisturbed run; seeds are printed.
chaos: $(VENV)/.test
	CHAOS_MINUTES=$(or $(MINUTES),10) $(if $(EVERY_S),CHAOS_EVERY_S=$(EVERY_S)) $(if $(SEED),CHAOS_SEED=$(SEED)) \
	  $(BIN)/python -m pytest -m slow -k breaks tests/integration/test_loop_killed.py $(PYTEST_ARGS)

# The real SGLang on this CPU, in an environment of its own (3.3 GB, minutes the first time).
test-sglang: $(VENV)/.test
	$(BIN)/python -m tests.sglang.environment $(SGLANG_VENV)
	SGLANG_TEST_ENVIRONMENT=$(SGLANG_VENV) $(BIN)/python -m pytest -m sglang $(PYTEST_ARGS)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu tests $(PYTEST_ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

base: $(VENV)/.installed
	$(BIN)/python examples/quickstart/make_base.py --out examples/quickstart

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/vs_trl.py --out benchmarks/results/vs_trl.json

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist

# Stamps: a second run installs nothing unless what is to be installed changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(PIP_TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.docs $(VENV)/.bench: $(VENV)/.%: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[$*]"
	@touch $@
