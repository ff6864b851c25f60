# SPDX-License-Identifier: LGPL-2.1-or-later
# Everything here runs on a Debian 12 or 13 machine as root, with nothing but python3, make and git on
# it: what else is needed is installed or built into a cache outside the clone (XSHMD_CACHE).

ARCH ?= arm64
TEST_ARCHES ?= arm64 x86_64
# How many machines are emulated at once; 0 is one a processor, if there is memory for them.
MACHINES ?= 0
PY = $$(python3 -m integration.hostenv)

# Every target: none of them is a file.
.PHONY: $(shell sed -n 's/^\([a-z][a-z0-9-]*\):.*/\1/p' $(MAKEFILE_LIST))

help:
	@echo 'make demo [ARCH=arm64|x86_64] [STAY=1]   two guests share memory on real Xen under QEMU'
	@echo 'make test                  everything: lint, types, unit tests, scenarios on real Xen'
	@echo 'make lint | unit | unit-debian | rig-arm64 | rig-x86_64     its parts, one by one'
	@echo 'make rig-virt              those with libvirt, or a whole PC as a guest: another dom0'
	@echo 'make bench [ARCH=...]      the published figures'
	@echo 'make shell [ARCH=...]      a shell in a dom0 with xshmd installed'

demo:
	@python3 -m integration.demo --arch $(ARCH) $(if $(filter 1,$(STAY)),--shell)

shell:
	@python3 -m integration shell --arch $(ARCH)

# Side by side, each part's output in artefacts/test/; shown are progress and what fails.
test:
	@set -e; py=$(PY); \
	exec $$py -m integration.parts --machines $(MACHINES) $(addprefix --arch ,$(TEST_ARCHES)) $(PARTS)

lint:
	@set -e; py=$(PY); \
	$$py -m ruff check .; $$py -m ruff format --check .; $$py -m mypy

TESTS ?= tests
unit:
	@set -e; py=$(PY); $$py -m pytest $(TESTS)

# The same tests on Debian 13's Python and library versions, beside the compiled binding.
unit-debian:
	@python3 -m integration.debian13

rig: $(addprefix rig-,$(TEST_ARCHES))

rig-%:
	@set -e; py=$(PY); $$py -m pytest -p no:cacheprovider integration/scenarios --everywhere --arch $*

# No part of `make test`: dom0's image has much more in it that nothing else needs.
rig-virt:
	@set -e; py=$(PY); $$py -m pytest -p no:cacheprovider integration/scenarios --image libvirt \
	--arch x86_64

bench:
	@set -e; py=$(PY); $$py -m integration.bench --arch $(ARCH)

# Long ones, with a budget: not part of `make test`.
FUZZ_SECONDS ?= 600
TRACES ?= 0:500
SWEEP = XSHMD_SWEEP_STEP=1

fuzz:
	@set -e; py=$(PY); $$py -m pip install -q 'atheris>=2.3'; \
	cd tests; PYTHONPATH=.:.. $$py -m fuzz --seconds $(FUZZ_SECONDS)

# Clients of the socket gone wrong, and what a good one notices of each.
ATTACK_SECONDS ?= 10

attack:
	@set -e; py=$(PY); cd tests; PYTHONPATH=.:.. $$py -m attack --seconds $(ATTACK_SECONDS)

# A hostile front-end, counted: what it may not do is in tests/fuzz/vhost_user.py.
MESSAGES ?= 10000000
LOOP_MESSAGES ?= 500000
fuzz-vhost-user:
	@set -e; py=$(PY); cd tests; PYTHONPATH=.:.. $$py -m fuzz.vhost_user --messages $(MESSAGES); \
	PYTHONPATH=.:.. $$py -m fuzz.vhost_user --loop --messages $(LOOP_MESSAGES)

mutants:
	@set -e; py=$(PY); cd tests; PYTHONPATH=.:.. $$py -m mutants

# From a number on; a run that fails is played again by its number.
SCHEDULES ?= 10000
FIRST_SCHEDULE ?= 0

schedules:
	@set -e; py=$(PY); cd tests; \
	PYTHONPATH=.:.. $$py -m schedules --first $(FIRST_SCHEDULE) --count $(SCHEDULES)

sweep:
	@set -e; py=$(PY); $(SWEEP) $$py -m pytest $(addprefix tests/test_engine_,crash.py faults.py cancel.py)

call-sites:
	@set -e; py=$(PY); cd tests; PYTHONPATH=.:.. $$py -m call_sites

# A share of 1 cuts every first life at every place; a smaller one is a sample of the whole tree.
CRASH_SECONDS ?= 3600
CRASH_SHARE ?= 1
crashes:
	@set -e; py=$(PY); cd tests; PYTHONPATH=.:.. $$py -m crash_tree --seconds $(CRASH_SECONDS) \
	--first $(CRASH_SHARE)

# The same on real Xen, one operation at a time: killed before each of its effects.
crash-on-xen:
	@set -e; py=$(PY); $$py -m integration.crash --arch $(ARCH) --seconds $(CRASH_SECONDS)

# On the model, where a month takes minutes.
SOAK_DAYS ?= 30
soak-simulated:
	@set -e; py=$(PY); cd tests; PYTHONPATH=.:.. $$py -m soak --days $(SOAK_DAYS)

# On real Xen; a failure says by which seed and round it is seen again (SOAK_ARGS).
SOAK_SECONDS ?= 7200
soak:
	@set -e; py=$(PY); $$py -m integration.soak --arch $(ARCH) --seconds $(SOAK_SECONDS) $(SOAK_ARGS)

scale:
	@set -e; py=$(PY); cd tests; PYTHONPATH=.:.. $$py -m scale --regions 1000 --guests 500

# On real Xen, with guests of 4 MiB: as many as there is memory for.
GUESTS ?= 100
scale-on-xen:
	@set -e; py=$(PY); $$py -m integration.scale --arch $(ARCH) --guests $(GUESTS)

RACE_SECONDS ?= 3600
races:
	@set -e; py=$(PY); cd tests; PYTHONPATH=.:.. $$py -m races --seconds $(RACE_SECONDS)

contract:
	@set -e; py=$(PY); $$py -m pytest -p no:cacheprovider integration/scenarios/test_contract.py \
	--arch $(ARCH); tail -n 1 artefacts/$(ARCH)/contract.log

# docs/reliability.md, or those of its rows that are named; BUDGET: seconds of each that takes as long as it may.
BUDGET ?= 3600
reliability:
	@set -e; py=$(PY); $$py -m integration.reliability --budget $(BUDGET) $(ROWS)

differential:
	@set -e; py=$(PY); XSHMD_TRACES=$(TRACES) $$py -m pytest -p no:cacheprovider \
	integration/scenarios/test_traces.py --arch $(ARCH)

RINGS ?= 1000000

rings:
	@set -e; py=$(PY); XSHMD_RINGS=$(RINGS) $$py -m pytest -p no:cacheprovider -rP \
	integration/scenarios/test_doorbells.py -k flood --arch $(ARCH)

clean:
	rm -rf artefacts build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
