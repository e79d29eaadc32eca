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
# A file's tests stay together, and share what a fixture of the file has started.
IN_PROCESSES = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
ELSEWHERE = not gpu and not ray and not sglang and not slow and not slurm

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
export OMP_NUM_THREADS = 1
# Tests start some hundreds of processes, each of which would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart test lint format test-browser test-gpu test-python test-ray test-sglang test-slow test-slurm certify-all chaos docs base bench wheel clean

help:
	@echo "make quickstart   install into $(VENV) and train the small model on this CPU"
	@echo "make test         unit and integration tests"
	@echo "make lint         ruff, mypy, import-linter"
	@echo "make test-slow    what takes a process minutes: signals, ranks, memory, whole examples"
	@echo "make test-python  what needs no torch, on another Python: PYTHON=python3.13 VENV=build/python3.13"
	@echo "make test-browser the report's page in Chromium, which \`make test\` does, too, where there is one"
	@echo "make chaos        something breaks every few seconds of a run: MINUTES=60 EVERY_S=30 SEED=1"
	@echo "make test-sglang | test-slurm | test-ray | test-gpu   tests that need the real thing"
	@echo "make docs         the pages and the API as a site of static files: build/site/index.html"
	@echo "make base         make the quickstart's model and data again, from nothing"
	@echo "make certify-all every causal architecture of transformers, tiny: docs/models.md"
	@echo "make bench        this package against TRL;  make wheel: build the package"

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	@echo "training 40 steps on this CPU: about a minute on two cores"
	$(BIN)/lightning-grpo fit --config quickstart.yaml

test: $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PROCESSES) -m "$(ELSEWHERE)" $(PYTEST_ARGS)

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

# On another Python what runs without torch, whose gigabytes it does not fetch: the event loop,
# processes and everything around them, where versions of Python differ most.
#   make test-python PYTHON=python3.13 VENV=build/python3.13
NEEDED = aiohttp anyio cloudpickle jinja2 loky msgspec numpy packaging pebble psutil pyarrow pyyaml \
  rich typing-extensions hypothesis pytest pytest-timeout pytest-xdist
WITHOUT_TORCH = rewards serving test_errors.py report/test_run.py \
  $(addsuffix .py,$(addprefix rollout/test_,gate ledger producer scoring workflow) \
  $(addprefix servers/test_,base other_nodes supervisor))
test-python:
	$(PYTHON) -m venv --clear $(VENV)
	@echo "pip fetches what runs without torch into $(VENV): a minute, for some 0.1 GB"
	$(PIP) install -q -c constraints.txt $(NEEDED)
	$(PIP) install -q --no-deps -e .
	$(BIN)/python -m pytest $(IN_PROCESSES) -m "$(ELSEWHERE)" $(PYTEST_ARGS) \
	  $(addprefix tests/unit/,$(WITHOUT_TORCH))

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

# Imports what runs without torch, and reads the rest; ruff formats the signatures.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

base: $(VENV)/.installed
	$(BIN)/python examples/quickstart/make_base.py --out examples/quickstart

certify-all: $(VENV)/.test
	$(BIN)/lightning-grpo certify --all --out docs/models.md

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/vs_trl.py --out benchmarks/results/vs_trl.json

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist

# Stamps: a second run installs nothing unless what is to be installed changed.
$(VENV)/.torch: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "1 of 2: pip fetches torch into $(VENV) and is silent meanwhile: minutes, for some 3 GB with CUDA, 0.2 GB without"
	$(PIP) install -q $(PIP_TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch
	@echo "2 of 2: pip fetches this package and the others that it needs: a minute or two, for some 0.3 GB"
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

# One call of pip, for each takes ten seconds to find out what there is; `dev` has all of `test`.
$(VENV)/.test $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch
	@echo "2 of 2: pip fetches this package and what \`make $*\` needs: minutes, for some 0.4 GB"
	$(PIP) install -q -c constraints.txt -e ".[$*]"
	@touch $@ $(VENV)/.installed $(if $(filter dev,$*),$(VENV)/.test)

$(VENV)/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "pip fetches what \`make docs\` needs into $(VENV): a minute, for some 0.1 GB"
	$(PIP) install -q -c constraints.txt $(NEEDED) mkdocs-material "mkdocstrings[python]" ruff
	$(PIP) install -q --no-deps -e .
	@touch $@
