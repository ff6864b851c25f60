# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes to guests that run: attach, detach, late join, add, remove; whole or not at all."""

from __future__ import annotations

import dataclasses
import errno

import pytest
import trio
from fakes.machine import Call
from fakes.world import world
from hot_changes import add, attach, detach, fill, frames, guest, picture, remove, span
from trio.testing import MockClock

from xshmd.changes import Change
from xshmd.errors import (
    ConfigError,
    Conflict,
    NoSuchGuest,
    NoSuchRegion,
    OutOfMemory,
    Refused,
    XshmError,
)
from xshmd.machine import SHUTDOWN_REBOOT, Arch
from xshmd.model import UNPLACED, WHOLE_REGION, GuestState, Lifetime, RegionConfig
from xshmd.units import DomId, Gfn

# -- attach and detach ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_a_region_is_attached_to_a_running_guest(
    autojump_clock: MockClock, arch: Arch
) -> None:
    async with world(arch) as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        b = await guest(host, "b", host.request("s", 2), host.borrow("r", 1, at=64))
        gfn = host.request("r").first_gfn
        host.xen.guest_write(a.domid, gfn, 0, b"before")
        more = host.borrow("s", 2, at=32)
        steps = await daemon.engine.apply([attach("a", more)])
        assert [(one.verb, one.region, one.guest) for one in steps] == [("attach", "s", "a")]
        assert host.pages(a.domid, more) == host.pages(b.domid, host.request("s", 2))
        assert host.xen.guest_read(a.domid, gfn, 0, 6) == b"before"
        assert host.running(a)
        record = daemon.guest("a")
        assert record is not None
        assert [one.region_id for one in record.requests] == ["r", "s"]
        node = host.server.read(f"/local/domain/{a.domid}/xshm/s")
        assert node is not None
        assert f"begin={more.first_gfn << 12:#x}" in node
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_a_region_is_detached_from_a_running_guest(
    autojump_clock: MockClock, arch: Arch
) -> None:
    async with world(arch) as host:
        daemon = await host.start()
        keep = host.request("s", 2, at=32)
        a = await guest(host, "a", host.request("r", 3), keep)
        b = await guest(host, "b", host.borrow("r", 3))
        await daemon.engine.apply([detach(a.domid, "r")])
        assert frames(host, a) == span(keep)
        assert frames(host, b) == span(host.request("r", 3))
        assert host.running(a)
        assert host.server.read(f"/local/domain/{a.domid}/xshm/r") is None
        assert host.server.read(f"/local/domain/{a.domid}/xshm/s") is not None
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()


async def test_the_last_region_of_a_guest_leaves_its_holder(autojump_clock: MockClock) -> None:
    """Its target cannot change, so it goes on being ours, and may be given another region."""
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        (holder,) = host.holders()
        await daemon.engine.apply([detach("a", "r")])
        await host.until(lambda: daemon.engine.snapshot().regions == (), "the region to be freed")
        assert host.holders() == [holder]
        again = host.request("n", 4, at=8)
        await daemon.engine.apply([attach("a", again)])
        assert host.holders() == [holder]
        assert frames(host, a) == span(again)
        await host.tools.end(a)
        await host.check_clean()


async def test_the_guest_is_paused_exactly_while_its_memory_changes(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        b = await guest(host, "b", host.borrow("r", 3))
        before = len(host.xen.log)

        def watch(call: object) -> None:
            kind, arguments = call.kind, call.arguments  # type: ignore[attr-defined]
            if kind in ("map_foreign", "unmap") and arguments[0] == a.domid:
                assert host.xen.by_domid[a.domid].pauses == 1

        host.xen.before = watch
        await daemon.engine.apply([add("n", 2), attach("a", host.borrow("n", 2, at=64))])
        await daemon.engine.apply([detach("a", "n"), remove("n")])
        touched = [
            (call.kind, call.arguments[0])
            for call in host.xen.log[before:]
            if call.kind in ("pause", "unpause")
        ]
        assert touched == [("pause", a.domid), ("unpause", a.domid)] * 2
        assert host.running(a)
        assert host.running(b)


@pytest.mark.parametrize("others", [1, 3])
async def test_pauses_of_others_stay(autojump_clock: MockClock, others: int) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        for _ in range(others):
            host.xen.pause(a.domid)
        await daemon.engine.apply([add("n", 2), attach("a", host.borrow("n", 2, at=64))])
        await daemon.engine.apply([detach("a", "n")])
        assert host.xen.by_domid[a.domid].pauses == others


async def test_a_guest_may_be_given_a_region_at_another_frame(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        host.xen.guest_write(a.domid, host.request("r").first_gfn, 0, b"same")
        moved = host.request("r", 3, at=64)
        await daemon.engine.apply([detach("a", "r"), attach("a", moved)])
        assert frames(host, a) == span(moved)
        assert host.xen.guest_read(a.domid, moved.first_gfn, 0, 4) == b"same"
        assert f"{moved.first_gfn << 12:#x}" in (
            host.server.read(f"/local/domain/{a.domid}/xshm/r") or ""
        )


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_coming_and_going_costs_no_memory(autojump_clock: MockClock, arch: Arch) -> None:
    """Xen keeps the tables of a region that went, so the guest's paging pool need not grow."""
    async with world(arch) as host:
        daemon = await host.start()
        r = host.request("r", 600)
        a = await guest(host, "a", r)
        b = await guest(host, "b", host.borrow("r", 600))
        n = host.borrow("n", 600, at=4096)
        await daemon.engine.apply([add("n", 600)])
        free = []
        for _ in range(4):
            await daemon.engine.apply([attach("a", n), detach("a", "r")])
            await daemon.engine.apply([attach("a", r), detach("a", "n")])
            free.append(host.xen.free_pages)
        assert len(set(free)) == 1
        assert frames(host, a) == frames(host, b) == span(r)


async def test_what_was_attached_comes_back_with_a_reboot(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3), host.request("gone", 2, at=16))
        more = host.borrow("n", 2, at=64)
        await daemon.engine.apply([add("n", 2), attach("a", more), detach("a", "gone")])
        again = await host.tools.reboot(a, SHUTDOWN_REBOOT)
        assert frames(host, again) == span(host.request("r", 3)) | span(more)


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_the_frame_and_the_size_may_be_left_to_us(
    autojump_clock: MockClock, arch: Arch
) -> None:
    async with world(arch) as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        wanted = dataclasses.replace(host.borrow("n"), first_gfn=UNPLACED, nr_frames=WHOLE_REGION)
        await daemon.engine.apply([add("n", 5), attach("a", wanted)])
        record = daemon.guest("a")
        assert record is not None
        given = record.requests[1]
        assert given.nr_frames == 5
        assert frames(host, a) == span(host.request("r", 3)) | span(given)


# -- late join ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", list(Arch), ids=str)
@pytest.mark.parametrize("by_number", [False, True])
async def test_a_guest_without_regions_joins_late(
    autojump_clock: MockClock, arch: Arch, by_number: bool
) -> None:
    async with world(arch) as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        late = await guest(host, "late")
        host.xen.guest_write(a.domid, host.request("r").first_gfn, 0, b"data")
        wanted = host.borrow("r", 2, at=64)
        await daemon.engine.apply([attach(late.domid if by_number else "late", wanted)])
        assert host.xen.guest_read(late.domid, wanted.first_gfn, 0, 4) == b"data"
        record = daemon.guest("late")
        assert record is not None
        assert record.state is GuestState.ATTACHED
        assert host.server.read(f"/local/domain/{late.domid}/xshm") == record.generation
        assert host.xen.by_domid[late.domid].target is not None
        assert host.running(late)
        await host.tools.end(a)
        assert frames(host, late) == span(wanted)
        await host.tools.end(late)
        await host.check_clean()


async def test_two_late_guests_and_a_new_region_in_one_set(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        one, two = await guest(host, "one"), await guest(host, "two")
        wanted = host.borrow("n", 3)
        steps = await daemon.engine.apply(
            [attach("two", wanted), add("n", 3), attach("one", wanted)]
        )
        assert [step.verb for step in steps] == ["create", "attach", "attach"]
        assert host.pages(one.domid, wanted) == host.pages(two.domid, wanted)
        assert len(host.holders()) == 1
        await host.tools.end(one)
        await host.tools.end(two)
        await trio.sleep(60)
        assert [region.region_id for region in daemon.engine.snapshot().regions] == ["n"]
        await daemon.engine.apply([remove("n")])
        await host.check_clean()


async def test_an_owner_may_join_late(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a")
        await daemon.engine.apply([attach("a", host.request("r", 3, lifetime=None))])
        (region,) = daemon.engine.snapshot().regions
        assert (region.owner, region.lifetime) == ("a", Lifetime.OWNER)
        await host.tools.end(a)
        await host.check_clean()


async def test_a_domid_that_is_another_domains_by_now(autojump_clock: MockClock) -> None:
    """The guest ends between the plan and the pause: its number is a stranger's."""
    async with world() as host:
        daemon = await host.start()
        await guest(host, "a", host.request("r", 3))
        late = await guest(host, "late")
        strangers: list[DomId] = []
        real = host.xen.domain_info

        def domain_info(domid: DomId) -> object:
            if domid == late.domid and not strangers:
                strangers.append(domid)
                host.xen.destroy(late.domid)
                host.xen.next_domid = domid
                host.xen.make_domain("55555555-0000-4000-8000-000000000000")
            return real(domid)

        host.xen.domain_info = domain_info  # type: ignore[method-assign,assignment]
        with pytest.raises(XshmError, match="ended"):
            await daemon.engine.apply([attach("late", host.borrow("r", 3))])
        stranger = host.xen.by_domid[late.domid]
        assert (stranger.target, stranger.pauses, stranger.p2m) == (None, 1, {})


# -- refusals, as a whole -------------------------------------------------------------------------


async def test_what_is_refused(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        await guest(host, "a", host.request("r", 3), host.request("only", 1, at=16))
        await guest(host, "b", host.request("s", 3))
        await guest(host, "plain")
        (h1, _) = host.holders()
        free = host.borrow("n", 3, at=64)
        cases: list[tuple[list[Change], type[XshmError], str]] = [
            ([attach("nobody", free), add("n")], NoSuchGuest, "no guest nobody"),
            ([attach(0, free), add("n")], Refused, "dom0"),
            ([attach(h1, free), add("n")], Refused, "holder"),
            ([attach("a", free)], ConfigError, "nobody defines"),
            ([attach("a", host.borrow("s", 3, at=64))], Conflict, "another share group"),
            ([attach("plain", host.borrow("s", 3)), attach("plain", host.borrow("r", 3, at=64))],
             Conflict, "two share groups"),
            ([attach("a", host.borrow("r", 3, at=64))], Conflict, "already"),
            ([attach("plain", host.borrow("r", 4))], ConfigError, "ends at"),
            ([attach("plain", dataclasses.replace(free, first_gfn=Gfn(0))),
              add("n")], ConfigError, "RAM"),
            ([add("n", 1 << 30)], OutOfMemory, "free"),
            ([add("r")], Conflict, "exists already"),
            ([add("n"), add("n")], Conflict, "twice"),
            ([add("n", lifetime=Lifetime.MEMBERS)], ConfigError, "freed at once"),
            ([add("n", lifetime=Lifetime.OWNER)], ConfigError, "no owner"),
            ([detach("a", "s")], NoSuchRegion, "has no region s"),
            ([detach("plain", "s")], NoSuchRegion, "has no region s"),
            ([remove("nothing")], NoSuchRegion, "no region nothing"),
            ([remove("r")], Conflict, "has members: a"),
            ([remove("r", force=True), attach("plain", host.borrow("r", 3))], Conflict, "two sets"),
        ]  # fmt: skip
        fine: list[Change] = [add("fine"), attach("b", host.borrow("fine", 3, at=640))]
        alone_or_not: list[list[Change]] = [[], fine]
        before = picture(host)
        for changes, kind, words in cases:
            for more in alone_or_not:
                for dry_run in (True, False):
                    with pytest.raises(kind) as caught:
                        await daemon.engine.apply([*more, *changes], dry_run=dry_run)
                    assert words in caught.value.one_line()
                    assert caught.value.hint or caught.value.parts
                    assert picture(host) == before


async def test_every_broken_rule_is_said_at_once(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        with pytest.raises(NoSuchGuest) as caught:
            await daemon.engine.apply([attach("x", host.borrow("n")), remove("y")])
        assert "there is no region y" in caught.value.message


async def test_a_failure_in_the_middle_undoes_all(autojump_clock: MockClock) -> None:
    """The second guest's map fails: the first has nothing of it either, nor is the region there."""
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        b = await guest(host, "b", host.borrow("r", 3))
        late = await guest(host, "late")
        before = picture(host)
        wanted = host.borrow("n", 2, at=64)
        host.xen.fail("map_foreign", errno.ENOMEM, nth=3)
        with pytest.raises(XshmError):
            await daemon.engine.apply(
                [add("n", 2), *(attach(name, wanted) for name in ("a", "b", "late"))]
            )
        assert host.running(a)
        assert host.running(b)
        assert host.running(late)
        # The guest that was to join has its target now: it stays with this holder.
        record = daemon.guest("late")
        assert record is not None
        assert record.requests == ()
        host.xen.fail("map_foreign", errno.ENOMEM, nth=2)
        with pytest.raises(XshmError):
            await daemon.engine.apply([add("n", 2), attach("a", wanted), attach("b", wanted)])
        assert [one.region_id for one in daemon.engine.snapshot().regions] == ["r"]
        assert frames(host, a) == frames(host, b) == span(host.request("r", 3))
        assert before != picture(host)  # the paging pools have grown
        await host.tools.end(late)
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()


async def test_nothing_is_mapped_over_what_is_there(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        late = await guest(host, "late")
        wanted = host.borrow("n", 4, at=64)
        host.xen.set_max_pages(late.domid, 1 << 16)
        host.xen.populate(late.domid, wanted.first_gfn, 1)
        with pytest.raises(Refused, match="has already"):
            await daemon.engine.apply([add("n", 4), attach("late", wanted)])
        assert host.xen.by_domid[late.domid].p2m[wanted.first_gfn].foreign is False
        assert host.xen.by_domid[late.domid].target is None
        assert daemon.guest("late") is None
        await host.tools.end(late)
        await host.check_clean()


async def test_a_dry_run_says_the_same_and_does_nothing(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        await guest(host, "a", host.request("r", 3), host.request("s", 3, at=16))
        await guest(host, "late")
        changes: list[Change] = [
            add("n"), attach("late", host.borrow("n")), attach("late", host.borrow("r", 3, at=64)),
            detach("a", "s"), remove("s"),
        ]  # fmt: skip
        before = picture(host)
        steps = await daemon.engine.apply(changes, dry_run=True)
        assert picture(host) == before
        assert await daemon.engine.apply(changes) == steps
        assert [step.verb for step in steps] == ["create", "attach", "attach", "detach", "remove"]
        assert steps[1].text == "pause late and map 12 KiB of n at 0x1000000000"


# -- removal --------------------------------------------------------------------------------------


async def test_a_region_is_removed_from_all_its_members(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3), host.request("s", 3, at=16))
        b = await guest(host, "b", host.borrow("r", 3))
        c = await guest(host, "c", host.borrow("r", 3))
        host.tools.shut_down(c, SHUTDOWN_REBOOT)
        await trio.sleep(1)
        await host.tools.destroy(c)
        await host.until(lambda: getattr(daemon.guest("c"), "state", None) is GuestState.REBOOTING)
        steps = await daemon.engine.apply([remove("r", force=True)])
        assert [step.verb for step in steps] == ["detach"] * 3 + ["remove"]
        assert frames(host, a) == span(host.request("s", 3, at=16))
        assert frames(host, b) == set()
        assert host.xen.unwiped_frees == 0
        again = await host.tools.create(c.config)
        assert frames(host, again) == set()
        for made in (a, b, again):
            await host.tools.end(made)
        await host.check_clean()


async def test_a_guest_that_ends_while_its_region_is_removed(autojump_clock: MockClock) -> None:
    """It is about to reboot: it comes back, and does not ask for what is no more."""
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3), host.request("s", 2, at=16))
        host.tools.shut_down(a, SHUTDOWN_REBOOT)
        await trio.sleep(1)

        def end_it(call: Call) -> None:
            if call.kind == "pause" and call.arguments == (a.domid,):
                host.xen.before = lambda call: None
                host.xen.destroy(a.domid)

        host.xen.before = end_it
        await daemon.engine.apply([remove("r", force=True)])
        await host.until(lambda: getattr(daemon.guest("a"), "state", None) is GuestState.REBOOTING)
        for path in (f"/local/domain/{a.domid}", f"/libxl/{a.domid}"):
            host.server.remove(path)
        again = await host.tools.create(a.config)
        assert frames(host, again) == span(host.request("s", 2, at=16))


async def test_a_systems_region_outlives_everybody(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        host.finder.defined.append(RegionConfig(region_id="n", nr_frames=4))
        a = await guest(host, "a", host.borrow("n", 3))
        host.xen.guest_write(a.domid, host.borrow("n").first_gfn, 0, b"kept")
        await host.tools.end(a)
        await trio.sleep(100)
        await daemon.kill()
        daemon = await host.start()
        b = await guest(host, "b", host.borrow("n", 2))
        assert host.xen.guest_read(b.domid, host.borrow("n").first_gfn, 0, 4) == b"kept"
        await host.tools.end(b)
        await host.until(lambda: daemon.engine.snapshot().guests == ())
        await daemon.engine.apply([remove("n")])
        await host.check_clean()


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_a_region_that_nobody_has_goes_where_it_is_wanted(
    autojump_clock: MockClock, arch: Arch
) -> None:
    """Each was made for itself, in a holder of its own; a guest has one holder for all of them."""
    async with world(arch) as host:
        daemon = await host.start()
        for region_id in ("x", "y", "z"):
            await daemon.engine.apply([add(region_id, 3)])
            await fill(daemon, region_id, region_id.encode())
        assert len(host.holders()) == 3
        x, y, z = (host.borrow(one, 3, at=at) for one, at in (("x", 0), ("y", 16), ("z", 32)))
        a = await guest(host, "a", y, x)
        assert host.xen.guest_read(a.domid, x.first_gfn + 1, 0, 1) == b"x"
        assert host.xen.guest_read(a.domid, y.first_gfn + 1, 0, 1) == b"y"
        moved, _ = await daemon.engine.apply([attach("a", z)])
        assert "move the 12 KiB of z, which nobody has, to holder" in moved.text
        assert host.xen.guest_read(a.domid, z.first_gfn + 1, 0, 1) == b"z"
        assert host.xen.unwiped_frees == 0
        await host.until(lambda: len(host.holders()) == 1, "the empty holders to go")
        assert [one.region_id for one in daemon.engine.snapshot().regions] == ["x", "y", "z"]
        await host.tools.end(a)
        await host.until(lambda: daemon.engine.snapshot().guests == ())
        await daemon.engine.apply([remove("x"), remove("y"), remove("z")])
        await host.check_clean()
