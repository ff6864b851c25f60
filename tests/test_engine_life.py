# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reboots and ends, restarts of the daemon, a lost xenstored, and what others do to our holders."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import trio
from crash import sampled
from fakes import xenstored as xs
from fakes.toolstack import XlFailed
from fakes.world import Daemon, World, world
from trio.testing import MockClock

from xshmd.model import (
    SHUTDOWN_CRASH,
    SHUTDOWN_POWEROFF,
    SHUTDOWN_REBOOT,
    SHUTDOWN_WATCHDOG,
    Arch,
    GuestConfig,
    GuestState,
)
from xshmd.units import DomId


def states(daemon: Daemon) -> dict[str, GuestState]:
    return {guest.name: guest.state for guest in daemon.engine.snapshot().guests}


async def _refused(host: World, config: GuestConfig) -> None:
    with pytest.raises(XlFailed):
        await host.tools.create(config)


async def pair(host: World) -> tuple[GuestConfig, GuestConfig]:
    return host.config("a", host.request("r", 3)), host.config("b", host.borrow("r", 3))


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


# -- domids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_regions", [False, True])
async def test_a_domid_that_comes_again_is_a_new_guest(
    autojump_clock: MockClock, with_regions: bool
) -> None:
    async with world() as host:
        await host.start()
        regions = [host.request("old", at=32)] if with_regions else []
        first = await host.tools.create(host.config("first", *regions))
        await host.tools.end(first)
        await host.check_clean()
        host.xen.next_domid = first.domid
        config = host.config("a", host.request("r"))
        made = await host.tools.create(config)
        assert made.domid == first.domid
        assert host.missing(made.domid, config) == ""
        assert host.ran_wrongly == []


async def test_a_domid_that_comes_again_while_xenstored_is_away(
    autojump_clock: MockClock,
) -> None:
    """Nobody told us of the end; the domain of that number is another one by now."""
    async with world() as host:
        daemon = await host.start()
        first = await host.tools.create(host.config("first", host.request("r")))
        await host.tools.create(host.config("keeper"))
        host.server.stop()
        await host.tools.destroy(first)
        host.xen.next_domid = first.domid
        stranger = await host.tools.create(host.config("stranger"))
        assert stranger.domid == first.domid
        host.server.start()
        await host.until(lambda: daemon.engine.snapshot().guests == (), "the end to be seen")
        await host.until(lambda: daemon.engine.snapshot().regions == ())
        assert host.running(stranger)
        assert host.xen.foreign_frames(stranger.domid) == {}


async def test_a_reboot_into_the_same_domid(autojump_clock: MockClock) -> None:
    """Same number, same UUID: only that libxl's node went away tells it is another domain."""
    async with world() as host:
        await host.start()
        config = host.config("a", host.request("r"))
        made = await host.tools.create(config)
        host.xen.guest_write(made.domid, config.requests[0].first_gfn, 0, b"kept")
        for _ in range(3):
            host.xen.next_domid = made.domid
            again = await host.tools.reboot(made)
            assert again.domid == made.domid
            assert host.xen.guest_read(again.domid, config.requests[0].first_gfn, 0, 4) == b"kept"
            made = again
        assert host.ran_wrongly == []
        await host.tools.end(made)
        await host.check_clean()


async def test_a_domid_that_comes_again_while_nobody_looked(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(reboot_grace_s=5.0)
        first = await host.tools.create(host.config("first", host.request("old", at=32)))
        await daemon.kill()
        await host.tools.end(first)
        host.xen.next_domid = first.domid
        made = await host.tools.create(host.config("a"))
        assert made.domid == first.domid
        await host.start(reboot_grace_s=5.0)
        await trio.sleep(30)
        assert host.xen.foreign_frames(made.domid) == {}
        assert host.holders() == []
        await host.tools.end(made)
        await host.check_clean()


async def test_a_holders_domid_that_is_another_domains(autojump_clock: MockClock) -> None:
    """Never act on a remembered domid: a wrong target would hand out another VM's memory."""
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        await daemon.kill()
        await host.tools.end(a, SHUTDOWN_REBOOT)
        host.xen.destroy(holder)
        assert holder not in host.xen.by_domid
        for path in (f"/local/domain/{holder}", f"/libxl/{holder}"):
            host.server.remove(path)
        host.xen.next_domid = holder
        victim = await host.tools.create(host.config("victim"))
        assert victim.domid == holder
        daemon = await host.start()
        b = await host.tools.create(host.config("b", host.borrow("r")))
        assert host.xen.by_domid[victim.domid].targeted_by == 0
        assert host.missing(b.domid, b.config) == ""
        assert host.server.read(f"/local/domain/{victim.domid}/name") == "victim"


# -- holders --------------------------------------------------------------------------------------


async def test_a_holder_destroyed_by_somebody_else(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        one, other = await pair(host)
        a = await host.tools.create(one)
        (holder,) = host.holders()
        host.xen.guest_write(a.domid, one.requests[0].first_gfn, 0, b"mine")
        host.xen.destroy(holder)
        # Nothing tells of it: the next thing that happens does.
        with pytest.raises(XlFailed):
            await host.tools.create(other)
        await host.until(lambda: daemon.engine.snapshot().holders == ())
        assert host.xen.guest_read(a.domid, one.requests[0].first_gfn, 0, 4) == b"mine"
        assert host.running(a)
        await host.tools.end(a)
        await host.check_clean()
        a = await host.tools.create(one)
        await host.tools.end(a)
        await host.check_clean()


async def test_a_holder_destroyed_while_nobody_looked(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        await daemon.kill()
        host.xen.destroy(holder)
        daemon = await host.start()
        assert daemon.engine.snapshot().holders == ()
        assert host.running(a)
        await host.tools.end(a)
        await host.check_clean()


async def test_holders_answer_xl_shutdown(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        for _ in range(2):
            path = f"/local/domain/{holder}/control/shutdown"
            host.server.write(path, "poweroff")
            await host.until(lambda path=path: host.server.read(path) == "")  # type: ignore[misc]
            assert host.server.read(f"/libxl/{holder}/type") == "pvh"
            await daemon.kill()
            daemon = await host.start()
        info = host.xen.domain_info(holder)
        assert info is not None
        assert info.shut_down
        b = await host.tools.create(host.config("b", host.borrow("r")))
        assert host.missing(b.domid, b.config) == ""
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()


async def test_holders_are_never_unpaused_or_introduced(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        assert holder not in host.server.introduced
        assert host.xen.by_domid[holder].pauses == 1
        assert host.xen.by_domid[holder].max_pages == 0


async def test_a_strangers_holder_is_left_alone(autojump_clock: MockClock) -> None:
    """One of ours without a record: its guests may still have its memory."""
    async with world() as host:
        from xshmd.policy.identity import new_holder_uuid

        lost = host.xen.make_domain(new_holder_uuid())
        host.server.write(f"/libxl/{lost.domid}/type", "pvh")
        await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        await host.tools.end(a)
        assert host.xen.by_domid[lost.domid] is lost
        assert not lost.dying
        touched = {call.kind for call in host.xen.log if lost.domid in call.arguments[:1]}
        assert touched <= {"domain_info"}


# -- xenstored ------------------------------------------------------------------------------------


async def _share_and_end(host: World) -> None:
    one, other = await pair(host)
    a = await host.tools.create(one)
    await host.until(lambda: host.running(a))
    b = await host.tools.create(other)
    await host.until(lambda: host.running(b))
    assert host.pages(a.domid, one.requests[0]) == host.pages(b.domid, other.requests[0])
    again = await host.tools.reboot(a)
    await host.until(lambda: host.running(again))
    assert host.pages(again.domid, one.requests[0]) == host.pages(b.domid, other.requests[0])
    await host.tools.end(again)
    await host.tools.end(b)


CHANGES = (xs.WRITE, xs.RM, xs.SET_PERMS)


async def _count_requests() -> int:
    async with world() as host:
        await host.start()
        before = len(host.server.log)
        await _share_and_end(host)
        await host.check_clean()
        return len(host.server.log) - before


@pytest.mark.parametrize("how", ["drop_before", "drop_after"])
def test_a_connection_lost_at_any_message(how: str) -> None:
    """Not a guest is lost by it, nor a page or a node."""
    total = trio.run(_count_requests, clock=MockClock(autojump_threshold=0))
    assert total > 30

    async def one(nth: int) -> None:
        async with world() as host:
            await host.start()
            start = len(host.server.log)
            lost: list[xs.Request] = []

            def choose(request: xs.Request) -> bool:
                if len(host.server.log) - start == nth and not lost:
                    lost.append(request)
                    return True
                return False

            setattr(host.server.faults, how, choose)
            await _share_and_end(host)
            await host.check_clean()

    failed = []
    for nth in sampled(range(1, total + 1)):
        try:
            trio.run(one, nth, clock=MockClock(autojump_threshold=0))
        except Exception as error:
            failed.append((nth, error))
    assert failed == []


def test_an_answer_late_at_any_change() -> None:
    """xenstored stands still for longer than the deadline, once, at each message that changes."""

    async def one(nth: int) -> int:
        async with world() as host:
            await host.start()
            seen: list[xs.Request] = []

            def choose(request: xs.Request) -> bool:
                if request.op in CHANGES:
                    seen.append(request)
                return request.op in CHANGES and len(seen) == nth

            host.server.faults.silent = choose
            await _share_and_end(host)
            await host.check_clean()
            return len(seen)

    total = trio.run(one, 0, clock=MockClock(autojump_threshold=0))
    failed = []
    for nth in sampled(range(1, total + 1)):
        try:
            trio.run(one, nth, clock=MockClock(autojump_threshold=0))
        except Exception as error:
            failed.append((nth, error))
    assert failed == []


async def test_a_look_while_the_gate_writes(autojump_clock: MockClock) -> None:
    """What is in memory is in xenstore, though a record was on its way when somebody looked."""
    async with world() as host:
        daemon = await host.start()
        await host.tools.create(host.config("first", host.request("old", at=64)))

        def is_new_record(request: xs.Request) -> bool:
            return request.op == xs.WRITE and request.path.startswith("/xshmd/guests/")

        host.server.faults.silent = is_new_record
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.tools.create, host.config("a", host.request("r")))
            await trio.sleep(0.5)
            assert len(host.server.connection.held) == 1
            host.server.introduce(99)  # something happens elsewhere
            await trio.sleep(0.5)
            host.server.faults.silent = lambda request: False
            host.server.answer_held()
            await host.until(lambda: daemon.guest("a") is not None or daemon.is_attached("a"))
            for guest in daemon.engine.snapshot().guests:
                assert f"/xshmd/guests/{guest.generation}" in host.server.nodes
        assert host.ran_wrongly == []


async def test_nothing_is_mapped_while_xenstored_is_gone(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        host.server.drop()
        await trio.sleep(30)
        assert host.running(a)
        b = await host.tools.create(host.config("b", host.borrow("r")))
        await host.until(lambda: host.running(b))
        assert daemon.is_attached("b")
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()


async def test_a_doomed_guest_is_finished_after_a_restart(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(destroy_on_failure=False)
        made = await host.tools.create(host.config("b", host.borrow("nobodys")))
        await daemon.kill()
        assert host.xen.by_domid[made.domid].pauses == 1
        await host.start()
        await host.until(lambda: made.domid not in host.xen.by_domid, "its destruction")
        host.locks.finished.clear()
        await host.check_clean()


async def test_an_unreadable_record_is_left_and_reported(autojump_clock: MockClock) -> None:
    async with world() as host:
        host.server.write("/xshmd/regions/x", "nonsense")
        host.server.write("/xshmd/guests/y", '{"v":99}')
        host.tree = host.dump()
        daemon = await host.start()
        assert daemon.engine.snapshot().regions == ()
        made = await host.tools.create(host.config("a", host.request("r")))
        assert host.missing(made.domid, made.config) == ""
        await host.tools.end(made)
        await host.check_clean()


async def test_a_preserved_guest_keeps_its_memory(autojump_clock: MockClock) -> None:
    """on_reboot="rename-restart": the old domain stays, shut down, under another name."""
    async with world() as host:
        await host.start()
        config = host.config("a", host.request("r"))
        a = await host.tools.create(config)
        host.tools.shut_down(a, SHUTDOWN_REBOOT)
        host.server.write(f"/local/domain/{a.domid}/name", "a-20260101T0000Z")
        again = await host.tools.create(a.config)
        assert host.pages(again.domid, config.requests[0]) == host.pages(
            DomId(a.domid), config.requests[0]
        )
        old = dataclasses.replace(a, config=dataclasses.replace(a.config, uuid="0" * 8))
        await host.tools.destroy(again)
        await host.tools.destroy(old)
        await host.check_clean()
