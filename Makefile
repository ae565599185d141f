# `make demo` and `make test` do all the set-up; PYTHON=/path/to/python chooses another interpreter.
SHELL := bash
PYTHON ?= python3
export PYTHON
RUN := .venv/bin/python

.PHONY: demo test lint compile-all bench clean

# Passive: on a busy machine OpenMP's threads would spin while they wait for one another.
demo: .venv/ready
	OMP_WAIT_POLICY=passive $(RUN) -m torch_flash2 demo $(ARGS)

test: .venv/ready
	.ci/test.sh

lint: .venv/ready
	.ci/test.sh lint

compile-all: .venv/ready
	$(RUN) test/compile_all.py $(ARGS)

bench: .venv/ready
	$(RUN) -m torch_flash2 bench $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache demo.png demo.csv
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: .ci/setup.sh
	.ci/setup.sh
