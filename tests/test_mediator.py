# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that ask for lists and transfers themselves, in a page that they write as they like."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Sequence

import pytest
import trio
from fuzz.targets import CORPUS
from hypothesis import given
from hypothesis import strategies as st
from scatter_host import PART, Host, hosted
from scatter_words import Toy
from trio.testing import MockClock
from varlink_fakes import OWNER, FakeRegions, NoCopier

from xshmd.changes import DetachRegion
from xshmd.errors import (
    Conflict,
    ListCancelled,
    NoSuchGuest,
    OutOfRange,
    QuotaExceeded,
    all_errors,
)
from xshmd.ranges import MAX_RANGES, Part
from xshmd.share import mediator, request_page
from xshmd.share.mediator import Mediator
from xshmd.share.request_page import Operation, newest
from xshmd.share.scatter import Scatter
from xshmd.units import PAGE_SIZE, DomId

PAGE_AT = 9 * PAGE_SIZE
"""The last page of a guest's part."""
PATIENCE_S = 60.0


class Asker:
    """A guest that uses its request page as the C header says."""

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name = host, name
        self.asked = 0

    def word(self, at: int, size: int = 4) -> int:
        return int.from_bytes(self.host.read(self.name, PAGE_AT + at, size), "little")

    def put(
        self,
        operation: int,
        ranges: Sequence[tuple[int, int]] = (),
        *,
        list_id: int = 0,
        count_at: int | None = None,
        nr_ranges: int | None = None,
    ) -> None:
        """Write a request, the number of it last."""
        write, name = self.host.write, self.name
        number = len(ranges) if nr_ranges is None else nr_ranges
        write(name, PAGE_AT + 0x10, struct.pack("<III", operation, list_id, number))
        write(name, PAGE_AT + 0x20, struct.pack("<Q", 0 if count_at is None else count_at + 1))
        for index, each in enumerate(ranges):
            write(name, PAGE_AT + 0x40 + 16 * index, struct.pack("<QQ", *each))
        self.asked += 1
        write(name, PAGE_AT + 0x08, self.asked.to_bytes(4, "little"))

    async def answer(self) -> tuple[int, int]:
        """Return status and result, once they are there."""
        await self.host.world.until(lambda: self.word(0x0C) == self.asked, "an answer")
        return self.word(0x1C), self.word(0x28, 8)

    async def ask(self, operation: int, *arguments: object, **more: object) -> tuple[int, int]:
        self.put(operation, *arguments, **more)  # type: ignore[arg-type]
        return await self.answer()


async def opened(host: Host, *names: str) -> list[Asker]:
    for name in names:
        await host.mediator.open("r", name, PAGE_AT)
    return [Asker(host, name) for name in names]


async def test_two_guests_exchange_without_anybody_else(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        a, b = await opened(host, "a", "b")
        assert host.read("a", PAGE_AT, 8) == b"XSHL\1\0\0\0"
        status, posted = await b.ask(Operation.REGISTER_INPUT, [(0, 100)], count_at=512)
        assert (status, posted) == (0, 1)
        host.write("a", 40, b"said by a")
        assert await a.ask(Operation.TRANSFER_OUTPUT, [(40, 4), (44, 5)]) == (0, 9)
        assert host.read("b", 0, 10) == b"said by a\0"
        assert host.read("b", 512, 8) == (9).to_bytes(8, "little")
        host.write("b", 200, b"and by b")
        assert (await b.ask(Operation.REGISTER_OUTPUT, [(200, 8)]))[0] == 0
        assert await a.ask(Operation.TRANSFER_INPUT, [(0, 20)], list_id=2) == (0, 8)
        assert host.read("a", 0, 9) == b"and by b\0"


async def test_nobody_uses_his_own_list_by_accident(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        a, b = await opened(host, "a", "b")
        await a.ask(Operation.REGISTER_INPUT, [(0, 8)])
        assert await a.ask(Operation.TRANSFER_OUTPUT, [(100, 8)]) == (5, 0)
        assert await b.ask(Operation.TRANSFER_OUTPUT, [(100, 8)]) == (0, 8)


async def test_a_guest_takes_back_its_own_list_only(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        a, b = await opened(host, "a", "b")
        _, posted = await b.ask(Operation.REGISTER_INPUT, [(0, 8)])
        assert await a.ask(Operation.UNREGISTER, list_id=posted) == (5, 0)
        assert await b.ask(Operation.UNREGISTER, list_id=posted) == (0, 0)
        with pytest.raises(ListCancelled):
            await host.scatter.wait(posted, 0)


@pytest.mark.parametrize(
    ("status", "operation", "ranges", "more"),
    [
        (1, 0, [(0, 8)], {}),
        (1, 6, [(0, 8)], {}),
        (1, 0xFFFFFFFF, [(0, 8)], {}),
        (1, Operation.REGISTER_INPUT, [], {}),
        (1, Operation.REGISTER_INPUT, [(0, 8)], {"nr_ranges": 65}),
        (1, Operation.REGISTER_INPUT, [(0, 8)], {"nr_ranges": 0xFFFFFFFF}),
        (1, Operation.REGISTER_INPUT, [(0, (1 << 20) + 1)], {}),
        (1, Operation.REGISTER_INPUT, [(0, 8)], {"count_at": 12}),
        (2, Operation.REGISTER_INPUT, [(PART - 7, 8)], {}),
        (2, Operation.TRANSFER_OUTPUT, [((1 << 64) - 4, 8)], {}),
        (2, Operation.REGISTER_OUTPUT, [(0, 8)], {"count_at": (1 << 64) - 9}),
        (3, Operation.REGISTER_INPUT, [(0, 8), (7, 8)], {}),
        (5, Operation.TRANSFER_OUTPUT, [(0, 8)], {"list_id": 0xFFFFFFFF}),
        (5, Operation.UNREGISTER, [], {"list_id": 17}),
    ],
)  # fmt: skip
async def test_what_is_wrong_has_a_number(
    autojump_clock: MockClock, status: int, operation: int, ranges: list[tuple[int, int]],
    more: dict[str, int],
) -> None:  # fmt: skip
    async with hosted() as host:
        (a,) = await opened(host, "a")
        host.write("b", 0, b"secret")
        assert await a.ask(operation, ranges, **more) == (status, 0)
        assert await a.ask(Operation.REGISTER_INPUT, [(0, 8)]) == (0, 1)


async def test_too_many_lists(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        (a,) = await opened(host, "a")
        for index in range(16):
            assert (await a.ask(Operation.REGISTER_INPUT, [(index, 1)]))[0] == 0
        assert await a.ask(Operation.REGISTER_INPUT, [(16, 1)]) == (6, 0)


def test_every_error_has_a_number() -> None:
    numbers = {kind.__name__: request_page.status_of(kind("x")) for kind in all_errors()}
    assert set(numbers.values()) == set(range(1, 8))
    assert numbers["OutOfMemory"] == numbers["ListCancelled"] == numbers["XshmError"] == 7


async def test_a_guest_that_lies_about_its_answers_changes_nothing(
    autojump_clock: MockClock,
) -> None:
    """``answered`` is dom0's own memory: a request is done once, whatever stands in the page."""
    async with hosted() as host:
        (a,) = await opened(host, "a")
        await a.ask(Operation.REGISTER_INPUT, [(0, 8)])
        host.write("a", PAGE_AT, bytes(16)[:8] + (1).to_bytes(4, "little") + bytes(4))
        await trio.sleep(5)
        assert host.scatter.counts["lists_posted"] == 1
        assert host.read("a", PAGE_AT + 0x0C, 4) == bytes(4)


class SlowCopier(NoCopier):
    """Pages full of what somebody left there; one guest's take their time to be written."""

    def __init__(self) -> None:
        self.read_of: list[str] = []
        self.may_go_on = trio.Event()

    async def read_part(self, region_id: str, part: Part) -> bytes:
        self.read_of.append(part.guest)
        return b"\x01" * request_page.READ_BYTES

    async def write_part(self, region_id: str, part: Part, data: bytes) -> None:
        if part.guest == "slow":
            await self.may_go_on.wait()

    async def wake_part(self, region_id: str, part: Part) -> None:
        pass


async def test_a_page_is_not_looked_at_before_it_is_cleared(autojump_clock: MockClock) -> None:
    api, copier = FakeRegions(), SlowCopier()
    slow = dataclasses.replace(OWNER, name="slow", generation="g7", domid=DomId(7))
    api.now = dataclasses.replace(api.now, guests=(OWNER, slow))
    asked = Mediator(Scatter(api, copier), copier)
    async with trio.open_nursery() as nursery:
        await nursery.start(asked.run)
        await asked.open("r0", "ctl", 0)
        nursery.start_soon(asked.open, "r0", "slow", 0)
        await trio.sleep(5)
        assert set(copier.read_of) == {"ctl"}
        copier.may_go_on.set()
        await trio.sleep(5)
        assert set(copier.read_of) == {"ctl", "slow"}
        nursery.cancel_scope.cancel()


async def test_a_flood_is_answered_one_at_a_time(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        a, b = await opened(host, "a", "b")
        began = trio.current_time()
        for _ in range(60):
            a.put(Operation.TRANSFER_OUTPUT, [(0, 8)])
            b.put(Operation.UNREGISTER, list_id=9)
            assert await b.answer() == (5, 0)
            assert await a.answer() == (5, 0)
        took = trio.current_time() - began
        assert took >= 60 * mediator.LEAST_S


async def test_pages_that_are_quiet_are_looked_at_seldom(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        await opened(host, "a")
        await trio.sleep(5)
        before = host.world.xen.counts["map_pages"]
        await trio.sleep(32)
        assert host.world.xen.counts["map_pages"] - before <= 1 + 32 / mediator.MOST_S


async def test_a_guest_that_rings_is_answered_at_once_and_rung(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        (a,) = await opened(host, "a")
        await trio.sleep(5)
        host.rung_by_dom0("a")
        for asked in range(3):
            began = trio.current_time()
            a.put(Operation.REGISTER_INPUT, [(8 * asked, 8)])
            host.ring_dom0("a")
            with trio.fail_after(PATIENCE_S):
                while not host.rung_by_dom0("a"):  # noqa: ASYNC110 - the fake has no event
                    await trio.sleep(0.001)
            assert a.word(0x0C) == a.asked
            assert trio.current_time() - began < 4 * mediator.LEAST_S
            await trio.sleep(5)


@pytest.mark.parametrize("how", ["destroy", "detach", "close"])
async def test_a_page_ends_with_its_guests_part(autojump_clock: MockClock, how: str) -> None:
    async with hosted() as host:
        _, b = await opened(host, "a", "b")
        b.put(Operation.REGISTER_INPUT, [(0, 8)])
        await b.answer()
        match how:
            case "destroy":
                await host.world.tools.destroy(host.made.pop("b"))
            case "detach":
                await host.daemon.engine.apply([DetachRegion(guest="b", region_id="r")])
            case "close":
                host.mediator.close("r", "b")
        await host.world.until(lambda: host.mediator.nr_pages == 1, "the page is closed")
        with pytest.raises(NoSuchGuest):
            host.mediator.close("r", "b")


async def test_where_a_page_may_be(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted() as host:
        for offset in (8, -PAGE_SIZE, PART, 1 << 63):
            with pytest.raises(OutOfRange):
                await host.mediator.open("r", "a", offset)
        for guest in ("nobody", ""):
            with pytest.raises(NoSuchGuest):
                await host.mediator.open("r", guest, 0)
        assert host.mediator.nr_pages == 0
        await host.mediator.open("r", "a", 0)
        with pytest.raises(Conflict):
            await host.mediator.open("r", str(host.domid("a")), PAGE_SIZE)
        monkeypatch.setattr(mediator, "MAX_PAGES", 1)
        with pytest.raises(QuotaExceeded):
            await host.mediator.open("r", "b", 0)


async def test_a_look_that_fails_is_made_again(autojump_clock: MockClock) -> None:
    async with hosted() as host:
        (a,) = await opened(host, "a")
        host.world.xen.fail("map_pages", 12)
        assert await a.ask(Operation.REGISTER_INPUT, [(0, 8)]) == (0, 1)
        assert host.world.xen.faults == []


@given(st.binary(min_size=request_page.READ_BYTES, max_size=request_page.READ_BYTES))
def test_any_page_is_understood_in_some_way(page: bytes) -> None:
    asked = int.from_bytes(page[8:12], "little")
    assert newest(page, asked) is None
    request = newest(page, asked ^ 1)
    assert request is not None
    assert len(request.ranges) <= MAX_RANGES
    assert all(
        0 <= value < 1 << 64 for each in request.ranges for value in dataclasses.astuple(each)
    )
    assert request.count_at is None or 0 <= request.count_at < 1 << 64


async def test_hostile_pages_reach_nobody_else(autojump_clock: MockClock) -> None:
    """Both guests ask for whatever comes to their mind; what neither has stays as it was."""
    rng = random.Random(6)
    async with hosted() as host:
        askers = await opened(host, "a", "b")
        rest = await host.daemon.engine.read_region("r", 2 * PART, 16 * PAGE_SIZE)
        moved = 0
        for _ in range(60):
            for asker in askers:
                edge = rng.choice((0, PART - 1, PART, PART + 8, (1 << 64) - 1, 1 << 63))
                ranges = [
                    (
                        edge if rng.random() < 0.2 else rng.randrange(PAGE_AT - 60),
                        rng.choice((1, 8, 60)),
                    )
                    for _ in range(rng.randrange(4))
                ]
                count = rng.choice((None, None, 8 * rng.randrange(PAGE_AT // 8), PART, edge))
                status, result = await asker.ask(
                    rng.randrange(7), ranges, list_id=rng.choice((0, 0, rng.randrange(40))),
                    count_at=count if count is None else count & ((1 << 64) - 2),
                )  # fmt: skip
                assert status in range(8)
                moved += result
        assert moved > 200
        assert await host.daemon.engine.read_region("r", 2 * PART, 16 * PAGE_SIZE) == rest


@pytest.mark.parametrize(
    ("said", "moved"), [("exchange", 184), ("take-back", 0), ("own-page", 80), ("beyond", 0)]
)
def test_what_the_fuzzer_begins_with_is_really_played(said: str, moved: int) -> None:
    assert Toy().play_pages((CORPUS / "request-page" / said).read_bytes()) == moved
