# `make demo` and `make test` work on a fresh machine with Python >= 3.11 and make: they first build .venv and install the
# dependencies into it. The other targets are for developers; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
ifndef OUT
OUT := demo/$(shell date +%Y-%m-%d-%H%M%S)
endif

BIN := $(VENV)/bin
RUN := $(BIN)/python -m

# The extras of pyproject.toml that each target needs.
EXTRAS_demo := torch,train
EXTRAS_test := torch,jax,test
EXTRAS_dev := dev
EXTRAS_docs := docs,torch,jax

# Every test worker uses one core. If a library started one thread per core in each worker, the threads would compete.
TEST_THREADS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# JAX's tests spend most of their time in XLA's compiler, because a test runs a compiled program only a few times. With
# these flags LLVM optimises the programs less. The GPU dry run of CI compares JAX with the oracle under XLA's defaults.
TEST_COMPILER := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true $$XLA_FLAGS"

.PHONY: help demo test gpu coverage mutation lint types imports check docs clean

help:
	@echo "make demo      train the demo (OUT=folder, DEMO_FLAGS='--quick')"
	@echo "make test      run all tests (WORKERS=n processes, PYTEST_FLAGS='-k name')"
	@echo "make gpu       measure a GPU, with PYTHON and its installed packages (WHEELS=folder, GPU_FLAGS='--dry-run')"
	@echo "make coverage  the tests of the core under coverage; its objectives must be covered in full"
	@echo "make check     lint, types and imports, which CI runs before the tests"
	@echo "make mutation  run the tests on thousands of mutants; hours (MUTANTS='numerics ambiguity')"
	@echo "make docs      build the documentation into build/docs (fetches MathJax with npm, once)"
	@echo "make clean     remove files that the tools left behind, but not .venv, demo/ or runs/"

demo: $(VENV)/.installed-demo
	$(BIN)/drrho demo --out $(OUT) $(DEMO_FLAGS)
	@echo "The report is $(abspath $(OUT))/report.html"

PYTEST := $(TEST_THREADS) $(TEST_COMPILER) $(RUN) pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal

test: $(VENV)/.installed-test
	$(PYTEST) $(PYTEST_FLAGS)

# On a GPU machine $(PYTHON) is used with its installed packages and our packages on its path. $(WHEELS) holds wheels
# of missing packages. A dry run needs no GPU and uses the environment of the tests. See benchmarks/README.md.
GPU_PYTHON := $(PYTHON)
ifneq ($(filter --dry-run,$(GPU_FLAGS)),)
GPU_PYTHON := $(BIN)/python
gpu: $(VENV)/.installed-test
endif

gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m benchmarks.gpu $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_FLAGS)

# The mathematics: everything beside the harness, all lines and branches.
coverage: $(VENV)/.installed-test
	$(PYTEST) --cov=drrho_core --cov-report= tests/core tests/backends drrho_core $(PYTEST_FLAGS)
	$(RUN) coverage report --include='drrho_core/*.py' --show-missing --fail-under=100

# This target is not part of CI; see docs/mutation.md.
MUTANTS ?= numerics ambiguity contrastive
mutation: $(VENV)/.installed-dev
	$(TEST_THREADS) $(BIN)/python tests/mutants/mutate.py $(MUTANTS) $(MUTATION_FLAGS) --out build/mutation.json

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.installed-dev
	$(RUN) mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

check: lint types imports

# The first build downloads MathJax from the npm registry. The check fails if a page loads a file from another host.
docs: $(VENV)/.installed-docs
	$(BIN)/python tools/offline_docs.py fetch
	$(RUN) sphinx --fail-on-warning --quiet docs build/docs
	$(BIN)/python tools/offline_docs.py check build/docs
	@echo "Open $(abspath build/docs)/index.html"

clean:
	rm -rf build dist htmlcov .coverage .coverage.* .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Each set of extras has a stamp file. A set is installed once, and again if the versions change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(RUN) pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[$(EXTRAS_$*)]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "drrho_core needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A pattern rule makes the stamps, and make would delete them as intermediate files.
.PRECIOUS: $(VENV)/.installed-%
