# make demo    set up, then train a small policy by PPO in real sandboxes and show its learning curve
# make demo-slurm   the same as two jobs of a private Slurm, on different hosts
# make test    set up, then run every test
# make check   style and types        make fast    tests that need neither container nor vLLM, two to three minutes
# make test-clients   the real OpenHands clients against the server, in environments of their own
# make cluster a private Slurm and a shell in it; or one command: make cluster CMD='srun -N2 hostname'
# make fuzz    the sandbox agent's frames and archives, with sanitizers, ten minutes (FUZZ_S=60: one)
# make bench   every benchmark, one JSON line each
# make schemathesis   the sandbox server against its own OpenAPI document, five minutes
# make escape  attacks from inside sandboxes and from clients, on every engine; writes docs/security.md
# make soak    sandboxes made, used and deleted while things are killed: nothing may be left (CYCLES=5000)
# make drills  faults injected into whole runs on a private Slurm; writes docs/reliability.md; two at a time
.PHONY: escape demo demo-slurm test test-clients fast check bench fuzz schemathesis soak drills cluster setup clean
PY := .venv/bin/python

demo: setup
	@.venv/bin/orchestrate launch --config local --follow

demo-slurm: setup
	@$(PY) -m runtime_server.images save .setup/sandbox.tar
	@PYTHONPATH=tests $(PY) -m cluster -c "orchestrate launch --config demo-slurm --follow \
	    runtime.image_archives=[$(CURDIR)/.setup/sandbox.tar]"

test: setup
	@$(PY) -m pytest -n 2 --dist worksteal -m "not drill and not escape and not alone"; side_by_side=$$?; \
	$(PY) -m pytest -m alone && exit $$side_by_side

test-clients: setup
	@tools/clients $(ARGS)

fast: setup
	@$(PY) -m pytest -n 4 -m "not container and not vllm and not cluster and not slow"

check: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench: setup
	@$(PY) -m pip install -q -e '.[bench]'
	@for name in agent sandbox rollout launch trainer; do $(PY) -m bench.$$name --json || exit 1; done

FUZZ_S ?= 600
fuzz: setup
	@PYTHONPATH=tests $(PY) -m fuzz $(FUZZ_S)

schemathesis: setup
	@PYTHONPATH=tests/runtime_server $(PY) -m contract $(or $(SECONDS),300)

escape: setup
	@$(PY) -m tests.escape

CYCLES ?= 5000
soak: setup
	@PYTHONPATH=tests $(PY) -m soak --cycles $(CYCLES) $(ARGS)

drills: setup
	@$(PY) -m tests.drills

# In the environment, so that quotes and dollar signs of CMD reach the cluster as they were typed.
cluster: export CLUSTER_COMMAND = $(value CMD)
cluster: setup
	@PYTHONPATH=tests $(PY) -m cluster $(ARGS) $${CLUSTER_COMMAND:+-c "$$CLUSTER_COMMAND"}

setup:
	@tools/setup

clean:
	rm -rf .venv .setup build dist .mypy_cache .ruff_cache .pytest_cache
