# make demo   environment, demo data, shards, stages 1 -> 2 -> 3, evaluation, export, report (CPU, two ranks)
# make test   environment, lint, types, tests
# make lmms   an environment with lmms-eval beside the first one, and the tests of our plugin in it; part of make test
# All work from a clean clone; what exists already is kept.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo demo-steps install browser slurm lint types test lmms bench clean-demo

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
LMMS := .venv-lmms
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MOLMO2_DATA ?= $(CURDIR)/data
RANKS ?= 2
CPU := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
LAUNCH := $(CPU) deepspeed --num_accelerators $(RANKS)
RUN := $(MOLMO2_DATA)/runs

install: $(INSTALLED)

# torch and torchvision come as one pair from one index: a CPU torch beside a CUDA torchvision does not import.
$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	pip install --quiet --upgrade pip 'setuptools>=77' wheel ninja
	pip install --quiet --progress-bar off torch torchvision
	pip install --quiet --progress-bar off --no-build-isolation -e '.[dev,demo,eval,s3,wandb,lora,datatrove]'
	touch $@

# A browser for the tests of pages; where it cannot be installed they are skipped, and say so.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
	  || echo 'no chromium here: tests that need a browser are skipped'

# A Slurm of two nodes for the tests of the batch scripts; without it they are skipped, and say so.
slurm:
	@command -v slurmctld >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; } \
	  || echo 'no slurm-wlm here: tests that need it are skipped'

demo: $(INSTALLED)
	@start=$$SECONDS; $(MAKE) --no-print-directory demo-steps; echo "make demo took $$((SECONDS - start)) s"

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
	python tools/demo_report.py

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	hadolint Dockerfile

types: $(INSTALLED)
	mypy

test: $(INSTALLED) browser slurm lint types
	$(CPU) python -m pytest
	$(MAKE) lmms

# lmms-eval wants other versions of some packages, so it gets an environment of its own; what it does not want
# otherwise, torch above all, it finds in the first one.
$(LMMS)/.installed: $(INSTALLED)
	test -x $(LMMS)/bin/python || python -m venv $(LMMS)
	python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(LMMS)/bin/pip install --quiet --progress-bar off --no-build-isolation -e '.[lmms]'
	touch $@

lmms: $(LMMS)/.installed
	$(CPU) $(LMMS)/bin/python -m pytest tests/molmo2/test_lmms.py

bench: $(INSTALLED)
	python benchmarks/bench_plan.py
	$(CPU) python benchmarks/bench_model.py
	$(CPU) python benchmarks/bench_build.py

clean-demo:
	rm -rf $(MOLMO2_DATA)
