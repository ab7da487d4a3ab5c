# make install       environment to train, build shards and evaluate
# make install-dev   the same and what tests need
# make demo          demo data, shards, stages 1 -> 2 -> 3, evaluation, export, report (CPU, two ranks)
# make check         lint, types, and the quick tests that start no ranks, browser or server
# make test          all that continuous integration runs
# make soak          the long run of kills (SOAK_STEPS, SOAK_KILLS)
# make test-latest   make test in an environment of its own with the newest versions that setup.cfg allows
# make test-engines the test that vLLM gives our tokens, in an environment of its own (3 GB)
# make s3            an S3 server on this machine to try buckets with; its data are in MOLMO2_DATA/s3
# make lock          write requirements.lock anew from setup.cfg; UPGRADE=--upgrade takes the newest versions
# All work from a clean clone; what exists already is kept.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo demo-steps s3 install install-dev lock system lint types check test tests soak test-latest test-engines bench clean-demo

PYTHON ?= python3
VENV := .venv
LOCK := -c requirements.lock
DEV_PACKAGES := --no-deps -r requirements.lock
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
COMPILED := $(VENV)/.compiled
ENGINES := .venv-engines
PIP := pip install --quiet --progress-bar off $(LOCK)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MOLMO2_DATA ?= $(CURDIR)/data
export SYSTEM ?= 1
RANKS ?= 2
CPU := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
  TORCH_EXTENSIONS_DIR=$(CURDIR)/$(VENV)/torch_extensions
LAUNCH := $(CPU) deepspeed --num_accelerators $(RANKS)
RUN := $(MOLMO2_DATA)/runs
PYTEST := $(CPU) python tests/guard.py --minutes 60 -- python -m pytest

install: $(INSTALLED)

install-dev: $(DEV)

# torch and torchvision come as one pair from one index: a CPU torch beside a CUDA torchvision does not import. DeepSpeed
# imports torch while it is built, hence --no-build-isolation and what a build needs before all else.
$(INSTALLED): setup.cfg pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'pip>=24' 'setuptools>=77' wheel ninja
	$(PIP) torch torchvision
	rm -rf *.egg-info  # of an earlier installation: it would hide the entry points of this one
	$(PIP) --no-build-isolation -e '.[demo,eval,lora,s3,wandb]'
	touch $@

# The lock is complete. It overrides a pin of lmms-eval (pyproject.toml), which pip by itself would not.
$(DEV): $(INSTALLED)
	$(PIP) $(DEV_PACKAGES)
	touch $@

# DeepSpeed compiles its collectives for CPUs when a run first starts: a minute in which a test's ranks would wait.
$(COMPILED): $(INSTALLED)
	$(CPU) python -c 'from deepspeed.ops.op_builder import ShareMemCommBuilder as Op; Op().load(verbose=False)'
	touch $@

lock: $(DEV)
	uv pip compile setup.cfg --quiet --universal --python-version 3.11 --annotation-style line \
	  $(foreach extra,demo eval datatrove s3 dev fp8 lmms lora wandb,--extra $(extra)) \
	  --custom-compile-command 'make lock' --output-file requirements.lock $(UPGRADE)

# Debian packages for tests: a browser for pages, a Slurm of two nodes for batch scripts, sshd and pdsh for hostfiles.
system:
ifeq ($(SYSTEM),1)
	@missing=''; command -v chromium >/dev/null || missing='chromium'; \
	command -v slurmctld >/dev/null || missing="$$missing slurm-wlm munge"; \
	command -v sshd >/dev/null || missing="$$missing openssh-server"; \
	command -v pdsh >/dev/null || missing="$$missing pdsh"; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "make test installs Debian packages with apt-get: $$missing. To decline: make test SYSTEM=0"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; \
	else echo "not installed, and only root can with apt-get: $$missing; tests that need them are skipped"; fi
else
	@echo 'SYSTEM=0: no Debian package is installed; tests that need chromium, Slurm, sshd or pdsh are skipped'
endif

demo: $(COMPILED)
	@start=$$SECONDS; $(MAKE) --no-print-directory demo-steps; \
	python tools/demo_report.py --took $$((SECONDS - start))

demo-steps:
	python tools/make_demo_data.py
	$(CPU) python tools/build_shards.py --stage pretraining --catalog demo
	$(CPU) python tools/build_shards.py --stage sft --catalog demo
	$(CPU) python tools/build_shards.py --stage long --catalog demo
	$(CPU) python tools/build_shards.py --stage eval --catalog demo
	python tools/verify_shards.py $(MOLMO2_DATA)/shards
	python tools/preview_mixture.py recipes/demo/stage2.yaml
	$(LAUNCH) molmo2/train.py --recipe recipes/demo/stage1.yaml --all-stages
	$(CPU) python tools/evaluate.py --checkpoint $(RUN)/demo-stage3 --benchmarks demo
	$(CPU) python tools/export_model.py --checkpoint $(RUN)/demo-stage3 --out $(RUN)/demo-export

s3: $(DEV)
	python tests/shards/s3_server.py $(MOLMO2_DATA)/s3

lint: $(DEV)
	ruff check .
	ruff format --check .
	hadolint Dockerfile

types: $(DEV)
	mypy

check: lint types $(COMPILED)
	$(PYTEST) -n 2 -m 'not dist and not browser and not server and not slow'

# Types are checked while the tests begin, since mypy uses one core.
test: system lint $(COMPILED)
	@$(MAKE) --no-print-directory -j 2 types tests

tests:
	$(PYTEST) -n 2

soak: $(DEV) $(COMPILED)
	SOAK_STEPS=$${SOAK_STEPS:-1000} SOAK_KILLS=$${SOAK_KILLS:-12} $(PYTEST) tests/molmo2/training/test_soak.py

test-latest:
	$(MAKE) test VENV=.venv-latest LOCK= \
	  DEV_PACKAGES="--no-build-isolation --upgrade -e '.[demo,eval,lora,s3,wandb,datatrove,dev]'"

# vLLM for CPUs. It runs without torchvision, torchaudio and torchcodec, of which PyPI has no builds for a CPU. Nor has it
# the CPU build of torch: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL must name a place that does.
$(ENGINES)/.installed: requirements-engines.lock
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --progress-bar off --no-deps -r requirements-engines.lock
	touch $@

test-engines: $(DEV) $(ENGINES)/.installed
	VLLM_PYTHON=$(CURDIR)/$(ENGINES)/bin/python $(PYTEST) tests/molmo2/export/test_vllm.py

bench: $(DEV) $(COMPILED)
	python benchmarks/bench_plan.py
	$(CPU) python benchmarks/bench_model.py
	$(CPU) python benchmarks/bench_build.py

clean-demo:
	rm -rf $(MOLMO2_DATA)
