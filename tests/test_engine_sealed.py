# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sealed groups: nobody ever runs while a page could be taken, and nothing is lost in the windows.

What a member might do by itself is tried at every moment at which one runs: :func:`watched` fails
the test if then anything is in a sealed holder that could be mapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from crash import SWEEP_STEP, Lives, Scenario, sweep, sweep_twice
from fakes.machine import Call
from fakes.objects import GrantEntry
from fakes.toolstack import Made, XlFailed
from fakes.world import Daemon, World, world
from trio.testing import MockClock

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.engine.holders import ANCHOR_GFN
from xshmd.errors import Conflict, OutOfMemory, Refused
from xshmd.events import Event, EventKind
from xshmd.machine import Arch
from xshmd.model import Isolation, Lifetime, RegionConfig, RegionRequest, RegionTerms
from xshmd.policy.identity import is_holder_uuid
from xshmd.units import DomId, Gfn

SEALED = RegionTerms(isolation=Isolation.SEALED, lifetime=Lifetime.MEMBERS)
ARCHES = pytest.mark.parametrize("arch", list(Arch), ids=str)


def own(host: World, region_id: str, frames: int = 3, *, at: int = 0) -> RegionRequest:
    return dataclasses.replace(host.request(region_id, frames, at=at), terms=SEALED)


def exposed(host: World) -> list[int]:
    """Return the frames of holders that a member could map now, but for the anchor."""
    return [
        gfn
        for domain in host.xen.by_domid.values()
        if is_holder_uuid(domain.uuid) and not domain.dying
        for gfn in domain.p2m
        if gfn != ANCHOR_GFN
    ]


def members_that_run(host: World) -> list[DomId]:
    return [one.domid for one in host.xen.by_domid.values() if one.target and one.running]


def watch(host: World) -> None:
    """Fail at once if a guest with a target runs while pages are in a holder."""

    def look(call: Call) -> None:
        running = members_that_run(host)
        assert not (running and exposed(host)), (call.kind, running)

    host.xen.after = look


@asynccontextmanager
async def a_host(arch: Arch = Arch.X86_64, **options: Any) -> AsyncIterator[tuple[World, Daemon]]:
    async with world(arch) as host:
        watch(host)
        daemon = await host.start(**options)
        yield host, daemon
        await host.check_clean()
        await daemon.kill()


async def make(host: World, name: str, *requests: RegionRequest) -> Made:
    """Make a guest, whose file then does not matter any more."""
    made = await host.tools.create(host.config(name, *requests))
    await host.until(lambda: host.running(made), f"{name} running")
    assert host.missing(made.domid, made.config) == ""
    host.config(name)
    return made


def write(host: World, made: Made, request: RegionRequest, data: bytes) -> None:
    host.xen.guest_write(made.domid, request.first_gfn, 0, data)


def read(host: World, made: Made, request: RegionRequest, count: int = 6) -> bytes:
    return host.xen.guest_read(made.domid, request.first_gfn, 0, count)


# -- who has what ------------------------------------------------------------------------------


@ARCHES
async def test_late_joiners_share_what_is_there(arch: Arch, autojump_clock: MockClock) -> None:
    async with a_host(arch) as (host, daemon):
        r, borrowed = own(host, "r"), host.borrow("r", 2, at=64, offset=1)
        a = await make(host, "a", r)
        host.xen.guest_write(a.domid, r.first_gfn + 1, 8, b"from a")
        b = await make(host, "b", borrowed)
        assert host.pages(b.domid, borrowed) == host.pages(a.domid, r)[1:]
        assert host.xen.guest_read(b.domid, borrowed.first_gfn, 8, 6) == b"from a"
        (region,) = daemon.engine.snapshot().regions
        assert region.kept in host.keeper.kept()
        assert exposed(host) == []
        await host.tools.end(a)
        await host.tools.end(b)
    assert host.keeper.kept() == {}


async def test_what_dom0_copied_is_seen_by_guests_without_caches(
    autojump_clock: MockClock,
) -> None:
    async with a_host() as (host, _):
        r = own(host, "r", 5000)
        a = await make(host, "a", r)
        since = len(host.xen.log)
        b = await make(host, "b", host.borrow("r", 5000))
        calls = host.xen.log[since:]
        holder = host.holders()[0]
        flushed: set[int] = set()
        for call in calls:
            if call.kind == "flush":
                domid, first, count = cast(tuple[int, int, int], call.arguments)
                assert domid == holder
                flushed |= set(range(first, first + count))
            if call.kind == "map_foreign":
                *_, first, count = cast(tuple[int, ...], call.arguments)
                assert set(range(first, first + count)) <= flushed
        assert len(flushed) == 5000
        await host.tools.end(a)
        await host.tools.end(b)


async def test_a_fresh_region_is_zero_and_its_pages_are_no_others(
    autojump_clock: MockClock,
) -> None:
    async with a_host() as (host, _):
        r = own(host, "r", 2)
        for _ in range(2):
            a = await make(host, "a", r)
            assert read(host, a, r) == bytes(6)
            write(host, a, r, b"secret")
            await host.tools.end(a)


async def test_members_reach_their_own_regions_alone(autojump_clock: MockClock) -> None:
    async with a_host() as (host, _):
        r, s = own(host, "r"), own(host, "s", 2, at=16)
        a = await make(host, "a", r, s)
        b = await make(host, "b", host.borrow("r", 3))
        c = await make(host, "c", host.borrow("s", 2, at=16))
        holder = host.xen.by_domid[b.domid].target
        assert holder is not None
        assert host.xen.by_domid[c.domid].target is holder
        # What only a member could do, and does here by the same call: nothing is there to map.
        for gfn in range(holder.domid, 0x50000, 0x100):
            assert gfn not in holder.p2m or gfn == ANCHOR_GFN
        assert set(holder.p2m) == {ANCHOR_GFN}
        assert holder.max_pages == 0
        for made in (a, b, c):
            await host.tools.end(made)


@ARCHES
async def test_contents_outlive_the_reboot_of_all_members(
    arch: Arch, autojump_clock: MockClock
) -> None:
    async with a_host(arch) as (host, _):
        r = own(host, "r")
        config = host.config("a", r)
        a = await host.tools.create(config)
        await host.until(lambda: host.running(a))
        write(host, a, r, b"before")
        again = await host.tools.reboot(a)
        await host.until(lambda: host.running(again))
        assert read(host, again, r) == b"before"
        await host.tools.end(again)


@ARCHES
async def test_contents_outlive_the_daemon(arch: Arch, autojump_clock: MockClock) -> None:
    async with world(arch) as host:
        watch(host)
        daemon = await host.start()
        r = own(host, "r")
        a = await make(host, "a", r)
        write(host, a, r, b"before")
        await daemon.kill()
        daemon = await host.start()
        b = await make(host, "b", host.borrow("r", 3))
        assert read(host, b, host.borrow("r")) == b"before"
        assert host.pages(a.domid, r) == host.pages(b.domid, host.borrow("r"))
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()
        await daemon.kill()


async def test_a_detach_is_final(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        r = own(host, "r")
        a, b = await make(host, "a", r), await make(host, "b", host.borrow("r", 3))
        write(host, a, r, b"before")
        old = host.pages(a.domid, r)
        pin = host.xen.by_domid[b.domid].p2m[r.first_gfn].page
        pin.references += 1  # Xen keeps a page that a guest registered with it
        events: list[Event] = []
        async with daemon.engine.monitor() as channel:
            steps = await daemon.engine.apply([DetachRegion(guest="b", region_id="r")])
            assert steps[0].text.startswith("pause b's whole group, which is sealed, and unmap")
            while channel.statistics().current_buffer_used:
                events.append(channel.receive_nowait())
        assert host.xen.foreign_frames(b.domid) == {}
        new = host.pages(a.domid, r)
        assert not set(old) & set(new)
        assert read(host, a, r) == b"before"
        assert not pin.touched
        assert [one.reason for one in events if one.kind is EventKind.HOLDER_SUSPECT] == [
            "1 old pages are not free: a guest has had Xen keep them, which ends when it does"
        ]
        with host.xen._call("unpin"):
            host.xen._put(pin)
        await host.tools.end(a)
        await host.tools.end(b)


async def test_a_region_of_the_system_is_filled_before_anybody_has_it(
    autojump_clock: MockClock,
) -> None:
    async with a_host() as (host, daemon):
        terms = RegionTerms(isolation=Isolation.SEALED)
        config = RegionConfig(region_id="n", nr_frames=4, terms=terms)
        steps = await daemon.engine.apply([AddRegion(config=config)])
        assert [step.verb for step in steps] == ["create"]
        assert await daemon.engine.read_region("n", 4090, 10) == bytes(10)
        await daemon.engine.write_region("n", 4090, b"across two")
        n = host.borrow("n", 4)
        a = await make(host, "a", n)
        assert host.xen.guest_read(a.domid, n.first_gfn, 4090, 6) == b"across"
        assert host.xen.guest_read(a.domid, n.first_gfn + 1, 0, 4) == b" two"
        host.xen.guest_write(a.domid, n.first_gfn, 0, b"back")
        assert await daemon.engine.read_region("n", 0, 4) == b"back"
        await host.tools.end(a)
        await host.until(lambda: not daemon.engine.snapshot().guests)
        assert await daemon.engine.read_region("n", 0, 4) == b"back"
        await daemon.engine.apply([RemoveRegion(region_id="n")])


# -- the pause -----------------------------------------------------------------------------------


def pauses_of(events: list[Event]) -> list[Event]:
    return [event for event in events if event.kind is EventKind.GROUP_PAUSED]


async def test_the_pause_is_measured(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon), daemon.engine.monitor() as channel:
        r = own(host, "r", 4)
        a = await make(host, "a", r)

        def slow(call: Call) -> None:
            if call.kind == "populate":
                autojump_clock.jump(0.25)

        host.xen.before = slow
        b = await make(host, "b", host.borrow("r", 4))
        host.xen.before = lambda call: None
        events = []
        while channel.statistics().current_buffer_used:
            events.append(channel.receive_nowait())
        (pause,) = pauses_of(events)  # the first had nobody to wait for it
        assert pause.size_bytes == 4 * 4096
        assert 250_000 <= pause.pause_us < 400_000
        assert pause.reason == "guest created; 1 guest stood still"
        (region,) = daemon.engine.snapshot().regions
        assert region.pause_us == pause.pause_us
        await host.tools.end(a)
        await host.tools.end(b)


async def test_a_pause_that_would_be_too_long_is_given_up(autojump_clock: MockClock) -> None:
    async with a_host(pause_ceiling_s=1.0) as (host, daemon):
        r = own(host, "r", 8192 + 7)
        a = await make(host, "a", r)
        write(host, a, r, b"before")
        before = host.pages(a.domid, r)
        b = await make(host, "b")

        def slow(call: Call) -> None:
            if call.kind == "populate":
                autojump_clock.jump(0.6)

        host.xen.before = slow
        with pytest.raises(
            Refused, match=r"2 guests of its group would stand still for about 1.* s"
        ):
            await daemon.engine.apply([AttachRegion(guest="b", request=host.borrow("r"))])
        host.xen.before = lambda call: None
        assert host.pages(a.domid, r) == before
        assert read(host, a, r) == b"before"
        assert host.running(a)
        assert host.running(b)
        assert host.xen.foreign_frames(b.domid) == {}
        assert len(host.keeper.kept()) == 1
        await host.tools.end(a)
        await host.tools.end(b)


async def test_what_was_slow_once_is_refused_at_once(autojump_clock: MockClock) -> None:
    async with a_host(pause_ceiling_s=1.0) as (host, _):

        def slow(call: Call) -> None:
            if call.kind == "populate":
                autojump_clock.jump(0.5)

        host.xen.before = slow
        a = await make(host, "a", own(host, "r", 4))
        counted = host.xen.counts["pause"]
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("b", own(host, "s", 16), host.borrow("r", at=32)))
        assert host.xen.counts["pause"] <= counted + 1  # the gate's own
        host.config("b")
        await host.tools.end(a)


async def test_a_guest_that_is_paused_by_others_stays_so(autojump_clock: MockClock) -> None:
    async with a_host() as (host, _):
        a = await make(host, "a", own(host, "r"))
        for _ in range(2):
            host.xen.pause(a.domid)
        b = await make(host, "b", host.borrow("r", 3))
        assert host.xen.by_domid[a.domid].pauses == 2
        for _ in range(2):
            host.xen.unpause(a.domid)
        await host.tools.end(a)
        await host.tools.end(b)


async def test_somebody_who_unpauses_is_noticed(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await make(host, "a", own(host, "r"))
        holder, times = host.holders()[0], 1

        def meddle(call: Call) -> None:
            nonlocal times
            if call.kind == "populate" and call.arguments[0] == holder and times:
                times -= 1
                host.xen.unpause(a.domid)
                host.xen.pause(a.domid)

        async with daemon.engine.monitor() as channel:
            host.xen.after = meddle
            b = await make(host, "b", host.borrow("r", 3))
            host.xen.after = lambda call: None
            events = []
            while channel.statistics().current_buffer_used:
                events.append(channel.receive_nowait())
        assert [one.reason for one in events if one.kind is EventKind.HOLDER_SUSPECT] == [
            "guest a ran while pages were in it"
        ]
        # Whatever it could have taken is not what they have now.
        assert len(pauses_of(events)) == 2
        assert host.pages(a.domid, own(host, "r")) == host.pages(b.domid, host.borrow("r"))
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()
        await daemon.kill()


async def test_what_a_member_put_into_the_grant_table_is_gone(autojump_clock: MockClock) -> None:
    async with a_host() as (host, _):
        a = await make(host, "a", own(host, "r"))
        holder = host.xen.by_domid[a.domid].target
        assert holder is not None
        holder.grants[9] = GrantEntry(valid=True, domid=77, gfn=0x40200)

        def look(call: Call) -> None:
            if call.kind == "populate" and call.arguments[0] == holder.domid:
                assert not any(entry.valid for entry in holder.grants.values())

        host.xen.before = look
        b = await make(host, "b", host.borrow("r", 3))
        host.xen.before = lambda call: None
        await host.tools.end(a)
        await host.tools.end(b)


@pytest.mark.parametrize("terms", [SEALED, RegionTerms(lifetime=Lifetime.MEMBERS)], ids=str)
async def test_what_a_member_takes_out_is_told_once(
    terms: RegionTerms, autojump_clock: MockClock
) -> None:
    async with world() as host:
        daemon = await host.start()
        r = dataclasses.replace(host.request("r", 4), terms=terms)
        a = await make(host, "a", r)
        holder = host.holders()[0]
        (region,) = daemon.engine.snapshot().regions
        async with daemon.engine.monitor() as channel:
            host.xen.depopulate(holder, ANCHOR_GFN, 1)
            host.xen.depopulate(holder, Gfn(region.holder_first_gfn + 3), 1)
            for _ in range(2):
                other = await make(host, "other")
                await host.tools.end(other)
            said = []
            while channel.statistics().current_buffer_used:
                event = channel.receive_nowait()
                said += [event.reason] if event.kind is EventKind.HOLDER_SUSPECT else []
        taken = "was taken out of it: whoever has it keeps it"
        if terms is SEALED:
            assert said == [f"its anchor {taken}"]
        else:
            assert said == [f"its anchor {taken}", f"memory of region r {taken}"]
        await host.tools.end(a)
        await host.check_clean()
        await daemon.kill()


async def test_who_takes_the_anchor_of_a_sealed_group_takes_nothing_else(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        watch(host)
        daemon = await host.start()
        r = own(host, "r")
        a = await make(host, "a", r)
        write(host, a, r, b"before")
        host.xen.depopulate(host.holders()[0], ANCHOR_GFN, 1)
        await daemon.kill()
        daemon = await host.start()
        b = await make(host, "b", host.borrow("r", 3))
        assert read(host, b, host.borrow("r")) == b"before"
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()
        await daemon.kill()


async def test_nobody_who_may_map_runs_for_want_of_being_ours(autojump_clock: MockClock) -> None:
    """A guest that was refused after it had its target, kept to be looked at, and let run."""
    async with world() as host:
        daemon = await host.start(destroy_on_failure=False)
        a = await make(host, "a", own(host, "r"))
        host.xen.fail("map_foreign", 12)
        b = await host.tools.create(host.config("b", host.borrow("r", 3)))
        await host.until(lambda: daemon.guest("b") is not None)
        await host.until(lambda: getattr(daemon.guest("b"), "failure", "") != "")
        host.config("b")
        assert host.xen.by_domid[b.domid].target is not None
        while host.xen.by_domid[b.domid].pauses:
            host.xen.unpause(b.domid)
        before = host.pages(a.domid, own(host, "r"))
        late = await host.tools.create(host.config("late", host.borrow("r", 3)))
        await host.until(lambda: "late" in daemon.engine._passage.failures)
        assert "guest b runs" in daemon.engine._passage.failures["late"].message
        assert host.pages(a.domid, own(host, "r")) == before
        host.config("late")
        for made in (b, late, a):
            await host.tools.end(made)
        await host.check_clean()
        await daemon.kill()


# -- refusals --------------------------------------------------------------------------------------


async def test_sealed_and_open_regions_are_not_mixed(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        a = await make(host, "a", own(host, "r"))
        with pytest.raises(XlFailed):
            await host.tools.create(
                host.config("b", host.borrow("r", 3), host.request("open", 2, at=16))
            )
        host.config("b")
        open_one = AddRegion(config=RegionConfig(region_id="o", nr_frames=2))
        attach = AttachRegion(guest="a", request=host.borrow("o", 2, at=32))
        with pytest.raises(Conflict, match="r, which is sealed, and o, which is not"):
            await daemon.engine.apply([open_one, attach])
        await host.tools.end(a)


async def test_without_a_keeper_nothing_is_sealed(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        host.keeper.runs = False
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("a", own(host, "r")))
        refused = await _failure(daemon, "a")
        assert "xshmd-keeper does not run" in refused
        host.config("a")
        host.keeper.runs = True


async def _failure(daemon: Daemon, name: str) -> str:
    with pytest.raises(Conflict) as caught:
        await daemon.engine.wait_guest(name, 1.0)
    return caught.value.one_line()


async def test_a_keeper_that_was_ended_takes_joining_with_it(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        r = own(host, "r")
        a = await make(host, "a", r)
        write(host, a, r, b"before")
        host.keeper.end()
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("b", host.borrow("r", 3)))
        assert "cannot be reached any more" in await _failure(daemon, "b")
        host.config("b")
        assert read(host, a, r) == b"before"
        await daemon.engine.apply([DetachRegion(guest="a", region_id="r")])
        assert host.xen.foreign_frames(a.domid) == {}
        await host.tools.end(a)
        host.xen.unwiped_frees = 0  # nobody could reach them to wipe them


async def test_too_little_memory_for_both(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        r = own(host, "r", 4)
        a, b = await make(host, "a", r), await make(host, "b")
        hog = host.xen.make_domain("00000000-0000-4000-8000-000000000009")
        host.xen.set_max_pages(hog.domid, 1 << 20)
        host.xen.populate(hog.domid, Gfn(0), host.xen.free_pages - 4098)
        with pytest.raises(OutOfMemory, match="for a moment twice"):
            await daemon.engine.apply([AttachRegion(guest="b", request=host.borrow("r"))])
        host.xen.destroy(hog.domid)
        await host.tools.end(a)
        await host.tools.end(b)


# -- cut off anywhere ----------------------------------------------------------------------------


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
    count, failed = sweep(scenario, arch=arch, step=14 * SWEEP_STEP)
    assert failed == []
    assert count > 5


def test_the_pauses_of_others_outlive_every_cut() -> None:
    count, failed = sweep(a_paused_guest, step=150 * SWEEP_STEP)
    assert failed == []
    assert count > 3


def test_a_cut_in_the_recovery_from_a_cut() -> None:
    count, failed = sweep_twice(join_detach_reboot, step=70 * SWEEP_STEP)
    assert failed == []
    assert count > 3
