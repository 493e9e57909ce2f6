# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
RUN    := $(BIN)/python
GPU    := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
NVCC   := $(shell command -v nvcc)
NATIVE := $(wildcard csrc/*/*)
CPP    := $(filter %.h %.cpp %.inl %.cuh %.cu,$(NATIVE) $(wildcard tests/cuda_host/* tests/cuda_host/*/*))

# In a checkout a kernel that does not compile is an error, not something to leave out.
export WEIGHTSHARE_BUILD ?= $(if $(and $(GPU),$(NVCC)),cuda,cpu)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint lint-ruff lint-format lint-mypy lint-clang \
  lint-bans asan bench gpu gpu-report docs wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# ---- set-up: torch, then the package, then its native code; each redone when its inputs change

# The CPU build of torch is asked for by its local version, so that a machine without a GPU does
# not download gigabytes of CUDA. Where no configured index has it, the plain release serves.
$(VENV)/.torch: constraints/torch-cpu.txt constraints/torch-cuda.txt constraints/tools.txt
	@$(PYTHON) -c 'import sys; sys.exit("%s is Python %d.%d; 3.10 or later is needed: make PYTHON=..." \
	  % (sys.executable, *sys.version_info[:2]) if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch"
	@$(PIP) install -q -c constraints/tools.txt pip setuptools ninja
	@$(if $(GPU),,$(PIP) install -q -c constraints/tools.txt -r constraints/torch-cpu.txt || { \
	  echo "No CPU build of torch for this Python on the configured package indexes (add one with"; \
	  echo "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS); installing the plain release instead."; false; } ||) \
	  $(PIP) install -q -c constraints/tools.txt -r constraints/torch-cuda.txt
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py
	@echo "installing the package and its tools"
	@WEIGHTSHARE_BUILD=none $(PIP) install -qq --no-build-isolation -c constraints/tools.txt \
	  -e '.[test,bench,demo,search,transformers,peft]'
	@touch $@

$(VENV)/.native: $(VENV)/.package $(NATIVE)
	@echo "compiling native code"
	@mkdir -p build
	@$(RUN) setup.py -q build_ext --inplace > build/native.log 2>&1 || { cat build/native.log; false; }
	@touch $@

$(VENV)/.tools: $(VENV)/.package
	@WEIGHTSHARE_BUILD=none $(PIP) install -qq --no-build-isolation -c constraints/tools.txt \
	  -e '.[lint,docs]'
	@touch $@

# In a folder of their own, see there. Without them the tests that need one are skipped, and say so.
$(VENV)/.peers: $(VENV)/.package constraints/peers.txt constraints/tools.txt
	@echo "installing the libraries that tests compare with"
	@$(PIP) install -qq --no-deps --upgrade --target $(VENV)/peers -r constraints/peers.txt && \
	  touch $@ || echo "Not all of constraints/peers.txt can be had from the configured package" \
	  "indexes; the tests that compare with other libraries will be skipped."

install: $(VENV)/.native ## create .venv: torch, the package (editable), its native code
	@$(RUN) -m weightshare_kernels.info --brief

# ---- what a visitor runs

demo: install ## train one network that serves many sizes, on real data (2 minutes)
	$(RUN) -m weightshare demo

PYTEST := $(BIN)/pytest

test: install $(VENV)/.peers ## the whole suite, then the op tests on the other backends
	@failed=; \
	run() { echo "== pytest $$*"; $(PYTEST) "$$@" || failed="$$failed\n  pytest $$*"; }; \
	run; \
	run tests/test_ops.py --backend triton -n 2; \
	run tests/test_ops.py --backend reference; \
	run tests/test_ops.py --backend cuda-host -n 2 -k "entangle- or route- or shard_lora-"; \
	if [ -n "$$failed" ]; then printf "failed:$$failed\n"; exit 1; fi

test-slow: install ## the tests marked slow
	$(PYTEST) -m slow

bench: install ## measure against the baselines, then redraw the table and the plot
	$(RUN) benchmarks/run.py
	$(PYTEST) benchmarks/test_micro.py
	$(RUN) benchmarks/plot.py

gpu: ## on a machine with a GPU: build, test and measure with the python3 found there (OPS="...")
	python3 benchmarks/gpu.py $(OPS)

gpu-report: install ## the static table of every GPU kernel, made without a GPU
	$(RUN) benchmarks/gpu_report.py

# ---- what a developer runs

lint: lint-ruff lint-format lint-mypy lint-clang lint-bans ## style, types and bans

lint-ruff: $(VENV)/.tools
	$(BIN)/ruff check

lint-format: $(VENV)/.tools
	$(BIN)/ruff format --check

lint-mypy: $(VENV)/.tools
	$(BIN)/mypy

lint-clang: $(VENV)/.tools
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

# Kernels know no framework; a size declared `int` would recompile a graph for every subnet.
lint-bans:
	@! grep -rni torch csrc/common csrc/cpu csrc/cuda || { echo "csrc/{common,cpu,cuda}: no torch"; false; }
	@! grep -rnE '^ *"[^"]*\bint(\[[0-9]*\])?\?? [a-z_]+ *[,)=]' weightshare_kernels/ops/*/__init__.py \
	  || { echo "op schemas: declare sizes SymInt, not int"; false; }

ASAN := build/asan
asan: install ## op tests with the CPU library under AddressSanitizer and UBSan
	WEIGHTSHARE_BUILD=cpu WEIGHTSHARE_SANITIZE=address,undefined $(RUN) setup.py -q \
	  build --build-base $(ASAN) --build-lib $(ASAN)/lib
	PYTHONPATH=$(ASAN)/lib LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
	  $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(PYTEST) tests/test_ops.py --backend cpu -p no:cacheprovider

docs: $(VENV)/.tools ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.package ## build dist/*.whl
	rm -rf build/lib* build/bdist*
	$(PIP) wheel -q --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

clean: ## remove what was built; .venv and results stay
	rm -rf build dist site *.egg-info python/*.egg-info weightshare_kernels/_C_*.so $(VENV)/.native
