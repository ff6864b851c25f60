# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killed at any step of a window: no page was to be had, and no guest stands still for ever."""

from __future__ import annotations

import pytest
from crash import SWEEP_STEP, Lives, Scenario, sweep, sweep_twice
from fakes.world import World
from sealed import ARCHES, make, own, read, watch, write

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.machine import Arch
from xshmd.model import Isolation, RegionConfig, RegionTerms


async def join_detach_reboot(host: World, running: Lives) -> None:
    watch(host)
    r = own(host, "r", 3)
    a = await make(host, "a", r)
    write(host, a, r, b"from a")
    b = await make(host, "b", host.borrow("r", 3, at=64))
    assert host.pages(a.domid, r) == host.pages(b.domid, host.borrow("r", 3, at=64))
    assert host.xen.guest_read(b.domid, host.borrow("r", at=64).first_gfn, 0, 6) == b"from a"
    await running.apply(DetachRegion(guest="a", region_id="r"))
    assert host.xen.foreign_frames(a.domid) == {}
    await host.tools.end(a)
    again = await host.tools.reboot(b)
    await host.until(lambda: host.running(again))
    assert host.xen.guest_read(again.domid, host.borrow("r", at=64).first_gfn, 0, 6) == b"from a"
    await host.tools.end(again)


async def attach_to_two_that_run(host: World, running: Lives) -> None:
    watch(host)
    a, b = await make(host, "a", own(host, "r", 2)), await make(host, "b")
    terms = RegionTerms(isolation=Isolation.SEALED)
    n = host.borrow("n", 4, at=32)
    await running.apply(
        AddRegion(config=RegionConfig(region_id="n", nr_frames=4, terms=terms)),
        AttachRegion(guest="a", request=n),
        AttachRegion(guest="b", request=n),
    )
    assert host.pages(a.domid, n) == host.pages(b.domid, n)
    write(host, b, n, b"from b")
    await running.apply(DetachRegion(guest="b", region_id="n"))
    assert read(host, a, n) == b"from b"
    for made in (a, b):
        assert host.xen.by_domid[made.domid].pauses == 0
        await host.tools.end(made)
    await host.until(lambda: running.guests() == ())
    await running.apply(RemoveRegion(region_id="n"))


async def a_paused_guest(host: World, running: Lives) -> None:
    watch(host)
    a = await make(host, "a", own(host, "r", 2))
    host.xen.pause(a.domid)
    b = await make(host, "b", host.borrow("r", 2))
    await running.settled()
    await host.until(lambda: host.xen.by_domid[a.domid].pauses == 1, "its own pause alone")
    host.xen.unpause(a.domid)
    await host.tools.end(a)
    await host.tools.end(b)


SCENARIOS: list[Scenario] = [join_detach_reboot, attach_to_two_that_run]


@ARCHES
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_cut(scenario: Scenario, arch: Arch) -> None:
    count, failed = sweep(scenario, arch=arch, step=8 * SWEEP_STEP)
    assert failed == []
    assert count > 5


def test_the_pauses_of_others_outlive_every_cut() -> None:
    count, failed = sweep(a_paused_guest, step=80 * SWEEP_STEP)
    assert failed == []
    assert count > 3


def test_a_cut_in_the_recovery_from_a_cut() -> None:
    count, failed = sweep_twice(join_detach_reboot, step=40 * SWEEP_STEP)
    assert failed == []
    assert count > 3
