# make demo, make test: everything from a fresh clone, set-up included. make help lists the rest.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

INSTALLED := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt scripts/nvcc_report.sh \
  $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: cuda-on-cpu peft-compat help venv install demo test fuzz soak check compile-check format bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24
	@echo
	@echo "  PYTHON=python3.12   the interpreter that .venv is made with"
	@echo "  HYDRA_BUILD=auto|cpu|cuda|none, HYDRA_CUDA_ARCHS='80;90a'   see setup.py"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "hydra-rlhf needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# Changes when the settings do, so that HYDRA_BUILD=cuda after another build is obeyed.
SETTINGS := $(VENV)/.settings
$(SETTINGS): $(BIN)/python FORCE
	@echo '$(HYDRA_BUILD) $(HYDRA_CUDA_ARCHS)' | cmp -s - $@ || \
	  echo '$(HYDRA_BUILD) $(HYDRA_CUDA_ARCHS)' > $@
FORCE:

# What builds the extension is installed first, so that a rebuild downloads nothing and is incremental.
# DeepSpeed compiles no op here: the tests need none.
$(INSTALLED): $(SETTINGS) $(BUILD_INPUTS)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools pybind11 cmake ninja
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
	  -e '.[dev,eval,plot,bench,deepspeed]'
	@touch $@

venv: $(BIN)/python  ## make .venv

install: $(INSTALLED)  ## install both packages into .venv, with the extension

demo: $(INSTALLED)  ## train and evaluate a small model: Hydra-SFT, Hydra-PPO, before and after
	$(BIN)/hydra-rlhf demo

# One thread a worker: kernels of two workers would otherwise fight for the same cores.
test: $(INSTALLED)  ## run all the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

peft-compat: $(INSTALLED)  ## run PEFT's own LoRA tests, stock and with our layers put in
	$(BIN)/python -m tests.peft_compat.run

cuda-on-cpu: $(INSTALLED)  ## every CUDA kernel in the emulator, then mistakes put into them (20 min)
	CUDA_ON_CPU=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/cuda_on_cpu
	$(BIN)/python -m tests.cuda_on_cpu.mutants

fuzz: $(INSTALLED)  ## 50,000 files of any content for the readers of data, settings, checkpoints
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.inputs --count 50000

soak: $(INSTALLED)  ## 500 PPO steps in one process, which must keep its size
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --steps 500

check: $(INSTALLED)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format --dry-run -Werror

compile-check: $(INSTALLED)  ## compile every CUDA and Triton kernel for GPUs that need not be here
	$(BIN)/python scripts/compile_check.py

format: $(INSTALLED)  ## put Python and C++ into the house's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format -i

bench: $(INSTALLED)  ## time every op on this machine
	$(BIN)/python -m benchmarks

clean:  ## remove what was built, .venv included
	rm -rf $(VENV) build dist *.egg-info hydra_kernels/_C.*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
