# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scatter-gather on a region that is a few bytes of Python, so that one can do thousands of it.

All that decides is the product's (:class:`Scatter`, :class:`Lists`, :class:`Copies`); what is not
real is the memory, and that looks at every range it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar, cast

from xshmd.api import PartCopier, RegionsApi
from xshmd.engine.copies import Copies
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import XshmError
from xshmd.model import Guest, GuestState, Holder, Prot, Region, RegionRequest, Role, Snapshot
from xshmd.ports import Hypervisor
from xshmd.ranges import ByteRange, Part
from xshmd.share.lists import Direction
from xshmd.share.mediator import Mediator
from xshmd.share.scatter import Scatter
from xshmd.units import PAGE_SIZE, DomId, Gfn, bytes_of

T = TypeVar("T")
MAX_STEPS: Final = 60
REQUEST_BYTES: Final = 80
"""Of a request page, from its operation on to its second range."""
MAX_REQUESTS: Final = 8
PAGES_OF: Final = ("a", "b")
"""Who has a request page, as the second page of its part."""
FRAMES: Final = 6
FIRST_GFN: Final = Gfn(0x40)
START: Final = bytes_of(FIRST_GFN)
PARTS: Final = {"a": (0, 2, Prot.RW), "b": (2, 2, Prot.RW), "c": (1, 3, Prot.RO)}
"""First frame, number of frames, and what the guest may do."""


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Return what comes of something that awaits nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise AssertionError("it waits")


class Memory:
    """The region's bytes, and which of them may be touched at this moment."""

    def __init__(self) -> None:
        self.data = bytearray(range(1, 252)) * (FRAMES * PAGE_SIZE // 251 + 1)
        del self.data[FRAMES * PAGE_SIZE :]
        self.may_read: range = range(0)
        self.may_write: list[range] = []

    def copy_ranges(
        self,
        domid: DomId,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        *,
        count_at: int | None = None,
    ) -> int:
        into = [self._bytes(each, self.may_write) for each in target]
        out_of = [self._bytes(each, [self.may_read]) for each in source]
        data = b"".join(bytes(self.data[each.start : each.stop]) for each in out_of)
        copied = 0
        for each in into:
            piece = data[copied : copied + len(each)]
            self.data[each.start : each.start + len(piece)] = piece
            copied += len(piece)
        if count_at is not None:
            word = self._bytes(ByteRange(count_at, 8), self.may_write)
            self.data[word.start : word.stop] = copied.to_bytes(8, "little")
        return copied

    def map_pages(self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool) -> Window:
        return Window(self, bytes_of(first_gfn))

    @staticmethod
    def _bytes(wanted: ByteRange, allowed: Sequence[range]) -> range:
        found = range(wanted.offset_bytes - START, wanted.end - START)
        assert any(found.start >= each.start and found.stop <= each.stop for each in allowed), (
            f"{wanted} is nobody's to name"
        )
        return found


class Window:
    """A mapping of it."""

    def __init__(self, memory: Memory, start: int) -> None:
        self._memory, self._start = memory, start

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes:
        wanted = ByteRange(self._start + offset_bytes, nr_bytes)
        found = self._memory._bytes(wanted, [self._memory.may_read])
        return bytes(self._memory.data[found.start : found.stop])

    def write(self, offset_bytes: int, data: bytes) -> None:
        wanted = ByteRange(self._start + offset_bytes, len(data))
        found = self._memory._bytes(wanted, self._memory.may_write)
        self._memory.data[found.start : found.stop] = data

    def close(self) -> None:
        pass


class Toy:
    """A region of six frames, three guests that have parts of it, and their scatter-gather."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.only_region = Region(
            region_id="r", nr_frames=FRAMES, holder_uuid="h", holder_first_gfn=FIRST_GFN,
            ready=True,
        )  # fmt: skip
        self.guests = {name: self._guest(name) for name in PARTS}
        self._copies = Copies(
            xen=cast(Hypervisor, self.memory), worker=cast(XenWorker, self),
            ledger=cast(Ledger, self), holders=cast(Holders, self),
        )  # fmt: skip
        self.scatter = Scatter(cast(RegionsApi, self), cast(PartCopier, self))
        self.mediator = Mediator(self.scatter, cast(PartCopier, self))

    @staticmethod
    def _guest(name: str) -> Guest:
        first, number, prot = PARTS[name]
        request = RegionRequest(
            region_id="r", first_gfn=Gfn(0x1000), nr_frames=number, offset_frames=first,
            role=Role.BORROWER, prot=prot,
        )  # fmt: skip
        return Guest(
            domid=DomId(5), uuid=name, name=name, generation=name, state=GuestState.ATTACHED,
            requests=(request,),
        )  # fmt: skip

    # -- what stands around the product's code ----------------------------------------------------

    def snapshot(self) -> Snapshot:
        return Snapshot(regions=(self.only_region,), guests=tuple(self.guests.values()))

    def region(self, region_id: str) -> Region:
        return self.only_region

    def holder(self, uuid: str) -> Holder:
        return Holder(uuid=uuid, domid=DomId(1), next_gfn=Gfn(0))

    def verify(self, holder: Holder) -> None:
        assert holder.uuid == self.only_region.holder_uuid

    def guest(self, generation: str) -> Guest | None:
        return next((one for one in self.guests.values() if one.generation == generation), None)

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        return call(*arguments)

    async def read_part(self, region_id: str, part: Part) -> bytes:
        self.memory.may_read = bytes_of_part(part.guest)
        return await self._copies.read(region_id, part)

    async def write_part(self, region_id: str, part: Part, data: bytes) -> None:
        self.memory.may_write = [bytes_of_part(part.guest)]
        await self._copies.write(region_id, part, data)

    async def wake_part(self, region_id: str, part: Part) -> None:
        pass

    async def copy_parts(
        self, region_id: str, source: Part, target: Part, *, count_at: Part | None = None
    ) -> int:
        self.memory.may_read = bytes_of_part(source.guest)
        self.memory.may_write = [
            bytes_of_part(each.guest)
            for each in (target, count_at)
            if each is not None and (not each.guest or PARTS[each.guest][2] is Prot.RW)
        ]
        return await self._copies.copy(region_id, source, target, count_at)

    # -- what may be asked ------------------------------------------------------------------------

    def leave(self, name: str) -> None:
        """Have a guest leave, and another of its name come."""
        old = self.guests[name]
        self.guests[name] = dataclasses.replace(old, generation=old.generation + "'")
        self.scatter._cancel_orphans()

    def transfer(self, *arguments: Any, **more: Any) -> int:
        return finished(self.scatter.transfer(*arguments, **more))

    def play(self, data: bytes) -> int:
        """Ask for what these bytes say, whatever that is; how many bytes were moved."""
        moved = 0
        names = ("", *PARTS)
        for start in range(0, min(len(data) - 3, 20 * MAX_STEPS), 20):
            step = data[start : start + 20].ljust(20, b"\0")
            who, peer = names[step[0] & 3], names[step[0] >> 2 & 3]
            direction = list(Direction)[step[0] >> 4 & 1]
            # Numbers as a stranger would write them: 64 bits, mostly small, with a sign.
            numbers = [
                int.from_bytes(step[at : at + 8], "little", signed=True) >> (step[3] & 63)
                for at in (4, 12)
            ]
            ranges = [ByteRange(*numbers)]
            ranges += [ByteRange(step[2] * 8, step[1] % 64)] * (step[0] >> 5 & 1)
            try:
                match step[1] >> 6:
                    case 0:
                        count_at = step[2] * 32 if step[0] & 0x40 else None
                        self.scatter.register("r", who, direction, ranges, count_at=count_at)
                    case 1:
                        chosen = step[2] if step[0] & 0x80 else None
                        moved += self.transfer("r", who, peer, direction, ranges, list_id=chosen)
                    case 2:
                        self.scatter.unregister(step[2])
                    case _:
                        if who:
                            self.leave(who)
            except XshmError:
                continue
        return moved

    def play_pages(self, data: bytes) -> int:
        """Have two guests write pieces of it into their request pages in turn; bytes moved."""
        for name in PAGES_OF:
            finished(self.mediator.open("r", name, PAGE_SIZE))
        pages = tuple(self.mediator._pages.values())
        for number in range(min(len(data) // REQUEST_BYTES, MAX_REQUESTS)):
            request = data[number * REQUEST_BYTES :][:REQUEST_BYTES]
            page = pages[number % 2]
            at = bytes_of_part(page.guest)[PAGE_SIZE]
            # What stands for the number must be a new one for the request to be looked at at all.
            asked = (number + 1).to_bytes(4, "little")
            self.memory.data[at : at + 8] = bytes(8)
            self.memory.data[at + 8 : at + 12] = asked
            self.memory.data[at + 16 : at + REQUEST_BYTES + 16] = request
            assert finished(self.mediator._look(page))
            assert self.memory.data[at + 12 : at + 16] == asked
        return self.scatter.counts["bytes_moved"]


def bytes_of_part(guest: str) -> range:
    """Return which bytes of the region a guest has."""
    if not guest:
        return range(bytes_of(FRAMES))
    first, number, _ = PARTS[guest]
    return range(bytes_of(first), bytes_of(first + number))
