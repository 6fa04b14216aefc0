# `make help` lists the targets. Two of them are enough to begin with: `make demo` and `make test`.
# Everything stays inside this directory (.venv, .cache), but for uv's own download cache.

BIN := .venv/bin
# Models that the demo and the tests build are kept here, too. (Not for `setup`: uv shares its cache between checkouts.)
# What is built for the cluster is not: it is kept for all checkouts.
PYTHON_HERE := E2E_CACHE_DIR=$(or $(E2E_CACHE_DIR),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/drumline/cluster) XDG_CACHE_HOME=$(CURDIR)/.cache $(BIN)/python

# Byte code is kept: most tests start interpreters, and each would compile drumline anew.
unexport PYTHONDONTWRITEBYTECODE

# One pytest process per layer. `--session-timeout` is a layer's limit on a slow machine, in seconds; limits per test are
# in tests/conftest.py. One thread per rank: tests start more ranks than there are cores.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON_HERE) -m pytest -q -m "not gpu" --durations=3 $(ARGS)

# In CI the API server, and what else a layer needs, is built where it is missing, outside of the limits of its tests. Elsewhere
# tests build it when they need it, or skip and say how.
built = $(if $(CI),$(BIN)/python -m e2e.cluster build $(if $(KUBEBUILDER_ASSETS),,etcd kube-apiserver) kubectl $(1))

.DEFAULT_GOAL := help
.NOTPARALLEL:
# Every target here is a name, not a file.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create or refresh .venv from requirements.lock (done by every other target)
	@tools/setup

demo: setup ## A tiny SDXL on two ranks: invoke it, stream it with previews, save the images
	$(PYTHON_HERE) examples/parallel_sdxl/demo.py $(ARGS)

test: lint types layers unit process lanes ## Everything that CI checks

# `+` passes on --keep-going and the like.
lanes: setup ## A part of `test`: scenarios, and beside them chart, handlers, contract and strategies
	+@MAKE="$(MAKE)" tools/lanes

lint: setup ## Style and common mistakes (ruff), and whether what is generated is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=operator $(BIN)/python -m drumline_operator.crd --check
	PYTHONPATH=operator $(BIN)/python -m drumline_operator.reference --check
	$(BIN)/python tools/chart_values.py --check
	$(BIN)/python -m bench.page --check

reference: setup ## Write the pages of docs/reference that are generated, and the chart's values.yaml
	PYTHONPATH=operator $(BIN)/python -m drumline_operator.reference --write
	$(BIN)/python tools/chart_values.py --write

crds: setup ## Write crds/, and the chart's templates of them, from the models in worker/drumline/api
	PYTHONPATH=operator $(BIN)/python -m drumline_operator.crd --write

types: setup ## mypy --strict over the package
	$(BIN)/mypy

layers: setup ## Who may import whom (import-linter)
	$(BIN)/lint-imports

unit: setup ## Pure modules, properties over random input, and the ground rules (layers, docs, lock file)
	$(PYTEST) --session-timeout=600 tests/unit tests/property tests/cluster

# Helm and others are built when they are first used, which needs Go; like the cluster's, they are in the user's own cache.
chart: setup ## The Helm chart: lint, templates, values, what its roles allow
	$(call built,helm kubeconform)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=3 --session-timeout=600 $(ARGS) tests/chart

# etcd and the API server are built once per user (some minutes), in the user's own cache folder.
handlers: setup ## The operator's process against a real API server (etcd and kube-apiserver, no pods)
	$(call built)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=3 --session-timeout=1500 $(ARGS) tests/handlers

contract: setup ## HTTP routes, OpenAPI and the fal client against a running server; the CRDs against a real API server
	$(call built)
	$(PYTEST) --session-timeout=600 tests/contract

process: setup ## Real rank processes: serve, stream, raise, kill, hang, cancel
	$(PYTEST) --session-timeout=2400 tests/process

strategies: setup ## Every example against its one-process result, and the demo
	$(PYTEST) --session-timeout=3600 tests/strategies

# The cluster's binaries are in the user's own cache folder, so that a fresh clone does not build them again. CLUSTER=kind
# and CLUSTER=current take another cluster than the one made of namespaces on this machine (e2e/README.md).
scenarios: cluster-prepare ## Real pods on a real Kubernetes, which is started for it unless it runs
	$(BIN)/python -m pytest -q --durations=3 --session-timeout=5400 $(ARGS) e2e/scenarios

cluster-prepare: setup ## Build what it is made of, and the project's images, unless they are there
	$(BIN)/python -m e2e.cluster prepare

cluster-up: setup ## Start a real Kubernetes on this machine: two nodes with 8 fake GPUs each
	$(BIN)/python -m e2e.cluster up $(ARGS)

cluster-down: setup ## Remove it, and all that it made
	$(BIN)/python -m e2e.cluster down

cluster-status: setup ## What of it runs
	$(BIN)/python -m e2e.cluster status

images: setup ## Build Dockerfile.worker and Dockerfile.operator without Docker, and load them into the cluster if it runs
	$(BIN)/python -m e2e.cluster images $(ARGS)

envtest: setup ## etcd and the API server alone, until Ctrl-C or for the time of ARGS="-- COMMAND"
	$(BIN)/python -m e2e.cluster envtest $(ARGS)

gpu: setup ## Tests that need a CUDA device
	HF_HUB_OFFLINE=1 $(PYTHON_HERE) -m pytest -q -m gpu $(ARGS) tests/gpu

bench: bench-floors ## The same as bench-floors

bench-floors: setup ## Latency, throughput and memory against their floors, saved as JSON
	$(PYTHON_HERE) -m bench floors $(ARGS)

bench-start: setup ## Start and restart, beside torch's import and bare forks
	$(PYTHON_HERE) -m bench start $(ARGS)

bench-sizes: setup ## A value in and out, from 64 bytes to 200 MiB
	$(PYTHON_HERE) -m bench sizes $(ARGS)

bench-ranks: setup ## One rank to eight
	$(PYTHON_HERE) -m bench ranks $(ARGS)

bench-streams: setup ## One stream to 512 at once: events a second, the first event, fairness
	$(PYTHON_HERE) -m bench streams $(ARGS)

bench-overload: setup ## Up to three times the requests that can be served
	$(PYTHON_HERE) -m bench overload $(ARGS)

bench-soak: setup ## Memory and descriptors over 100,000 requests and 10,000 streams
	$(PYTHON_HERE) -m bench soak $(ARGS)

bench-idle: setup ## Wake-ups and CPU of a server that nobody uses
	$(PYTHON_HERE) -m bench idle $(ARGS)

bench-all: setup ## All of these, in some ten minutes of a quiet machine, and the page with all figures
	$(PYTHON_HERE) -m bench $(ARGS)
	$(BIN)/python -m bench.page

bench-peers: setup ## The same work behind other servers, each in an environment of its own, beside ours
	$(BIN)/python -m bench.peers $(ARGS)

bench-quick: setup ## About a minute of them: fails when a ratio to a floor is less than half as good as committed
	$(PYTHON_HERE) -m bench --quick $(ARGS)
	$(BIN)/python -m bench.peers --check

bench-operator: setup ## The operator on a real control plane with up to 1,000 apps, beside a plain client; saved as JSON
	$(BIN)/python -m bench.operator $(ARGS)

bench-operator-quick: setup ## 100 apps: fails when a restart, a resync or an idle operator writes anything; no goals for time
	$(BIN)/python -m bench.operator --quick $(ARGS)

chaos: setup ## Break a real server a thousand times while clients use it, and check every answer (ARGS="--seed 7")
	$(PYTHON_HERE) -m chaos $(ARGS)

chaos-quick: setup ## Every kind of fault once
	$(PYTHON_HERE) -m chaos --quick --seed 1 $(ARGS)

# The random tests of CI are the same every time. Here they are others, and TIMES as many (minutes each 10 or so); a failure prints
# the seed: make fuzz SEED=... repeats it.
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
fuzz: setup ## Random frames, requests and manifests, with new ones each time (SEED=7 TIMES=20)
	@echo "seed $(SEED)"
	FUZZ_TIMES=$(or $(TIMES),10) $(PYTEST) --session-timeout=1500 --timeout=600 --hypothesis-seed=$(SEED) -k "any or broken or changed" \
	  tests/property/test_manifest_fuzz.py tests/property/test_frames_fuzz.py tests/process/test_server_hostile.py || { echo "again with SEED=$(SEED)"; exit 1; }

format: setup ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## Resolve requirements.lock and images/*.lock anew from pyproject.toml (UPGRADE=1: newest versions)
	tools/lock $(if $(UPGRADE),--upgrade)

clean: ## Remove the environment, caches and outputs
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist demo-output
	find operator worker tests examples bench e2e -name __pycache__ -type d -prune -exec rm -rf {} +
