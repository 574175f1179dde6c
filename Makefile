# Everything runs in .venv, which `make install` builds; python3 can be any version from 3.10 on.
PYTHON ?= python3
BIN := .venv/bin
# worksteal: most tests of a file stay together and share what they trained, and after a test that kills its process the
# others still run (loadfile would run that test again and again, and the rest of its file never).
TWO_PROCESSES := -n 2 --dist worksteal
# The oldest Python that pyproject.toml allows, where there is one (also in pyenv); else the one above.
OLDEST := $$(PYENV_VERSION=3.10 python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v $(PYTHON))

.PHONY: install demo test oldest lint docs stress bench clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; make PYTHON=python3.11 chooses another")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/gradmix-pretrain method=sphor run_dir=runs/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_PROCESSES)

# The same in a second environment, with the lowest version that pyproject.toml allows of every package it names.
oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(TWO_PROCESSES) tests/gradmix tests/ssl tests/eval
	@.venv-oldest/bin/python -c 'import sys; print("Python", sys.version.split()[0] + ("" if sys.version_info[:2] == (3, 10) else ", there is no 3.10 here"))'
	@echo $$(cat .venv-oldest/lowest.txt)

.venv-oldest/installed: pyproject.toml .ci/oldest.py
	$(OLDEST) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip packaging tomli
	.venv-oldest/bin/python .ci/oldest.py dev >.venv-oldest/lowest.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/lowest.txt --editable '.[dev]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install
	$(BIN)/python docs/hooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

stress: install
	$(BIN)/python -m pytest tests/stress --stress --timeout 0

bench: install
	for name in mixing_step loss_memory detectors evaluation scoring throughput switches startup; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
