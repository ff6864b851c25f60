# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killed at any step, or failed by any call: no guest has references that are not on record."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import trio
from crash import SWEEP_STEP, Lives, Scenario, sweep, sweep_twice
from fakes.toolstack import Made, XlFailed
from fakes.world import World
from faults import Body, Faults
from faults import sweep as sweep_faults
from granted import entries_of, lent, mapped, owned, readable
from test_engine_faults import STEP

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.errors import XshmError
from xshmd.machine import Arch
from xshmd.model import RegionConfig

LASTS_S = 20.0


def _step(times: int, step: int) -> int:
    """Every how manieth is played: all in the long run, here fewer than of what is older."""
    return 1 if step == 1 else times * step


async def _up(host: World, made: Made) -> None:
    await host.until(lambda: host.running(made), f"{made.config.name} running")
    assert host.missing(made.domid, made.config) == ""


async def two_guests(host: World, running: Lives) -> None:
    a = await host.tools.create(host.config("a", owned(host), host.request("p", 2, at=64)))
    await _up(host, a)
    (mine,) = mapped(host, a)
    mine.write(0, b"from a")
    b = await host.tools.create(host.config("b", readable(lent(host))))
    await _up(host, b)
    assert mapped(host, b, writable=False)[0].read(0, 6) == b"from a"
    await host.tools.end(a)
    await host.until(lambda: not entries_of(host, a), "a's references ended")
    await host.tools.end(b)


async def a_reboot(host: World, running: Lives) -> None:
    host.xen.command_line = "gnttab_max_frames=2 xsm=dummy"
    request = dataclasses.replace(owned(host), nr_frames=300)
    host.xen.command_line = "gnttab_max_frames=2 xsm=dummy"
    a = await host.tools.create(host.config("a", request))
    await _up(host, a)
    again = await host.tools.reboot(a)
    await _up(host, again)
    assert len(mapped(host, again)) == 2
    await host.until(lambda: not entries_of(host, a), "the old domain's references ended")
    await host.tools.end(again)


async def attach_and_detach(host: World, running: Lives) -> None:
    a = await host.tools.create(host.config("a", owned(host)))
    await _up(host, a)
    b = await host.tools.create(host.config("b", file=False))
    n = RegionConfig(region_id="n", nr_frames=3, terms=owned(host).terms)
    await running.apply(
        AddRegion(config=n),
        AttachRegion(guest="b", request=lent(host, "n", 3)),
        AttachRegion(guest="a", request=lent(host, "n", 3)),
        AttachRegion(
            guest="b",
            request=host.borrow("g", 5),
        ),
    )
    await _told(host, a, "n")
    await _told(host, b, "n", "g")
    assert mapped(host, a, "n")
    (view,) = mapped(host, b, "n")
    assert mapped(host, b, "g")
    await running.apply(DetachRegion(guest="b", region_id="n"))
    await host.until(lambda: not host.grants_told(b.domid, "n"))
    await running.apply(RemoveRegion(region_id="n", force=True))
    await host.until(lambda: not host.grants_told(a.domid, "n"))
    assert len(entries_of(host, b)) == 5
    view.close()
    await host.tools.end(a)
    await host.tools.end(b)


async def _told(host: World, made: Made, *region_ids: str) -> None:
    await host.until(lambda: all(host.grants_told(made.domid, one) for one in region_ids))


SCENARIOS: list[Scenario] = [two_guests, a_reboot, attach_and_detach]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_cut(scenario: Scenario) -> None:
    count, failed = sweep(scenario, step=_step(4, SWEEP_STEP))
    assert failed == []
    assert count > 3


def test_a_cut_in_the_recovery_from_a_cut() -> None:
    count, failed = sweep_twice(attach_and_detach, step=_step(24, SWEEP_STEP))
    assert failed == []
    assert count > 3


async def creations(host: World, faults: Faults) -> None:
    configs = host.config("a", owned(host)), host.config("b", lent(host))
    made: list[Made] = []
    for config in configs:
        with contextlib.suppress(XlFailed), trio.move_on_after(LASTS_S):
            made.append(await host.tools.create(config))
    faults.lift()
    await trio.sleep(LASTS_S)
    for one in made:
        assert not host.running(one) or host.missing(one.domid, one.config) == ""
        await host.tools.destroy(one)
    # What xl was not waited for to the end is there all the same.
    for info in host.xen.domains():
        name = host.server.read(f"/local/domain/{info.domid}/name")
        if name in ("a", "b"):
            left = Made(info.domid, dataclasses.replace(host.config(name), uuid=info.uuid))
            await host.tools.destroy(left)


async def changes(host: World, faults: Faults) -> None:
    faults.counting = False
    a = await host.tools.create(host.config("a", owned(host)))
    b = await host.tools.create(host.config("b"))
    await host.until(lambda: host.running(a) and host.running(b))
    faults.counting = True
    for change in (
        AttachRegion(guest="b", request=lent(host)),
        DetachRegion(guest="b", region_id="g"),
    ):
        assert faults.daemon is not None
        with contextlib.suppress(XshmError), trio.move_on_after(200):
            await faults.daemon.engine.apply([change])
        await trio.sleep(LASTS_S)
    faults.lift()
    await trio.sleep(LASTS_S)
    assert entries_of(host, b) in ([], [*range(13, 18)])
    for one in (a, b):
        await host.tools.destroy(one)


@pytest.mark.parametrize("body", [creations, changes], ids=lambda body: body.__name__)
def test_every_call_may_fail(body: Body) -> None:
    covered, failed = sweep_faults(body, arch=Arch.X86_64, step=_step(6, STEP))
    assert failed == []
    assert sum(covered.values()) > 5
