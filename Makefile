# The habits of the project; CONTRIBUTING.md explains them. "make demo" needs Python and pip, nothing else.

VENV := .venv
BIN := $(VENV)/bin
# Worker processes of the test run.
JOBS ?= auto
# In CI, a tool that setup-system installs and that is absent is a failure, not a skip.
ifeq ($(CI),true)
COWHAND_REQUIRE ?= qemu-img qemu-io nbdkit nbdinfo mkfs.ext4
endif
export COWHAND_REQUIRE

.PHONY: help setup setup-run setup-system demo test test-trixie test-bookworm lint format bench conformance conformance-baseline docs fuzz soak clean

help:
	@echo "setup         a virtual environment in $(VENV) with the development tools"
	@echo "setup-system  the Debian packages that tests use"
	@echo "demo          a disk's life from beginning to end; writes demo/report.html"
	@echo "test          all tests; those whose tools are absent are skipped with the reason"
	@echo "test-trixie   .ci/run on Debian 13, in a folder of build/ (root); test-bookworm: on Debian 12; docs/debian.md"
	@echo "lint          ruff, mypy --strict, the import contract"
	@echo "bench         ratios against qemu-img, measured pairwise"
	@echo "conformance   QEMU's own iotests on cowhand's tools; writes docs/conformance.md"
	@echo "docs          the pages of commands and drivers, and the man pages, from what the code declares"
	@echo "fuzz          coverage-guided fuzzing of images; FUZZ_SECONDS=60 for each target"
	@echo "soak          random images with all options, judged by QEMU's check and compare; SOAK_SECONDS=600"
	@echo "clean         removes what the above have made"

setup: $(VENV)/.stamp-dev
setup-run: $(VENV)/.stamp-run

$(VENV)/.stamp-dev: pyproject.toml src/cowhand/__about__.py
	tools/venv.sh $(VENV) -e '.[dev]'
	@touch $(VENV)/.stamp-run $@

$(VENV)/.stamp-run: pyproject.toml src/cowhand/__about__.py
	tools/venv.sh $(VENV) -e .
	@touch $@

setup-system:
	tools/setup-system.sh

demo: setup-run
	$(BIN)/python demo/run.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) $(TESTS)

# Another release of Debian in a folder, filled by debootstrap. Needs root.
test-trixie test-bookworm:
	tools/debian.sh $(@:test-%=%)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-run
	$(BIN)/python bench/run.py

# CONFORMANCE="--format qcow2 001 031" runs a part of it; "--only remaining" goes on where a run was interrupted.
conformance: setup-run
	$(BIN)/python -m tests.conformance run $(CONFORMANCE)

conformance-baseline: setup-run
	$(BIN)/python -m tests.conformance baseline $(CONFORMANCE)

docs: setup-run
	$(BIN)/python -m tools.reference

# FUZZ="--target luks" runs one of the targets.
FUZZ_SECONDS ?= 60

fuzz: setup
	tools/venv.sh $(VENV) -e '.[dev,fuzz]'
	$(BIN)/python -m tests.fuzz run --seconds $(FUZZ_SECONDS) $(FUZZ)

# SOAK="--seed 22 --images 1" repeats one image.
SOAK_SECONDS ?= 600

soak: setup
	$(BIN)/python -m tests.soak --seconds $(SOAK_SECONDS) $(SOAK)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache htmlcov .coverage .coverage.*
	rm -rf $(VENV) demo/report.html demo/work
	find src tests tools demo bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
