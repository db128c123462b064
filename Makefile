# Everything runs in .venv, which the first target makes; `make` alone says what there is.
#   PYTHON=python3.12 make demo     the interpreter that .venv is made with (3.10 or newer)
#   TORCH=torch make test           another torch than the pinned one, a CUDA build say

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-nightly gpu-check gpu-cache bench bench-report audit paper lint format clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.train ## train by DPO, IS-DPO and GR-DPO on three seeds, compare, draw: runs/demo/
	$(PY) -m experiments.demo

test: $(VENV)/.dev ## the core tests, at most 8 minutes on two cores
	$(PY) -m pytest -n $(JOBS) --dist worksteal -q

test-slow: $(VENV)/.dev ## real data, drawn cases, wheels, every GPU architecture
	$(PY) -m pytest -n $(JOBS) --dist worksteal -q -m "slow or realdata" --durations 10

test-nightly: $(VENV)/.dev ## the long ones with more cases: 50,000 drawn ones, 100 kills; some hours
	GRPO_KERNELS_NIGHTLY=1 $(PY) -m pytest -q -m slow --durations 10

OUT ?= runs/gpu-check
# Uses the Python that is there, with its torch, and no network: a machine with a GPU is rarely one's own.
gpu-check: ## on a machine with an NVIDIA GPU: proof, times, tests in 7 minutes; OUT=DIR [ONLY=STEPS CACHE=FILE COMMIT=SHA]
	$(PYTHON) tools/gpu_check.py --out $(OUT) $(if $(ONLY),--only $(ONLY)) $(if $(CACHE),--cache $(CACHE)) \
	  $(if $(COMMIT),--commit $(COMMIT))

# The keys of Triton's cache have its release in them, and its build for one Python: those of the machine with the GPU.
#   make gpu-cache TRITON=3.6.0 FOR_PYTHON=3.12
THERE = build/triton-$(TRITON)
gpu-cache: OUT = runs/gpu-cache.tar.xz
gpu-cache: $(VENV)/.dev ## compile the Triton kernels for a GPU elsewhere: OUT=FILE [TRITON=3.6.0 FOR_PYTHON=3.12 ARCH=90]
ifdef TRITON
	test -d $(THERE)/triton || $(PIP) install --no-deps --target $(THERE) triton==$(TRITON)
endif
ifdef FOR_PYTHON
	test -d $(THERE)/for-$(FOR_PYTHON) || $(PIP) download --no-deps --only-binary=:all: \
	  --python-version $(FOR_PYTHON) -d $(THERE)/for-$(FOR_PYTHON) triton==$(TRITON)
endif
	$(if $(TRITON),PYTHONPATH=$(CURDIR)/$(THERE)) $(PY) tools/gpu_cache.py --out $(OUT) --architecture $(or $(ARCH),90) \
	  $(if $(FOR_PYTHON),--there $(THERE)/for-$(FOR_PYTHON)/*.whl)

bench: $(VENV)/.bench ## times and memory on this CPU beside PyTorch and the peers: under 10 minutes on 4 quiet cores
	$(PY) -m benchmarks logps head tail step overhead --device cpu --seconds 560

bench-report: $(VENV)/.bench ## benchmarks/report.md, its figures and the README's table, from benchmarks/results/
	$(PY) -m benchmarks report

# In an environment of its own: what it needs is nothing that is pinned here.  Strict, or no answer would count as none.
audit: ## known vulnerabilities of the pinned packages; needs a network
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(VENV)-audit/bin/pip-audit --disable-pip --no-deps -s osv --strict -r constraints.txt

paper: $(VENV)/.train ## the paper's bandit study: docs/paper.md and docs/figures/
	$(PY) -m experiments.bandits

lint: $(VENV)/.dev ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.dev ## put every file into ruff's form
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## forget the environment and everything built
	rm -rf $(VENV) $(VENV)-audit build dist *.egg-info grpo_kernels/*.so

-include csrc/csrc.mk

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "grpo_kernels needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try PYTHON=python3.12 make ..."; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "installing $(TORCH) (some minutes where it is not in pip's cache)"
	$(PIP) install -c constraints.txt "$(TORCH)"
	@touch $@

# torch first and by itself: whatever comes later finds it there and asks for no other build.
$(VENV)/.train: $(VENV)/.torch $(SOURCES)
	@echo "installing grpo_kernels, with the trainer"
	$(PIP) install -c constraints.txt -e ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	@echo "installing grpo_kernels, with everything the tests need"
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	@echo "installing grpo_kernels, with the trainer and what it is compared with"
	$(PIP) install -c constraints.txt -e ".[bench]"
	@touch $@
