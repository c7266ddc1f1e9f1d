# Targets for people and for continuous integration. `make` alone lists them.
#
#   PYTHON  the interpreter that .venv is made with             make venv PYTHON=python3.12
#   JOBS    how many processes run the tests                    make test JOBS=8
#   CASES   how many damaged files `make fuzz` reads            make fuzz CASES=5000
#   OUT     the folder that `make gpu-check` writes into        make gpu-check OUT=/data/results
#   PEERS   a folder with other implementations, docs/gpu.md    make gpu-check PEERS=/data/peers
PYTHON ?= python3
OUT ?= benchmarks/results
JOBS ?= 2
CASES ?= 100000

VENV_PYTHON := .venv/bin/python
# Written last, so an installation that was interrupted is done again.
READY := .venv/.ready
# A GPU machine may have neither .venv nor a package index: there, take the python that has torch.
ANY_PYTHON = $$(if test -f $(READY); then echo $(VENV_PYTHON); else echo $(PYTHON); fi)

.PHONY: help venv test test-faults fuzz demo demo-sft demo-lora demo-vision demo-alternating
.PHONY: lint bench gpu-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

venv: $(READY) ## make .venv with what the tests and the demo need

test: $(READY) ## run the tests
	$(VENV_PYTHON) -m pytest -n $(JOBS)

test-faults: $(READY) ## kill, fill, cut and restart runs, and print what they lost
	$(VENV_PYTHON) -m tests.faults

fuzz: $(READY) ## read 100,000 damaged files of every kind; CASES=n for another number
	$(VENV_PYTHON) -W ignore -m tests.fuzz --cases $(CASES)

demo: $(READY) ## train a small RWKV-7 on the bundled text, on the CPU, in minutes
	@$(VENV_PYTHON) -m rwkvtune demo

demo-sft: $(READY) ## pretrain a tiny model, fine-tune it on instructions, check its answers; minutes
	@$(VENV_PYTHON) -m rwkvtune demo sft

demo-vision: $(READY) ## train a small model to see drawn pictures and digits, on the CPU, in minutes
	@$(VENV_PYTHON) -m rwkvtune vision demo

demo-alternating: $(READY) ## train plain and alternating attention on one visual task, compare them; minutes
	@$(VENV_PYTHON) -m rwkvtune demo alternating

demo-lora: $(READY) ## fine-tune a tiny model by LoRA, on an nf4 base, by its state and in full; minutes
	@$(VENV_PYTHON) -m rwkvtune demo lora

lint: $(READY) ## ruff (rules and formatting) and mypy
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

bench: $(READY) ## measure on this CPU: steps, recurrence, whole runs, generation, data, vision, adapters
	$(VENV_PYTHON) -m benchmarks.train_step
	$(VENV_PYTHON) -m benchmarks.wkv
	$(VENV_PYTHON) -m benchmarks.run
	$(VENV_PYTHON) -m benchmarks.generate
	$(VENV_PYTHON) -m benchmarks.data
	$(VENV_PYTHON) -m benchmarks.vision
	$(VENV_PYTHON) -m benchmarks.adapters
	$(VENV_PYTHON) -m benchmarks.alternating

gpu-check: ## GPU tests and benchmarks in one go, JSON into OUT=dir; without a GPU says so
	@$(ANY_PYTHON) -m benchmarks.gpu_check --out "$(OUT)" $(if $(PEERS),--peers "$(PEERS)")

clean: ## remove .venv, builds and caches; runs and results stay
	rm -rf .venv build dist rwkvtune.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first, with plain pip: whatever build the index has for this machine is the right one.
$(READY): pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'pass' 2>/dev/null || { \
	  echo "error: no '$(PYTHON)' here; install Python 3.10-3.13 or name one: make venv PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1), rwkvtune needs Python 3.10-3.13; name another: make venv PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or name another: make venv PYTHON=python3.12" >&2; exit 2; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -c constraints-dev.txt torch
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -c constraints-dev.txt -e ".[dev]"
	@touch $@
