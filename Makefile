# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)
TORCH  := constraints/torch-$(if $(GPU),cuda,cpu).txt
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint asan bench gpu gpu-report docs wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The CPU build of torch carries the local version +cpu. It is asked for by that name first, so
# that a machine without a GPU does not download gigabytes of CUDA; where the configured indexes
# do not offer it, the plain release serves.
$(VENV)/.torch: $(TORCH)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints/tools.txt pip setuptools wheel ninja
	$(PIP) install -q -r $(TORCH) || \
	  { echo "no CPU build of torch on the configured indexes; installing the plain release"; \
	    $(PIP) install -q -r constraints/torch-cuda.txt; }
	touch $@

$(STAMP): $(VENV)/.torch pyproject.toml setup.py constraints/tools.txt $(SOURCES)
	$(PIP) install -q --no-build-isolation -c constraints/tools.txt -e '.[test,bench,demo]'
	touch $@

install: $(STAMP) ## create .venv with everything the other targets need
	@$(BIN)/python -m weightshare_kernels.info --brief
