# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever is told to stop, at whatever step: the daemon, and each client while it is answered."""

from __future__ import annotations

import os

import pytest
from cancel import Request, leave, play, sweep
from crash import Lives, Scenario
from fakes.toolstack import Made
from fakes.world import World
from test_engine_crash import (
    a_set_that_fails_in_its_middle,
    attach_and_detach,
    late_join_of_two,
    owner_gone,
    reboot,
    refusal,
    two_guests,
)

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.engine.reconciler import Reconciler
from xshmd.machine import Arch
from xshmd.model import RegionConfig, RegionRequest

STEP = int(os.environ.get("XSHMD_SWEEP_STEP", "211"))
"""Every how manieth step is one to stop at; XSHMD_SWEEP_STEP=1 plays all."""
SCENARIOS = (
    two_guests, reboot, refusal, attach_and_detach, late_join_of_two, owner_gone,
    a_set_that_fails_in_its_middle,
)  # fmt: skip


def test_a_run_is_its_seeds() -> None:
    """Else no step could be found again."""
    assert len({play(attach_and_detach) for _ in range(3)}) == 1


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_daemon_may_be_stopped_at_every_step(scenario: Scenario) -> None:
    count, failed = sweep(scenario, STEP)
    assert failed == []
    assert count > 300 // STEP


def test_on_arm_too() -> None:
    _, failed = sweep(late_join_of_two, STEP, arch=Arch.ARM64)
    assert failed == []


# -- clients that leave ---------------------------------------------------------------------------


class OneGuest:
    """A guest that has region r, and may be given n by whoever asks."""

    made: Made

    async def prepare(self, host: World) -> None:
        self.made = await host.tools.create(host.config("a", host.request("r", 3)))
        await host.until(lambda: host.running(self.made))
        host.config("a")  # its file does not matter any more

    async def after(self, host: World, running: Lives) -> None:
        """Nothing is by half, and nothing is held."""
        assert running.daemon is not None
        now = running.daemon.engine.snapshot()
        regions = {region.region_id for region in now.regions}
        assert regions in ({"r"}, {"r", "n"})
        frames = {gfn for one in self.wanted(host, *regions) for gfn in _frames(one)}
        assert set(host.xen.foreign_frames(self.made.domid)) == frames
        assert host.xen.by_domid[self.made.domid].pauses == 0
        assert len(host.xen.open_maps) == len(host.holders())  # each is anchored by one
        await host.tools.end(self.made)
        if "n" in regions:
            await running.apply(RemoveRegion(region_id="n", force=True))

    @staticmethod
    def wanted(host: World, *regions: str) -> list[RegionRequest]:
        each = {"r": host.request("r", 3), "n": host.borrow("n", 4, at=64)}
        return [each[region_id] for region_id in regions]


def _frames(request: RegionRequest) -> range:
    return range(request.first_gfn, request.end_gfn)


def _engine(running: Lives) -> Reconciler:
    assert running.daemon is not None
    return running.daemon.engine


async def changes(host: World, running: Lives) -> None:
    new = AddRegion(config=RegionConfig(region_id="n", nr_frames=4))
    await _engine(running).apply([new, AttachRegion(guest="a", request=host.borrow("n", 4, at=64))])


async def changes_that_are_taken_back(host: World, running: Lives) -> None:
    await changes(host, running)
    await _engine(running).apply(
        [DetachRegion(guest="a", region_id="n"), RemoveRegion(region_id="n")]
    )


async def bytes_of_a_region(host: World, running: Lives) -> None:
    await _engine(running).write_region("r", 100, b"word" * 2000)
    assert await _engine(running).read_region("r", 100, 8000) == b"word" * 2000


async def all_that_waits(host: World, running: Lives) -> None:
    engine = _engine(running)
    async with engine.monitor() as events:
        await engine.declare(host.config("b", host.request("s", 2), file=False))
        await engine.wait_guest("a", 5)
        await engine.wait_guest("b", 5)  # which never comes
        await events.receive()


async def reloads(host: World, running: Lives) -> None:
    host.finder.defined = [RegionConfig(region_id="n", nr_frames=4)]
    await _engine(running).reload()
    host.finder.defined = []
    await _engine(running).reload()


@pytest.mark.parametrize(
    "request_",
    [changes, changes_that_are_taken_back, bytes_of_a_region, all_that_waits, reloads],
    ids=lambda each: each.__name__,
)
def test_a_client_may_leave_at_every_step(request_: Request) -> None:
    guest = OneGuest()
    count = leave(request_, guest.prepare, guest.after)
    assert count >= 3
    failed = []
    for at in range(1, count + 1, STEP // 20 or 1):
        try:
            leave(request_, guest.prepare, guest.after, at)
        except Exception as error:
            failed.append(f"left before step {at}: {error!r}")
    assert failed == []
