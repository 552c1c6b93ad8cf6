# Each target sets up what it needs in .venv; nothing has to be installed by hand but Python 3.11+.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: setup browser demo test lint checks checkpoint

setup: .venv/ready browser

.venv/ready: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --upgrade pip
	$(VENV)/pip install --quiet --editable '.[dev]'
	touch $@

# The tests look at the HTML report in it; nothing else needs it, so that setting up goes on without.
browser:
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then root=; else root="sudo -n"; fi; \
	  $$root apt-get -qq update && \
	  $$root apt-get -qq -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends chromium; \
	} || echo "make test needs the browser chromium: install it, on Debian the package chromium" >&2

demo: setup
	PATH="$(CURDIR)/$(VENV):$$PATH" bash scripts/tiny/demo.sh

# One thread each: more would only wait for one another. A file's tests share their fixtures.
test: setup
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

checks: lint test

# Re-creates configs/tiny/checkpoint from nothing (its parts took 22 and 46 minutes on two cores).
checkpoint: setup
	PATH="$(CURDIR)/$(VENV):$$PATH" bash scripts/tiny/make_checkpoint.sh
