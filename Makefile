# Two commands do everything on a fresh machine: `make demo` and `make test`. The first run installs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo quick test units slurm slurm-slow lint types check install format

demo: $(INSTALLED)  ## six methods on real digits: train, score, table and figures
	$(BIN)/tsbench demo

quick: $(INSTALLED)  ## the demo's path in about two minutes, not converged
	$(BIN)/tsbench demo --quick

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
ON_SLURM = $(shell grep -l pytest.mark.slurm tests/test_*.py)

test: units  ## all tests that this machine can run in some minutes
	@if PATH=$$PATH:/usr/sbin; for daemon in slurmctld slurmd slurmdbd mariadbd munged; do command -v $$daemon || exit 1; done >/dev/null; \
	then $(MAKE) slurm; else \
	  echo "Skipped: the tests on a real Slurm, as it is not installed. To run them: sudo slurm/local_cluster.sh install && make slurm"; fi

units: $(INSTALLED)  ## those that need no Slurm
	$(PYTEST) -n auto --dist loadgroup

slurm: $(INSTALLED)  ## those on a real Slurm, about 7 minutes, on two clusters at a time
	$(PYTEST) -m "slurm and not slow" -n 2 $(ON_SLURM)

slurm-slow: $(INSTALLED)  ## the slow ones of them, about 9 minutes, on one cluster
	$(PYTEST) -m "slurm and slow" $(ON_SLURM)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "timestep-bench needs Python 3.11 or later: run make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Installing into $(VENV): about 6 GB, a few minutes the first time."
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "Python cannot create virtual environments here: install python3-venv (Debian: apt-get install python3-venv)"; exit 2; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
