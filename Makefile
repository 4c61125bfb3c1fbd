# All targets but `gpu` set up .venv themselves, with CPU builds. On a GPU machine: pip install -r requirements.txt first,
# see README.md.
PYTHON ?= python3
RUN := demo-$(shell date +%m%d-%H%M%S)

demo: .venv/ready  ## rvpo and gdpo on SmolLM2-135M: does a constraint survive? nine to 13 minutes on two cores
	.venv/bin/python study/demo.py --name $(RUN)

study: .venv/ready  ## every aggregation on three small tasks: up to an hour on two cores
	.venv/bin/python study/study.py --out runs/study-$(shell date +%m%d-%H%M%S)

test: .venv/ready
	.venv/bin/ruff check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile  # threads of several tests would get in each other's way

gpu:  ## is all well on a GPU machine? ten minutes, in the Python that has requirements.txt: of .venv, if there is one
	$(or $(wildcard .venv/bin/python),$(PYTHON)) bench/gpu.py

# Made again whenever a list changes. uv only because it installs the lists in a fraction of pip's time.
.venv/ready: requirements-cpu.txt requirements-bench.txt requirements-verl.txt
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install -q torch==2.13.0 uv
	.venv/bin/uv pip install -q --python .venv/bin/python --no-deps -r requirements-cpu.txt -r requirements-bench.txt
	.venv/bin/uv pip install -q --python .venv/bin/python --no-deps --target .venv/verl -r requirements-verl.txt
	touch .venv/ready

.PHONY: demo study test gpu
