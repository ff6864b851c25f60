# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killed at any step, or failed by any call: dom0's memory is lent to who is to have it alone."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import trio
from crash import SWEEP_STEP, Lives, Scenario, sweep
from fakes.toolstack import Made, XlFailed
from fakes.world import World
from faults import Faults
from faults import sweep as sweep_faults
from test_engine_faults import STEP
from test_engine_grants_cut import LASTS_S, _step, _told, _up
from test_engine_lent import FRAMES, TERMS, defined, mapped, wanted

from xshmd.changes import AttachRegion, DetachRegion, RemoveRegion
from xshmd.machine import Arch
from xshmd.model import Lifetime, RegionRequest
from xshmd.units import DomId


def owned(host: World) -> RegionRequest:
    terms = dataclasses.replace(TERMS, lifetime=Lifetime.MEMBERS)
    return dataclasses.replace(host.request("l", FRAMES), terms=terms)


def lent_to(host: World) -> set[int]:
    """The domains that can map something of dom0's."""
    return {entry.domid for entry in host.xen.by_domid[DomId(0)].grants.values()}


async def a_reboot(host: World, running: Lives) -> None:
    a = await host.tools.create(host.config("a", owned(host)))
    await _up(host, a)
    mapped(host, a).write(5, b"stays")
    again = await host.tools.reboot(a)
    await _up(host, again)
    assert mapped(host, again).read(5, 5) == b"stays"
    assert lent_to(host) == {again.domid}
    await host.tools.end(again)


async def attach_and_detach(host: World, running: Lives) -> None:
    await running.apply(defined())
    a = await host.tools.create(host.config("a", file=False))
    for text in (b"first", b"again"):
        await running.apply(AttachRegion(guest="a", request=wanted(host)))
        await _told(host, a, "l")
        view = mapped(host, a)
        assert text == b"first" or view.read(0, 5) == b"first"
        view.write(0, text)
        await running.apply(DetachRegion(guest="a", region_id="l"))
        await host.until(lambda: not host.grants_told(a.domid, "l"))
        view.close()
        await host.until(lambda: not lent_to(host), "nothing is lent")
    await running.apply(RemoveRegion(region_id="l"))
    await host.tools.end(a)


@pytest.mark.parametrize("scenario", [a_reboot, attach_and_detach], ids=lambda one: one.__name__)
def test_every_cut(scenario: Scenario) -> None:
    count, failed = sweep(scenario, step=_step(5, SWEEP_STEP))
    assert failed == []
    assert count > 3


async def a_creation(host: World, faults: Faults) -> None:
    config = host.config("a", owned(host))
    with contextlib.suppress(XlFailed), trio.move_on_after(LASTS_S):
        await host.tools.create(config)
    faults.lift()
    await trio.sleep(LASTS_S)
    for info in host.xen.domains():
        if host.server.read(f"/local/domain/{info.domid}/name") == "a":
            made = Made(info.domid, dataclasses.replace(config, uuid=info.uuid))
            assert not host.running(made) or host.missing(made.domid, made.config) == ""
            await host.tools.destroy(made)


def test_every_call_may_fail() -> None:
    covered, failed = sweep_faults(a_creation, arch=Arch.ARM64, step=_step(3, STEP))
    assert failed == []
    assert sum(covered.values()) > 5
