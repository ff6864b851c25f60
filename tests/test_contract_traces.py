# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random traces on the model alone: it keeps its own books (real Xen is asked by the scenarios)."""

from __future__ import annotations

from collections import Counter

import pytest
from contract.traces import first_difference, played
from fakes.hypervisor import SimulatedXen

from xshmd.errors import all_errors
from xshmd.machine import Arch

SEEDS = range(150)
ERRORS = {error.__name__ for error in all_errors()}


def model(arch: Arch) -> SimulatedXen:
    return SimulatedXen(arch, total_pages=1 << 18, dom0_pages=1 << 16)


@pytest.mark.parametrize("arch", list(Arch), ids=str)
def test_the_model_keeps_its_books(arch: Arch) -> None:
    xen = model(arch)
    free = xen.free_pages
    for seed in SEEDS:
        played(xen, seed)
        xen.check()
        assert xen.free_pages == free, f"seed {seed}"
        assert not xen.leaked_references, f"seed {seed}"
        assert not xen.crashed, f"seed {seed}"


@pytest.mark.parametrize("arch", list(Arch), ids=str)
def test_a_trace_is_its_seed(arch: Arch) -> None:
    one, other = played(model(arch), 7), played(model(arch), 7)
    assert first_difference(one, other) == ""
    assert first_difference(one, played(model(arch), 8)) != ""


@pytest.mark.parametrize("arch", list(Arch), ids=str)
def test_traces_do_something(arch: Arch) -> None:
    """What is asked succeeds often, and fails in many ways: else nothing is compared."""
    xen = model(arch)
    done: Counter[str] = Counter()
    for seed in SEEDS:
        for answer in played(xen, seed):
            verb, (name, _, code) = answer.split()[0], answer.partition(": ")[2].partition(" ")
            done[f"{verb} {code or name}" if name in ERRORS else f"{verb} ok"] += 1
    for verb in ("map", "unmap", "populate", "write", "read", "target", "pool"):
        assert done[f"{verb} ok"] > 30, f"{verb}: {done}"
    assert done["map EPERM"] > 5
    assert done["map EINVAL"] > 5
