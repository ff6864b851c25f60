# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sealed groups: members have what is theirs, nobody else does, and nothing of it is ever lost."""

from __future__ import annotations

from typing import cast

from fakes.world import world
from sealed import ARCHES, a_host, exposed, make, own, read, watch, write
from trio.testing import MockClock

from xshmd.changes import AddRegion, DetachRegion, RemoveRegion
from xshmd.engine.holders import ANCHOR_GFN
from xshmd.events import Event, EventKind
from xshmd.machine import Arch
from xshmd.model import Isolation, RegionConfig, RegionTerms


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
