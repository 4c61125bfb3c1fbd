# `make demo` and `make test` set up .venv themselves, for machines without a GPU. On a GPU machine: docs/install.md.
PYTHON ?= python3
# There is no vLLM for CPUs but on Linux. Without it transformers samples (--engine hf).
VLLM ?= $(if $(filter Linux,$(shell uname -s)),yes,no)
VLLM_LIST := $(if $(filter yes,$(VLLM)),-r requirements-cpu-vllm.txt)
RUN := demo-$(shell date +%m%d-%H%M%S)
INSTALL := .venv/bin/uv pip install -q --python .venv/bin/python

demo: .venv/ready  ## rvpo and gdpo on SmolLM2-135M: does a constraint survive? nine to 13 minutes on two cores
	.venv/bin/python study/demo.py --name $(RUN)

study: .venv/ready  ## every aggregation on three small tasks: up to an hour on two cores
	.venv/bin/python study/study.py --out runs/study-$(shell date +%m%d-%H%M%S)

test: .venv/tests-ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check -q .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile  # threads of several tests would get in each other's way

gpu:  ## is all well on a GPU machine? ten minutes, in the Python that has requirements.txt: of .venv, if there is one
	$(or $(wildcard .venv/bin/python),$(PYTHON)) tools/gpu.py

# Made again whenever a list changes. uv installs the lists in a fraction of pip's time, and finds the CPU build of torch.
# Where it cannot reach that build, pip takes what the index has: usually the CUDA build, which is 3 GB larger.
.venv/ready: requirements-cpu.txt requirements-cpu-vllm.txt
	$(PYTHON) local/machine.py $(VLLM)
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install -q uv
	@echo "torch's CPU build, or, where it is out of reach, what the package index has"
	$(INSTALL) --torch-backend cpu torch==2.13.0 2>/dev/null || .venv/bin/python -m pip install -q torch==2.13.0
	$(INSTALL) --no-deps -r requirements-cpu.txt $(VLLM_LIST)
	touch .venv/ready

# What only tests compare with: TRL, and verl in a directory that one test sees.
.venv/tests-ready: .venv/ready requirements-bench.txt requirements-verl.txt
	$(INSTALL) --no-deps -r requirements-bench.txt
	$(if $(VLLM_LIST),$(INSTALL) --no-deps --target .venv/verl -r requirements-verl.txt)
	touch .venv/tests-ready

.PHONY: demo study test gpu
