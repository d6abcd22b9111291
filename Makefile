# make demo                    pretrain a tiny model on real recordings, in minutes, and see what came out
# make demo DATA=/my/folder    the same on your own audio
# make reproduce               check the method's claims at small scale; stop and go on at any time
# make reproduce HOURS=3       in about so many hours (8); STORE=/folder keeps what another machine can go
#                              on from, KEPT=1 fine-tunes from the weights kept on the way, too
# make performance             measure the training step, the loader and short runs; writes docs/performance.md
# make gpu                     test and measure everything on a GPU; writes docs/gpu.md
# make gpu DEVICE=cpu          a small dry run of the same commands
# make test                    run all checks and tests
# make lint                    ruff and mypy alone
# make docs                    build the documentation site, build/site/index.html
# make architecture            print the rooms of the code and the imports between them

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo reproduce performance gpu test lint docs types architecture setup

demo: setup
	$(BIN)/ssast demo $(if $(DATA),--source "$(DATA)")

reproduce: setup
	$(BIN)/ssast bench reproduce $(if $(HOURS),--hours $(HOURS)) $(if $(STORE),--store "$(STORE)") $(if $(KEPT),--kept)

performance: setup
	$(BIN)/ssast bench performance

gpu: setup
	$(BIN)/ssast bench gpu $(if $(DEVICE),--device $(DEVICE))

# A process on each of two cores, with a thread each, as CI has them.
test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p ssast.engine -p ssast.kernels -p ssast.pipelines -p ssast.benchmarks

docs: types
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Links from the import names to the folders, for tools that read the code without importing it.
types: setup
	@mkdir -p build/types/ssast
	@for folder in engine kernels pipelines benchmarks; do \
	  ln -sfn ../../../$$folder build/types/ssast/$$folder; done

architecture:
	@$(PYTHON) tests/support/architecture.py

setup: .venv/installed

.venv/installed: requirements.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "Python 3.11 to 3.14 is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv || \
	  { echo "The module venv of Python is needed (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@
