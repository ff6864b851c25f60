# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of guests and regions: ends in any order, reboots, restarts of the daemon."""

from __future__ import annotations

import itertools

import pytest
import trio
from fakes.toolstack import XlFailed
from fakes.world import Daemon, World, world
from life import pair, states
from trio.testing import MockClock

from xshmd.machine import (
    SHUTDOWN_CRASH,
    SHUTDOWN_POWEROFF,
    SHUTDOWN_REBOOT,
    SHUTDOWN_WATCHDOG,
    Arch,
)
from xshmd.model import GuestConfig, GuestState
from xshmd.units import DomId


async def _refused(host: World, config: GuestConfig) -> None:
    with pytest.raises(XlFailed):
        await host.tools.create(config)


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", list(Arch), ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
async def test_ends_in_any_order(
    autojump_clock: MockClock, order: tuple[str, ...], arch: Arch
) -> None:
    async with world(arch) as host:
        daemon = await host.start()
        configs = [*await pair(host), host.config("c", host.borrow("r", 1, offset=2))]
        made = {config.name: await host.tools.create(config) for config in configs}
        for name in order:
            assert len(daemon.engine.snapshot().regions) == 1
            await host.tools.destroy(made.pop(name))
            await trio.sleep(1)
            for left in made.values():
                assert host.missing(left.domid, left.config) == ""
        await host.check_clean()
        assert daemon.engine.snapshot().regions == ()


async def test_a_region_goes_with_its_last_member_and_others_stay(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(
            host.config("a", host.request("r", 3), host.request("s", 300, at=512))
        )
        b = await host.tools.create(host.config("b", host.borrow("r", 3)))
        (holder,) = host.holders()
        assert len(host.xen.by_domid[holder].pages) == 1 + 303
        await host.tools.end(a)
        await host.until(lambda: len(daemon.engine.snapshot().regions) == 1)
        assert len(host.xen.by_domid[holder].pages) == 1 + 3
        assert host.xen.unwiped_frees == 0
        await host.tools.end(b)
        await host.check_clean()


async def test_memory_given_back_by_a_living_holder_is_wiped(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        s = host.request("s", 3, at=64)
        a = await host.tools.create(host.config("a", host.request("r", 3), s))
        b = await host.tools.create(host.config("b", host.borrow("r", 3)))
        host.xen.guest_write(a.domid, s.first_gfn, 0, b"secret")
        await host.tools.end(a)
        await host.until(lambda: len(daemon.engine.snapshot().regions) == 1)
        assert host.xen.unwiped_frees == 0
        await host.tools.end(b)
        await host.check_clean()


# -- reboots --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [SHUTDOWN_REBOOT, SHUTDOWN_CRASH, SHUTDOWN_WATCHDOG])
async def test_a_reboot_keeps_the_contents(autojump_clock: MockClock, reason: int) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("r", 3))
        a = await host.tools.create(config)
        gfn = config.requests[0].first_gfn
        host.xen.guest_write(a.domid, gfn, 0, b"kept")
        again = await host.tools.reboot(a, reason)
        assert again.domid != a.domid
        assert host.xen.guest_read(again.domid, gfn, 0, 4) == b"kept"
        assert states(daemon) == {"a": GuestState.ATTACHED}
        await trio.sleep(100)
        assert host.missing(again.domid, config) == ""
        await host.tools.end(again)
        await host.check_clean()


async def test_a_reboot_uses_the_configuration_it_was_made_from(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        await host.start()
        config = host.config("a", host.request("r", 3))
        a = await host.tools.create(config)
        host.config("a", host.request("r", 3, at=4096))  # edited meanwhile
        await host.tools.end(a, SHUTDOWN_REBOOT)
        host.finder.files["a"] = config  # for the check at the start of its vCPUs only
        host.config("a2")
        del host.finder.files["a"]
        again = await host.tools.create(a.config)
        assert host.pages(again.domid, config.requests[0])


async def test_poweroff_frees_at_once(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        began = trio.current_time()
        await host.tools.end(a, SHUTDOWN_POWEROFF)
        await host.until(lambda: daemon.engine.snapshot().regions == ())
        assert trio.current_time() - began < 5
        await host.check_clean()


async def test_the_grace_of_a_reboot_ends(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(reboot_grace_s=20.0)
        a = await host.tools.create(host.config("a", host.request("r")))
        await host.tools.end(a, SHUTDOWN_REBOOT)
        await trio.sleep(15)
        assert states(daemon) == {"a": GuestState.REBOOTING}
        assert len(daemon.engine.snapshot().regions) == 1
        await trio.sleep(10)
        assert states(daemon) == {}
        assert host.is_clean() == ""
        host.check()


@pytest.mark.parametrize("set_forward_s", [1e9, -1e9])
async def test_setting_the_time_of_day_changes_no_grace(
    set_forward_s: float, autojump_clock: MockClock
) -> None:
    async with world() as host:
        daemon = await host.start(reboot_grace_s=20.0)
        a = await host.tools.create(host.config("a", host.request("r")))
        await host.tools.end(a, SHUTDOWN_REBOOT)
        await trio.sleep(5)
        host.clock.set_forward_s = set_forward_s
        await trio.sleep(10)
        assert states(daemon) == {"a": GuestState.REBOOTING}
        await daemon.kill()
        daemon = await host.start(reboot_grace_s=20.0)
        await trio.sleep(1)
        assert states(daemon) == {"a": GuestState.REBOOTING}
        await trio.sleep(8)
        assert host.is_clean() == ""


async def test_the_grace_goes_on_over_a_restart(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(reboot_grace_s=20.0)
        a = await host.tools.create(host.config("a", host.request("r")))
        await host.tools.end(a, SHUTDOWN_REBOOT)
        await trio.sleep(5)
        await daemon.kill()
        await trio.sleep(5)
        daemon = await host.start(reboot_grace_s=20.0)
        await trio.sleep(5)
        assert states(daemon) == {"a": GuestState.REBOOTING}
        await trio.sleep(10)
        assert host.is_clean() == ""


async def test_a_guest_that_ended_while_nobody_looked(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(reboot_grace_s=20.0)
        a = await host.tools.create(host.config("a", host.request("r")))
        await daemon.kill()
        await host.tools.end(a)
        daemon = await host.start(reboot_grace_s=20.0)
        assert states(daemon) == {"a": GuestState.REBOOTING}
        await trio.sleep(25)
        assert host.is_clean() == ""


# -- restarts -------------------------------------------------------------------------------------


async def test_restarts_while_guests_run(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        one, other = await pair(host)
        a, b = await host.tools.create(one), await host.tools.create(other)
        gfn = one.requests[0].first_gfn
        for count in range(10):
            host.xen.guest_write(a.domid, gfn, 0, bytes([count]) * 8)
            before = len(host.xen.log)
            await daemon.kill()
            assert host.xen.open_maps == set()
            daemon = await host.start()
            await trio.sleep(1)
            done = {call.kind for call in host.xen.log[before:]}
            assert done <= {
                "domains", "domain_info", "map_pages", "host_info", "populated_frames",
            }  # fmt: skip
            assert host.xen.guest_read(b.domid, gfn, 0, 8) == bytes([count]) * 8
            assert states(daemon) == {"a": GuestState.ATTACHED, "b": GuestState.ATTACHED}
        c = await host.tools.create(host.config("c", host.borrow("r", 3)))
        assert host.pages(c.domid, other.requests[0]) == host.pages(a.domid, one.requests[0])
        for made in (a, b, c):
            await host.tools.end(made)
        await host.check_clean()


async def test_guests_made_while_nobody_looked(autojump_clock: MockClock) -> None:
    """They ran: it is too late for them, and they are left alone."""
    async with world() as host:
        made = await host.tools.create(host.config("a", file=False))
        daemon = await host.start()
        assert states(daemon) == {}
        assert host.running(made)
        await host.tools.end(made)
        await host.check_clean()


async def test_a_guest_paused_at_our_start_gets_its_regions(autojump_clock: MockClock) -> None:
    async with world() as host:
        config = host.config("a", host.request("r"))
        made = await host.tools.create(config, paused=True)
        daemon = await host.start()
        await host.until(lambda: daemon.is_attached("a"))
        assert host.xen.by_domid[made.domid].pauses == 1
        host.xen.unpause(made.domid)
        assert host.ran_wrongly == []


async def test_a_pause_of_an_admin_survives(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        made = await host.tools.create(host.config("a", host.request("r")))
        host.xen.pause(made.domid)
        await daemon.kill()
        await host.start()
        await trio.sleep(5)
        assert host.xen.by_domid[made.domid].pauses == 1


async def _stall_in_the_middle(host: World, daemon: Daemon, made: list[DomId]) -> None:
    """Let a guest be created, and the daemon be killed while it makes the guest's region."""
    host.tools.at_step = lambda step, domid: made.append(domid) if step == "made" else None
    host.server.faults.silent = lambda request: request.path.startswith("/xshmd/regions")
    await host.until(lambda: bool(host.server.connection.held), "a region's record on its way")
    await daemon.kill()
    host.server.faults.silent = lambda request: False


async def test_killed_while_xl_waits_and_xl_finishes(autojump_clock: MockClock) -> None:
    """The lock falls, xl is done and has given its pause back: what is left is ours."""
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("r"))
        made: list[DomId] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.tools.create, config)
            await _stall_in_the_middle(host, daemon, made)
        assert host.xen.by_domid[made[0]].pauses == 1
        assert host.ran == []
        await host.start()
        await host.until(lambda: host.ran == [(made[0], "")], "the guest to run")


async def test_killed_and_the_domid_is_a_strangers(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        made: list[DomId] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refused, host, host.config("a", host.request("r")))
            await _stall_in_the_middle(host, daemon, made)
            host.xen.destroy(made[0])
        for path in ("/local/domain", "/libxl"):
            host.server.remove(f"{path}/{made[0]}")
        for name in host.server.nodes["/vm"].children:
            host.server.remove(f"/vm/{name}")
        host.xen.next_domid = made[0]
        stranger = await host.tools.create(host.config("stranger"), paused=True)
        assert stranger.domid == made[0]
        await host.start()
        await trio.sleep(10)
        assert host.xen.by_domid[stranger.domid].pauses == 1
        await host.tools.destroy(stranger)
        await host.check_clean()


async def test_a_directory_is_not_brought_back(autojump_clock: MockClock) -> None:
    """The guest's nodes go while a node of ours in its directory is on its way."""
    async with world() as host:
        await host.start()
        host.server.faults.silent = lambda request: request.path.startswith("/xshmd/regions")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refused, host, host.config("a", host.request("r")))
            await host.until(lambda: bool(host.server.connection.held))
            (domid,) = host.xen.by_domid.keys() - {0} - set(host.holders())
            await host.until(lambda: domid in host.server.introduced)
            for path in (f"/local/domain/{domid}", f"/libxl/{domid}"):
                host.server.remove(path)
            for name in host.server.nodes["/vm"].children:
                host.server.remove(f"/vm/{name}")
            host.server.write(f"/local/domain/{domid}/xshm", "as we would")
            host.xen.destroy(domid)
            host.server.faults.silent = lambda request: False
            host.server.answer_held()
        await host.until(lambda: f"/local/domain/{domid}/xshm" not in host.server.nodes)
        assert f"/local/domain/{domid}" not in host.server.nodes
