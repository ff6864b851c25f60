# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists and transfers between guests that have different parts of one region, on the whole engine.

A region of 40 frames: ``a`` has the first ten, ``b`` the next ten, and neither sees the other's.
"""

from __future__ import annotations

import dataclasses

import pytest
import trio
from fakes.world import world
from fuzz.targets import CORPUS
from scatter_host import IN, OUT, PART, hosted, one
from scatter_words import START, Toy, bytes_of_part
from trio.testing import MockClock
from varlink_fakes import FakeRegions, NoCopier

from xshmd.changes import AttachRegion, DetachRegion, RemoveRegion
from xshmd.daemon.list_methods import ListMethods
from xshmd.errors import (
    Conflict,
    HypercallFailed,
    ListCancelled,
    NoSuchGuest,
    NoSuchList,
    NoSuchRegion,
    OutOfRange,
    QuotaExceeded,
    Refused,
    TimedOut,
    UsageError,
)
from xshmd.machine import SHUTDOWN_REBOOT
from xshmd.model import Backing, Isolation, Prot, ProtEnforcement, RegionTerms, Snapshot
from xshmd.ranges import ByteRange, Part
from xshmd.share import lists
from xshmd.share.mediator import Mediator
from xshmd.share.scatter import Scatter
from xshmd.units import PAGE_SIZE, DomId, bytes_of


async def test_a_peer_fills_a_list(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        scatter = host.scatter
        into = [ByteRange(PAGE_SIZE - 3, 6), ByteRange(0, 5)]
        posted = scatter.register("r", "b", IN, into)
        host.write("a", 100, b"from a to b")
        assert await scatter.transfer("r", "a", "b", OUT, one(100, 11)) == 11
        assert host.read("b", PAGE_SIZE - 4, 9) == b"\0from a\0\0"
        assert host.read("b", 0, 6) == b" to b\0"
        assert await scatter.wait(posted, 0) == 11
        assert scatter.lists() == ()
        scatter.unregister(scatter.register("r", "b", IN, into))
        scatter.register("r", "b", IN, into)
        methods = ListMethods(scatter, Mediator(scatter, host.daemon.engine))
        assert methods.counters() == {
            "request_pages": 0, "lists_waiting": 1, "lists_posted": 3, "lists_done": 1,
            "lists_cancelled": 1, "transfers": 1, "bytes_moved": 11,
        }  # fmt: skip


async def test_a_peer_fetches_a_list(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        scatter = host.scatter
        host.write("b", 7, b"what b put up")
        posted = scatter.register("r", "b", OUT, one(7, 13))
        moved = await scatter.transfer("r", "a", "b", IN, [ByteRange(0, 6), ByteRange(9, 7)])
        assert moved == 13
        assert host.read("a", 0, 16) == b"what b\0\0\0 put up"
        assert await scatter.wait(posted, 0) == 13


@pytest.mark.parametrize(("room", "offered"), [(4, 9), (9, 4)])
async def test_the_shorter_decides_and_the_list_is_done(
    autojump_clock: MockClock, room: int, offered: int
) -> None:
    async with hosted() as host:
        scatter = host.scatter
        host.write("a", 0, b"123456789")
        posted = scatter.register("r", "b", IN, one(0, room))
        assert await scatter.transfer("r", "a", "b", OUT, one(0, offered)) == 4
        assert host.read("b", 0, 5) == b"1234\0"
        assert await scatter.wait(posted, 0) == 4
        with pytest.raises(NoSuchList):
            await scatter.transfer("r", "a", "b", OUT, one(0, 1))


async def test_who_waits_is_woken(autojump_clock: MockClock) -> None:
    async with hosted() as host, trio.open_nursery() as nursery:
        posted = host.scatter.register("r", "b", IN, one(0, 8))
        seen: list[int] = []

        async def wait() -> None:
            seen.append(await host.scatter.wait(posted, 100))

        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        await host.scatter.transfer("r", "a", "b", OUT, one(0, 3))
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [3, 3]


async def test_a_guest_with_doorbells_is_rung_when_its_list_is_done(
    autojump_clock: MockClock,
) -> None:
    async with hosted() as host:
        for name in ("a", "b"):
            host.rung_by_dom0(name)
        host.scatter.register("r", "b", IN, one(0, 8))
        assert not host.rung_by_dom0("b")
        await host.scatter.transfer("r", "a", "b", OUT, one(0, 3))
        assert (host.rung_by_dom0("a"), host.rung_by_dom0("b")) == (False, True)


async def test_nobody_comes_in_time(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        posted = host.scatter.register("r", "b", IN, one(0, 8))
        for timeout_s in (0, 5):
            with pytest.raises(TimedOut):
                await host.scatter.wait(posted, timeout_s)
        host.scatter.unregister(posted)
        with pytest.raises(ListCancelled, match="unregistered"):
            await host.scatter.wait(posted, 5)


async def test_the_oldest_list_that_fits_is_used_unless_one_is_named(
    autojump_clock: MockClock,
) -> None:
    async with hosted() as host:
        scatter = host.scatter
        host.write("a", 0, b"xyz")
        first = scatter.register("r", "b", IN, one(0, 1))
        scatter.register("r", "b", OUT, one(50, 1))
        second = scatter.register("r", "b", IN, one(10, 1))
        third = scatter.register("r", "b", IN, one(20, 1))
        await scatter.transfer("r", "a", "b", OUT, one(0, 1), list_id=second)
        await scatter.transfer("r", "a", "b", OUT, one(1, 1))
        await scatter.transfer("r", "a", "b", OUT, one(2, 1))
        assert [await scatter.wait(each, 0) for each in (first, second, third)] == [1, 1, 1]
        assert (host.read("b", 0, 1), host.read("b", 10, 1)) == (b"y", b"x")
        with pytest.raises(NoSuchList):
            await scatter.transfer("r", "a", "b", OUT, one(0, 1), list_id=second)


async def test_the_count_is_in_memory_too(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        scatter = host.scatter
        host.write("a", 0, b"abc")
        scatter.register("r", "b", IN, one(0, 8), count_at=PAGE_SIZE - 8)
        await scatter.transfer("r", "a", "b", OUT, one(0, 3))
        assert host.read("b", PAGE_SIZE - 8, 9) == (3).to_bytes(8, "little") + b"\0"
        scatter.register("r", "b", OUT, one(0, 2), count_at=16)
        await scatter.transfer("r", "a", "b", IN, one(100, 8))
        assert host.read("b", 16, 8) == (2).to_bytes(8, "little")
        with pytest.raises(UsageError, match="cannot be at 12"):
            scatter.register("r", "b", IN, one(0, 1), count_at=12)
        with pytest.raises(Conflict):
            scatter.register("r", "b", IN, one(0, 8), count_at=0)
        with pytest.raises(OutOfRange):
            scatter.register("r", "b", IN, one(0, 8), count_at=PART)


async def test_dom0_has_all_of_the_region(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        scatter = host.scatter
        await host.daemon.engine.write_region("r", 39 * PAGE_SIZE, b"dom0's")
        scatter.register("r", "b", IN, one(0, 6))
        assert await scatter.transfer("r", "", "b", OUT, one(39 * PAGE_SIZE, 6)) == 6
        assert host.read("b", 0, 6) == b"dom0's"
        scatter.register("r", "", OUT, one(39 * PAGE_SIZE, 4))
        assert await scatter.transfer("r", str(host.domid("a")), "", IN, one(8, 4)) == 4
        assert host.read("a", 8, 4) == b"dom0"


@pytest.mark.parametrize("offset", [PART, PART - 1, -1, 1 << 40, (1 << 64) - 1])
async def test_nobody_names_what_is_not_his(autojump_clock: MockClock, offset: int) -> None:
    """To dom0 it is all one region, in which another's bytes come right behind."""
    async with hosted() as host:
        scatter = host.scatter
        host.write("b", 0, b"secret")
        with pytest.raises(OutOfRange):
            scatter.register("r", "a", OUT, one(offset, 2))
        with pytest.raises(OutOfRange):
            scatter.register("r", "a", IN, one(offset, 2))
        posted = scatter.register("r", "b", IN, one(0, 6))
        with pytest.raises(OutOfRange):
            await scatter.transfer("r", "a", "b", OUT, one(offset, 2))
        assert [each.list_id for each in scatter.lists()] == [posted]
        assert host.read("b", 0, 6) == b"secret"


async def test_a_guest_that_may_only_read_has_nothing_written(autojump_clock: MockClock) -> None:
    async with world() as running, trio.open_nursery() as nursery:
        daemon = await running.start()
        scatter = Scatter(daemon.engine, daemon.engine)
        await nursery.start(scatter.run)
        reads = dataclasses.replace(running.borrow("r", 2, at=64, offset=2), prot=Prot.RO)
        owner = running.request("r", 4)
        terms = dataclasses.replace(owner.terms, prot_enforcement=ProtEnforcement.ADVISORY)
        made = [
            await running.tools.create(
                running.config("w", dataclasses.replace(owner, terms=terms))
            ),
            await running.tools.create(running.config("ro", reads)),
        ]
        await running.until(lambda: daemon.is_attached("ro"))
        with pytest.raises(Refused):
            scatter.register("r", "ro", IN, one(0, 1))
        with pytest.raises(Refused):
            scatter.register("r", "ro", OUT, one(0, 1), count_at=64)
        scatter.register("r", "w", OUT, one(0, 1))
        with pytest.raises(Refused):
            await scatter.transfer("r", "ro", "w", IN, one(0, 1))
        whole = Part(guest="", generation="", ranges=(ByteRange(0, 1),))
        (life,) = (each.generation for each in daemon.engine.snapshot().guests if each.name == "ro")
        with pytest.raises(Refused):
            await daemon.engine.copy_parts(
                "r", whole, Part(guest="ro", generation=life, ranges=(ByteRange(0, 1),))
            )
        scatter.register("r", "w", IN, one(8, 1))
        assert await scatter.transfer("r", "ro", "w", OUT, one(0, 1)) == 1
        nursery.cancel_scope.cancel()
        for each in made:
            await running.tools.destroy(each)


@pytest.mark.parametrize("how", ["destroy", "detach", "reboot", "remove", "holder"])
async def test_a_list_ends_with_its_guests_part(autojump_clock: MockClock, how: str) -> None:
    async with hosted() as host, trio.open_nursery() as nursery:
        scatter, engine = host.scatter, host.daemon.engine
        posted = scatter.register("r", "b", IN, one(0, 8))
        other = scatter.register("r", "a", IN, one(0, 8))
        told: list[str] = []

        async def wait() -> None:
            with pytest.raises(ListCancelled) as caught:
                await scatter.wait(posted, 1000)
            told.append(caught.value.message)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        match how:
            case "destroy":
                await host.world.tools.destroy(host.made.pop("b"))
            case "detach":
                await engine.apply([DetachRegion(guest="b", region_id="r")])
            case "reboot":
                host.world.xen.shut_down(host.domid("b"), SHUTDOWN_REBOOT)
                await host.world.tools.destroy(host.made.pop("b"))
            case "remove":
                await engine.apply([RemoveRegion(region_id="r", force=True)])
            case "holder":
                host.world.xen.destroy(host.world.holders()[0])
                await host.world.tools.destroy(host.made.pop("system"))  # who is looked at
        await host.world.until(lambda: bool(told))
        if how in ("destroy", "detach", "reboot"):
            assert told == [f"list {posted} is cancelled: guest b left region r"]
            assert [each.list_id for each in scatter.lists()] == [other]
            with pytest.raises((NoSuchGuest, NoSuchList)):
                await scatter.transfer("r", "a", "b", OUT, one(0, 1))
        else:
            assert scatter.lists() == ()


async def test_the_engine_itself_lets_nobody_copy_what_is_not_his(
    autojump_clock: MockClock,
) -> None:
    async with hosted() as host:
        engine = host.daemon.engine
        lives = {guest.name: guest.generation for guest in engine.snapshot().guests}

        def part(name: str, *ranges: ByteRange) -> Part:
            return Part(guest=name, generation=lives.get(name, name), ranges=ranges)

        mine, his = part("a", ByteRange(0, 8)), part("b", ByteRange(0, 8))
        beyond = part("b", ByteRange(PART - 4, 8))
        for source, target, count in (
            (mine, beyond, None),
            (beyond, mine, None),
            (mine, his, part("b", ByteRange(PART, 8))),
            (mine, his, part("b", ByteRange(20, 8))),
            (mine, his, part("b", ByteRange(16, 16))),
            (mine, his, part("b", ByteRange(16, 8), ByteRange(32, 8))),
        ):
            with pytest.raises(OutOfRange):
                await engine.copy_parts("r", source, target, count_at=count)
        with pytest.raises(NoSuchGuest):
            await engine.copy_parts("r", part("nobody", ByteRange(0, 8)), his)
        with pytest.raises(NoSuchRegion):
            await engine.copy_parts("x", mine, his)
        assert "copy_ranges" not in host.world.xen.counts
        assert await engine.copy_parts("r", mine, his, count_at=part("b", ByteRange(16, 8))) == 8


async def test_what_was_missed_by_a_slow_reader_is_made_up_for(autojump_clock: MockClock) -> None:
    api = FakeRegions()
    scatter = Scatter(api, NoCopier())
    async with trio.open_nursery() as nursery:
        await nursery.start(scatter.run)
        posted = scatter.register("r0", "ctl", IN, one(0, 8))
        api.now = Snapshot(regions=api.now.regions)
        api.monitors[0].close()
        with pytest.raises(ListCancelled, match="guest ctl left region r0"):
            await scatter.wait(posted, 100)
        nursery.cancel_scope.cancel()


async def test_a_guest_that_left_and_came_back_posted_nothing(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        scatter, engine = host.scatter, host.daemon.engine
        posted = scatter.register("r", "b", IN, one(0, 8))
        again = AttachRegion(guest="b", request=host.world.borrow("r", 2, at=128, offset=20))
        await engine.apply([DetachRegion(guest="b", region_id="r")])
        await engine.apply([again])
        with pytest.raises(ListCancelled):
            await scatter.wait(posted, 1)


async def test_a_copy_that_fails_leaves_the_list_posted(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        scatter = host.scatter
        host.write("a", 0, b"later")
        first = scatter.register("r", "b", IN, one(0, 5))
        scatter.register("r", "b", IN, one(100, 5))
        host.world.xen.fail("copy_ranges", 12)
        with pytest.raises(HypercallFailed):
            await scatter.transfer("r", "a", "b", OUT, one(0, 5))
        assert scatter.lists()[0].list_id == first
        assert await scatter.transfer("r", "a", "b", OUT, one(0, 5)) == 5
        assert await scatter.wait(first, 0) == 5
        assert host.read("b", 0, 5) == b"later"


async def test_nothing_is_copied_onto_itself(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        scatter = host.scatter
        posted = scatter.register("r", "a", IN, one(0, 8))
        for who, ranges in (("a", one(4, 8)), ("system", one(7, 1))):
            with pytest.raises(Conflict):
                await scatter.transfer("r", who, "a", OUT, ranges)
        assert await scatter.transfer("r", "a", "a", OUT, one(8, 8)) == 8
        assert await scatter.wait(posted, 0) == 8


async def test_double_registration(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        scatter = host.scatter
        posted = scatter.register("r", "b", IN, one(0, 8), count_at=64)
        for again in (one(0, 8), one(7, 1), one(64, 1)):
            with pytest.raises(Conflict):
                scatter.register("r", "b", OUT, again)
        scatter.unregister(posted)
        scatter.register("r", "b", OUT, one(0, 8))
        with pytest.raises(NoSuchList):
            scatter.unregister(posted)
        with pytest.raises(NoSuchList):
            scatter.unregister(1000)


async def test_a_taken_list_cannot_be_taken_back_or_again(autojump_clock: MockClock) -> None:
    async with hosted() as host, trio.open_nursery() as nursery:
        scatter = host.scatter
        posted = scatter.register("r", "b", IN, one(0, 8))
        nursery.start_soon(scatter.transfer, "r", "a", "b", OUT, one(0, 8))
        while scatter.lists():
            await trio.lowlevel.checkpoint()
        with pytest.raises(Conflict):
            scatter.unregister(posted)
        with pytest.raises(NoSuchList):
            await scatter.transfer("r", "a", "b", OUT, one(0, 8))
        assert await scatter.wait(posted, 10) == 8


async def test_a_transfer_that_is_cut_off_ends_its_list(autojump_clock: MockClock) -> None:
    async with hosted() as host, trio.open_nursery() as nursery:
        scatter = host.scatter
        posted = scatter.register("r", "b", IN, one(0, 8))
        nursery.start_soon(scatter.transfer, "r", "a", "b", OUT, one(0, 8))
        while scatter.lists():
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), pytest.raises(ListCancelled, match="cut off"):
            await scatter.wait(posted, 10)


async def test_how_many_lists_there_may_be(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "MAX_LISTS", 20)
    monkeypatch.setattr(lists, "MAX_OUTCOMES", 3)
    async with hosted() as host:
        scatter = host.scatter
        posted = [scatter.register("r", "a", IN, one(index, 1)) for index in range(16)]
        with pytest.raises(QuotaExceeded, match="guest a"):
            scatter.register("r", "a", IN, one(16, 1))
        for index in range(4):
            scatter.register("r", "b", IN, one(index, 1))
        with pytest.raises(QuotaExceeded, match="all guests"):
            scatter.register("r", "b", IN, one(4, 1))
        for each in posted[:4]:
            scatter.unregister(each)
        with pytest.raises(NoSuchList):
            await scatter.wait(posted[0], 0)
        for each in posted[1:4]:
            with pytest.raises(ListCancelled):
                await scatter.wait(each, 0)


@pytest.mark.parametrize(
    "terms",
    [
        RegionTerms(isolation=Isolation.SEALED),
        RegionTerms(backing=Backing.HOST, host_first_mfn=7),
    ],
)
async def test_no_list_is_posted_where_nothing_can_be_copied(terms: RegionTerms) -> None:
    api = FakeRegions()
    (region,) = api.now.regions
    api.now = dataclasses.replace(api.now, regions=(dataclasses.replace(region, terms=terms),))
    scatter = Scatter(api, NoCopier())
    for guest in ("ctl", ""):
        with pytest.raises(Refused, match="nothing is copied in region r0"):
            scatter.register("r0", guest, OUT, one(0, 8))


@pytest.mark.parametrize(
    ("region", "guest", "error"),
    [("x", "a", NoSuchRegion), ("r", "x", NoSuchGuest), ("r", "99", NoSuchGuest)],
)
async def test_what_is_not_there(
    autojump_clock: MockClock, region: str, guest: str, error: type[Exception]
) -> None:
    async with hosted() as host:
        with pytest.raises(error):
            host.scatter.register(region, guest, IN, one(0, 1))
        with pytest.raises(error):
            await host.scatter.transfer(region, guest, "a", OUT, one(0, 1))
        with pytest.raises(error):
            await host.scatter.transfer(region, "a", guest, OUT, one(0, 1))
        with pytest.raises(UsageError):
            host.scatter.register("r", "a", IN, [])


@pytest.mark.parametrize(
    ("said", "moved"),
    [("exchange", 5099), ("fetch", 4177), ("leave", 64), ("read-only", 4160), ("beyond", 0)],
)
def test_what_strangers_ask_for_is_really_played(said: str, moved: int) -> None:
    """The fuzzer's corpus, of which each input is to reach what it is named after."""
    assert Toy().play((CORPUS / "scatter" / said).read_bytes()) == moved


def test_the_toys_memory_notices_a_stranger() -> None:
    toy = Toy()
    toy.memory.may_read, toy.memory.may_write = bytes_of_part("a"), [bytes_of_part("b")]
    inside, outside = ByteRange(START + bytes_of(2), 8), ByteRange(START + bytes_of(2) - 1, 8)
    own = ByteRange(START, 8)
    assert toy.memory.copy_ranges(DomId(1), [own], [inside]) == 8
    for source, target in ((own, outside), (inside, inside)):
        with pytest.raises(AssertionError):
            toy.memory.copy_ranges(DomId(1), [source], [target])
