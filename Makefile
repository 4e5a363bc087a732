# Every job sets up what it needs in .venv first; on a machine without make: python tools/bootstrap.py JOB
PYTHON ?= $(shell command -v python3 || command -v python)
# Passed on to the job: make test ARGS="-k merge"
ARGS ?=

.PHONY: help install demo test check

help install demo test check:
	@$(PYTHON) tools/bootstrap.py $@ $(ARGS)
