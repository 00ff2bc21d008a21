# Everything a newcomer runs. Needs Python >= 3.10, make and git; each target sets up what it needs by itself.
#   make demo    a clip of moving shapes becomes an adapter that answers; with the trained models, where they are
#   make test    the tests, offline
#   make test-lmms-eval    those with lmms-eval, in an environment of their own (7 GB)
#   make lint    ruff and mypy
#   make clean   remove the environment and all caches

PYTHON ?= python3
VENV ?= .venv

# torch in every worker would take all cores for models of 64 channels: one thread a process, and processes instead.
# More than four workers spend longer on importing torch than they save.
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist worksteal
test: export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-lmms-eval lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/video2lora demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-lmms-eval: $(VENV)-lmms/.installed
	OMP_NUM_THREADS=1 $(VENV)-lmms/bin/python -m pytest tests/evaluation/test_lmms_eval.py tests/evaluation/test_lmms_eval_run.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(VENV)-lmms build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Repeated only when the dependencies may have changed.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)-lmms/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-lmms
	$(VENV)-lmms/bin/python -m pip install --quiet --editable ".[lmms-eval]" "pytest>=8.3" "pytest-timeout>=2.3"
	touch $@
