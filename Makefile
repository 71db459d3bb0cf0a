# `make` alone prints the targets. Everything is installed into .venv; nothing outside the repository is touched.

PYTHON ?= python3
OUT ?= $(if $(DRY),out/dry,out/gpu)
# Test processes: one a core, at most eight.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)
# The CUDA builds of torch bring the Triton they were made with; the CPU build brings none.
TORCH := torch==2.13.0
TRITON_FOR_CPU := triton==3.8.0
PIP_FLAGS ?= -qq

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check $(PIP_FLAGS)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -r fEs --timeout 900 -n $(WORKERS) --dist worksteal
# Named after what it installed, so that a changed dependency installs again and a second run does not.
STAMP := $(VENV)/installed-$(shell cat setup.py pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

# Triton reads TRITON_INTERPRET once, so what runs kernels and what compiles them are runs of their own. With it set,
# the tests of the ops hold the Triton backend to the reference, without it the CPU backend.
INTERPRETED := $(wildcard tests/kernels tests/ops)
COMPILED := $(wildcard tests/compile)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-full test-core test-interpreter test-compile test-abi compile-check interop-docs extension native gpu lint clean

help: ## Print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
	|| grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with the pinned dependencies and the package

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "FastViT needs Python 3.10 or later; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
	|| { echo "$(PYTHON) can't make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
	|| echo "No C++ compiler found: torch.compile on the CPU, the ops in C++ for it, and their tests need one."
	@rm -f $(VENV)/installed-*
	@echo "Installing $(TORCH) into $(VENV), the build that fits this machine (it can be large)"
	@$(PIP) install --no-compile -c constraints.txt $(TORCH)
	@case "$$(uname -s)-$$(uname -m)" in Linux-x86_64) \
	$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)' \
	|| { echo "Installing $(TRITON_FOR_CPU)"; $(PIP) install --no-compile -c constraints.txt "$(TRITON_FOR_CPU)"; };; esac
	@echo "Installing fastvit and the other dependencies"
	@FASTVIT_BUILD_CUDA=$${FASTVIT_BUILD_CUDA:-0} \
	$(PIP) install --no-compile -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@
	@echo "Ready: $(BIN)/fastvit --help"

demo: install ## Validate, train and measure on real images; writes out/demo/report.html
	$(BIN)/fastvit demo

test: install lint test-core test-interpreter test-compile ## Lint and the whole test suite
	@echo "All tests passed."

test-core: install ## Everything but the Triton kernels
	env -u TRITON_INTERPRET $(PYTEST) tests --ignore=tests/kernels --ignore=tests/compile

test-interpreter: install ## Every Triton kernel under the interpreter
	$(if $(INTERPRETED),TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED),@echo "no tests/kernels")

test-compile: install ## The kernels compiled for real targets
	$(if $(COMPILED),env -u TRITON_INTERPRET $(PYTEST) $(COMPILED),@echo "no tests/compile")

test-full: PYTEST += -m 'full or not full'
test-full: test ## The suite with the full-size and slow cases

compile-check: install ## Compile every kernel, Triton and CUDA C++, offline for sm_80, sm_90 and sm_100
	env -u TRITON_INTERPRET $(BIN)/python -m fastvit.kernels.compile_check
	$(BIN)/python tools/compile_csrc.py

interop-docs: install ## Write the support table of docs/interop.md from a run of its tests
	FASTVIT_WRITE_INTEROP=1 env -u TRITON_INTERPRET $(PYTEST) tests/interop/test_parity.py

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/python tools/typecheck.py

# Six architectures take minutes on many cores, so that no other target does it: FASTVIT_CUDA_ARCHS=90a for one.
extension: install ## Build the C++/CUDA extension in place, for the GPUs of FASTVIT_CUDA_ARCHS, such as 80;90a
	FASTVIT_BUILD_CUDA=1 $(BIN)/python tools/build_extension.py

native: install ## Build the ops for the processor again, in place, as `make install` did
	FASTVIT_BUILD_NATIVE=1 $(BIN)/python tools/build_native.py

test-abi: install ## One binary of the binding under torch 2.11 and 2.14, each in an environment of its own (large)
	$(BIN)/python tools/test_abi.py

# A machine with a GPU has its own torch and Triton and may have no network: the package alone is installed, into an
# environment that sees the packages of $(PYTHON). The extension is built by a stage, which may fail, or came with the
# tree. DRY=1 needs no GPU, and takes the environment that is here.
gpu: ## Test, measure and profile on this machine's GPU (CALL=A or B, or STAGE=a,b BUDGET=seconds; DRY=1: without one); writes $OUT
	$(if $(DRY),,$(PYTHON) tools/gpu_env.py build/gpu-env)
	OUT="$(OUT)" $(if $(DRY),$(BIN),build/gpu-env/bin)/python -m fastvit.benchmarks.campaign $(if $(CALL),--call '$(CALL)') $(if $(STAGE),--stage '$(STAGE)') $(if $(BUDGET),--budget $(BUDGET)) $(if $(DRY),--dry-run)

clean: ## Remove what was built, measured and cached; .venv stays
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
