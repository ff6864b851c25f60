# SPDX-License-Identifier: LGPL-2.1-or-later
"""A region whose owner has gone for good is withdrawn from who borrows it, and freed."""

from __future__ import annotations

import pytest
import trio
from fakes.world import world
from hot_changes import frames, guest, span
from trio.testing import MockClock

from xshmd.events import Event, EventKind
from xshmd.machine import SHUTDOWN_REBOOT, Arch
from xshmd.model import Lifetime

# -- owner gone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_an_owner_that_is_gone_takes_its_region_along(
    autojump_clock: MockClock, arch: Arch
) -> None:
    async with world(arch) as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3, lifetime=None))
        other = host.request("other", 2, at=32)
        b = await guest(host, "b", host.borrow("r", 3), other)
        c = await guest(host, "c", host.borrow("r", 2))
        heard: list[Event] = []
        async with daemon.engine.monitor() as events:
            await host.tools.end(a)
            await host.until(lambda: len(daemon.engine.snapshot().regions) == 1, "r to be freed")
            while events.statistics().current_buffer_used:
                heard.append(events.receive_nowait())
        assert frames(host, b) == span(other)
        assert frames(host, c) == set()
        assert host.running(b)
        assert host.running(c)
        assert host.xen.unwiped_frees == 0
        assert host.server.read(f"/local/domain/{b.domid}/xshm/r") is None
        assert [(one.kind, one.guest, one.reason) for one in heard] == [
            (EventKind.PEER_LEFT, "a", "guest ended"),
            (EventKind.PEER_LEFT, "b", "owner gone"),
            (EventKind.PEER_LEFT, "c", "owner gone"),
            (EventKind.REGION_REMOVED, "a", "owner gone"),
        ]
        await host.tools.end(b)
        await host.tools.end(c)
        await host.check_clean()


async def test_an_owner_that_reboots_is_not_gone(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start(reboot_grace_s=20.0)
        a = await host.tools.create(host.config("a", host.request("r", 3, lifetime=None)))
        b = await guest(host, "b", host.borrow("r", 3))
        host.xen.guest_write(b.domid, host.borrow("r").first_gfn, 0, b"kept")
        again = await host.tools.reboot(a)
        assert host.xen.guest_read(again.domid, host.borrow("r").first_gfn, 0, 4) == b"kept"
        await host.tools.end(again, SHUTDOWN_REBOOT)
        await trio.sleep(15)
        assert frames(host, b) == span(host.borrow("r", 3))
        await trio.sleep(10)
        assert frames(host, b) == set()
        await host.tools.end(b)
        await host.check_clean()


async def test_an_owner_that_is_still_to_come_is_not_gone(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        owner = host.config("a", host.request("r", 3, lifetime=None))
        b = await host.tools.create(host.config("b", host.borrow("r", 3)))
        await trio.sleep(100)
        assert frames(host, b) == span(host.borrow("r", 3))
        await daemon.kill()
        await host.start()
        a = await host.tools.create(owner)
        host.config("b")
        await host.tools.end(a)
        await host.until(lambda: not frames(host, b), "its region to be withdrawn")
        await host.tools.end(b)
        await host.check_clean()


async def test_an_owner_that_ended_while_nobody_looked(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(reboot_grace_s=20.0)
        a = await guest(host, "a", host.request("r", 3, lifetime=None))
        b = await guest(host, "b", host.borrow("r", 3))
        await daemon.kill()
        await host.tools.end(a)
        await host.start(reboot_grace_s=20.0)
        await trio.sleep(15)
        assert frames(host, b) == span(host.borrow("r", 3))
        await trio.sleep(10)
        assert frames(host, b) == set()
        await host.tools.end(b)
        await host.check_clean()


async def test_a_region_of_its_members_outlives_its_owner(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        a = await guest(host, "a", host.request("r", 3, lifetime=Lifetime.MEMBERS))
        b = await guest(host, "b", host.borrow("r", 3))
        await host.tools.end(a)
        await trio.sleep(100)
        assert frames(host, b) == span(host.borrow("r", 3))
        await host.tools.end(b)
        await host.check_clean()
