# make demo: set up and run the main job.  make test: set up and pass the tests.  Everything else: make help.
.DEFAULT_GOAL := help
SHELL := /bin/bash
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Where no registry is reachable (the GPU machine) the system's own Python runs the GPU targets.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: help demo test check test-kernels test-mesh test-gpu test-ray test-clients test-api test-faults test-ui soak bench bench-kernels gate lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.runtime: pyproject.toml requirements.lock tools/setup.sh
	@tools/setup.sh
	@touch $@

.venv/.dev: pyproject.toml requirements.lock tools/setup.sh
	@tools/setup.sh dev
	@touch $@ .venv/.runtime

demo: .venv/.runtime ## a code completion, a chat answer and a JSON extraction from the bundled model
	@$(BIN)/jaxllm demo

test: .venv/.dev ## the whole suite on this machine's CPU
	@$(PYTEST) -n 2 --dist loadscope --no-loadscope-reorder

.clients/.done: .venv/.dev tests/clients/requirements.txt tests/clients/package.json tests/clients/setup.sh
	@tests/clients/setup.sh
	@touch $@

test-clients: .clients/.done ## openai (Python, npm), anthropic, litellm and langchain-openai against `jaxllm serve`
	@mkdir -p build
	@set -o pipefail; $(BIN)/python tests/helpers/served.py -- tests/clients/run.sh 2>&1 | tee build/clients.txt

.api/.done: .venv/.dev tests/api/setup.sh
	@tests/api/setup.sh
	@touch $@

test-api: .api/.done ## schemathesis against /openapi.json, EXAMPLES=200 an operation, what is allowed and what is not
	@mkdir -p build
	@set -o pipefail; $(BIN)/python tests/helpers/served.py --api-key key -- tests/api/run.sh 2>&1 | tee build/api.txt

test-faults: .venv/.dev ## faults of section 3 that need starts of their own: caches, damaged models, signals
	@$(PYTEST) -m "faults or not faults" tests/serve -k fault

.venv/.ui: .venv/.dev
	@tools/setup.sh dev,ui
	@touch $@

test-ui: .venv/.ui ## the web page in a real Chromium (Debian's chromium and chromium-driver), also against the real server
	@$(PYTEST) -m browser tests/serve/ui

soak: .venv/.dev ## random requests and cancels for MINUTES=20; memory flat, pages whole, nothing compiled
	@$(BIN)/python tests/soak/soak.py --minutes $(or $(MINUTES),20) --out build/soak.json

check: .venv/.dev ## format, lint, types, import contracts, sizes
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports
	@$(PYTEST) tests/test_architecture.py

test-mesh: .venv/.dev ## every mix of parallelisms on simulated devices; rewrites the table of docs/parallelism.md
	@$(PYTEST) -m "mesh or not mesh" tests/sharding/test_matrix.py

test-gpu: ## kernels and engine on the GPU of this machine; a process a file: a kernel that breaks the GPU ends only its own
	@failed=0; for each in tests/gpu tests/pallas_kernels/test_*.py; do echo "$$each"; \
	  PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) -m pytest -m gpu -p no:cacheprovider $$each; \
	  code=$$?; [ $$code = 0 ] || [ $$code = 5 ] || failed=1; done; exit $$failed

test-ray: .venv/.dev ## two replicas on a Ray cluster of two nodes on this machine (installs the extra ray)
	@$(BIN)/python -c 'import ray' 2>/dev/null || $(BIN)/python -m pip install -q -e '.[ray]'
	@$(PYTEST) -m ray tests/ray

bench: ## decode, prefill and throughput of an 8B shape on this machine's GPU
	@PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) benchmarks/shapes.py llama-3.1-8b build
	@PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) -m serve.cli bench latency build/llama-3.1-8b --requests 256

bench-kernels: ## attention kernels on this machine's GPU: ours, XLA, cuDNN and JAX's, with the issue's bars
	@PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) -m benchmarks.kernels --out benchmarks/results/kernels

test-kernels: .venv/.dev ## kernels that the interpreter takes minutes for
	.venv/bin/python -m pytest -m kernels tests/pallas_kernels

gate: ## compile every GPU kernel for sm_90a without a GPU; fails on spills (needs the CUDA wheels)
	@PYTHONPATH=. $(GPU_PYTHON) -m tools.gate

lock: .venv/.dev ## rewrite requirements.lock from .venv
	@tools/lock.sh

clean: ## remove what make created
	@rm -rf .venv .clients .api .jax_cache build dist
