# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any call may fail, once or for a while: guests run with all of their memory or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from functools import partial

import pytest
import trio
from fakes.toolstack import Made, XlFailed
from fakes.world import World
from faults import Body, Faults, play, sweep

from xshmd.changes import AttachRegion, Change, DetachRegion
from xshmd.errors import StoreTrouble, TimedOut, XshmError
from xshmd.machine import Arch
from xshmd.model import GuestConfig

pytestmark = pytest.mark.sweep

STEP = int(os.environ.get("XSHMD_SWEEP_STEP", "7"))
"""Every how manieth fault is played; XSHMD_SWEEP_STEP=1 plays all."""
FAULT_LASTS_S = 20.0


async def creations(host: World, faults: Faults) -> None:
    """Two guests are made, one after the other, and destroyed."""
    first = host.config("a", host.request("r", 3), host.request("s", 5, at=16))
    second = host.config("b", host.borrow("r", 2, at=64, offset=1))
    made = await _created(host, faults, first, second)
    for guest in made:
        await host.tools.destroy(guest)


async def a_reboot(host: World, faults: Faults) -> None:
    """A guest reboots while another has its region."""
    first = host.config("a", host.request("r", 3))
    second = host.config("b", host.borrow("r", 3, at=64))
    faults.counting = False
    made = [await host.tools.create(config) for config in (first, second)]
    for guest in made:
        await host.until(partial(_is_decided, host, guest))
    faults.counting = True
    for number, guest in enumerate(made):
        if guest.config.name == "a":
            await host.tools.end(guest, 1)
            again = await _created(host, faults, guest.config)
            made[number : number + 1] = again
    faults.lift()
    for guest in made:
        await host.tools.destroy(guest)


async def changes(host: World, faults: Faults) -> None:
    """A region is given to a guest that runs, and withdrawn again."""
    faults.counting = False
    owner = await host.tools.create(host.config("a", host.request("r", 3)))
    other = await host.tools.create(host.config("b"))
    await host.until(lambda: host.running(owner) and host.running(other))
    wanted = host.borrow("r", 2, at=64, offset=1)
    having = dataclasses.replace(other.config, requests=(wanted,))
    faults.counting = True
    for change in (
        AttachRegion(guest="b", request=wanted),
        DetachRegion(guest="b", region_id="r"),
    ):
        done = await _applied(faults, change)
        await trio.sleep(FAULT_LASTS_S)
        if isinstance(change, AttachRegion) and done is not None:
            assert done == (host.missing(other.domid, having) == ""), "half an attach"
    faults.lift()
    # Whatever came of it, it can be had and given back now.
    await trio.sleep(FAULT_LASTS_S)
    assert host.running(other)
    if host.missing(other.domid, having):
        assert await _applied(faults, AttachRegion(guest="b", request=wanted))
    assert await _applied(faults, DetachRegion(guest="b", region_id="r"))
    for guest in (owner, other):
        await host.tools.destroy(guest)


async def _applied(faults: Faults, change: Change) -> bool | None:
    """Return whether the change was made; None where that is left open for the moment."""
    daemon = faults.daemon
    assert daemon is not None
    try:
        with trio.fail_after(200):
            await daemon.engine.apply([change])
    except (*StoreTrouble, TimedOut):
        return None
    except XshmError:
        return False
    return True


async def a_start(host: World, faults: Faults) -> None:
    """The daemon starts, and is then asked for something."""
    await trio.sleep(FAULT_LASTS_S)
    faults.lift()
    await trio.sleep(FAULT_LASTS_S)
    for guest in await _created(host, faults, host.config("a", host.request("r", 3))):
        await host.tools.destroy(guest)


async def _created(host: World, faults: Faults, *configs: GuestConfig) -> list[Made]:
    """Return the guests that could be made; each of them runs with all that it is to have."""
    made: list[Made] = []

    async def create(config: GuestConfig) -> None:
        with contextlib.suppress(XlFailed):
            made.append(await host.tools.create(config))

    with trio.fail_after(200):
        async with trio.open_nursery() as nursery:
            for config in configs:
                nursery.start_soon(create, config)
                await trio.sleep(FAULT_LASTS_S / len(configs))
            faults.lift()
    for guest in tuple(made):
        await host.until(partial(_is_decided, host, guest), f"{guest.config.name}'s fate")
        if not host.running(guest):
            made.remove(guest)
    return made


def _is_decided(host: World, guest: Made) -> bool:
    if host.xen.by_domid.get(guest.domid) is None:
        return True
    return host.running(guest) and not host.missing(guest.domid, guest.config)


@pytest.mark.parametrize("body", [creations, a_reboot, changes], ids=lambda body: body.__name__)
def test_nothing_fails_without_faults(body: Body) -> None:
    assert play(body).seen


@pytest.mark.parametrize("arch", list(Arch), ids=str)
@pytest.mark.parametrize("body", [creations, a_reboot, changes], ids=lambda body: body.__name__)
def test_every_call_may_fail(body: Body, arch: Arch) -> None:
    covered, failed = sweep(body, arch=arch, step=STEP)
    assert failed == []
    assert sum(covered.values()) > 20


def test_every_call_of_a_start_may_fail() -> None:
    covered, failed = sweep(a_start, at_start=True, step=STEP)
    assert failed == []
    assert sum(covered.values()) > 10
