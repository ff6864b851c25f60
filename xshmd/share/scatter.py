# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scatter-gather between the members of a region: one posts a list, another moves bytes by it.

A member need not have all of a region.  Two that have different parts of it exchange what each has
put up for it, and see nothing else of each other's: dom0, which sees it all, does the copying.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import structlog
import trio

from xshmd.api import PartCopier, RegionsApi
from xshmd.errors import (
    ListCancelled,
    NoSuchGuest,
    NoSuchRegion,
    Refused,
    TimedOut,
    UsageError,
    XshmError,
)
from xshmd.events import Event, EventKind
from xshmd.model import Backing, Guest, GuestState, Prot, Region, RegionRequest
from xshmd.ranges import ByteRange, Part, check_list
from xshmd.share.lists import Direction, Lists, Outcome, PostedList
from xshmd.units import bytes_of

log = structlog.get_logger()

DOM0: Final = ""
"""What dom0 is called among the guests: it has every region, and all of it."""
COUNT_BYTES: Final = 8
COUNTED: Final = ("lists_posted", "lists_done", "lists_cancelled", "transfers", "bytes_moved")


class Scatter:
    """Posted lists, and the transfers between them.

    Args:
        regions: Who has what.
        copier: What moves the bytes.
    """

    def __init__(self, regions: RegionsApi, copier: PartCopier) -> None:
        self._regions, self._copier = regions, copier
        self._lists = Lists(self._done)
        self._waiting: dict[int, trio.Event] = {}
        self.counts = dict.fromkeys(COUNTED, 0)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Cancel the lists of guests that leave; for ever."""
        while True:
            async with self._regions.monitor() as events:
                # What happened while nobody listened is in the state of now.
                self._cancel_orphans()
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                async for event in events:
                    self._cancel_left(event)
                    self._cancel_orphans()

    # -- lists ----------------------------------------------------------------------------------

    def register(
        self,
        region_id: str,
        guest: str,
        direction: Direction,
        ranges: Sequence[ByteRange],
        *,
        count_at: int | None = None,
    ) -> int:
        """Post a list, and return its id.  It is used once.

        Args:
            region_id: The region.
            guest: Name or domid of the guest whose list it is; empty for dom0.
            direction: INPUT to be filled, OUTPUT to be fetched.
            ranges: In bytes from where the guest's part of the region begins.
            count_at: Where in that part a 64-bit little-endian word gets the number of bytes when
                the list is done; a multiple of 8.

        Raises:
            NoSuchRegion, NoSuchGuest: it is not there, or the guest has no part in it.
            UsageError, OutOfRange, Conflict: the list is none, not all in the guest's part, names
                a byte twice or one that is in another list of the guest.
            Refused: the guest may not write there.
            QuotaExceeded: it would be one too many.
        """
        region, member, request = self._find(region_id, guest)
        part = _part(member, tuple(ranges))
        _check(region, request, part, writes=direction is Direction.INPUT)
        count = None
        if count_at is not None:
            count = _part(member, (ByteRange(count_at, COUNT_BYTES),))
            _check(region, request, count, writes=True)
            if count_at % COUNT_BYTES:
                raise UsageError(
                    f"the count cannot be at {count_at}", hint=f"say a multiple of {COUNT_BYTES}"
                )
        posted = self._lists.post(region_id, part, direction, count)
        self.counts["lists_posted"] += 1
        return posted.list_id

    def unregister(self, list_id: int) -> None:
        """Take a list back.

        Raises:
            NoSuchList: there is none, or it is done.
            Conflict: a transfer is at work on it.
        """
        self._lists.withdraw(list_id)

    def lists(self) -> tuple[PostedList, ...]:
        """Return the lists that wait for a transfer, oldest first."""
        return tuple(self._lists)

    async def wait(self, list_id: int, timeout_s: float) -> int:
        """Return how many bytes a list has moved, once it is done.

        Raises:
            ListCancelled: it was unregistered, or its guest left the region.
            NoSuchList: there never was one, or it was done too long ago.
            TimedOut: it is not done yet.
        """
        outcome = self._lists.outcome(list_id)
        if outcome is None:
            done = self._waiting.setdefault(list_id, trio.Event())
            with trio.move_on_after(timeout_s):
                await done.wait()
            outcome = self._lists.outcome(list_id)
        else:
            await trio.lowlevel.checkpoint()
        if outcome is None:
            raise TimedOut(
                f"no transfer used list {list_id} within {timeout_s:g} s",
                hint="await it again, or unregister it",
                list=list_id,
            )
        if isinstance(outcome, XshmError):
            raise outcome
        return outcome

    # -- transfers ------------------------------------------------------------------------------

    async def transfer(
        self,
        region_id: str,
        guest: str,
        peer: str | None,
        direction: Direction,
        ranges: Sequence[ByteRange],
        *,
        list_id: int | None = None,
    ) -> int:
        """Move bytes between a guest's ranges and a list that its peer has posted.

        Args:
            region_id: The region.
            guest: Name or domid of the guest whose ranges these are; empty for dom0.
            peer: Name or domid of the one whose list is used; empty for dom0, None for anybody
                else than the guest.
            direction: OUTPUT into a list the peer posted for input, INPUT from one for output.
            ranges: In bytes from where the guest's part of the region begins.
            list_id: Use this list and no other; the oldest that fits if None.

        Returns:
            How many bytes were moved: those of the shorter of the two lists.

        Raises:
            NoSuchList: the peer has posted none.
            ListCancelled: the peer left in the middle of it.
            NoSuchRegion, NoSuchGuest, UsageError, OutOfRange, Conflict, Refused: as
                :meth:`register`; the list stays posted.
        """
        region, member, request = self._find(region_id, guest)
        own = _part(member, tuple(ranges))
        _check(region, request, own, writes=direction is Direction.INPUT)
        if peer is None:
            whose: str | None = None
            not_of: str | None = own.generation
        else:
            _, other, _ = self._find(region_id, peer)
            whose, not_of = other.generation if other else DOM0, None
        posted = self._lists.take(region_id, whose, direction.opposite, list_id, not_of=not_of)
        try:
            nr_bytes = await self._move(own, posted)
        except XshmError:
            # Nothing was moved, so nothing has happened to the list; unless its guest has gone.
            self._lists.put_back(posted)
            self._cancel_orphans()
            gone = self._lists.outcome(posted.list_id)
            if isinstance(gone, XshmError):
                raise gone from None
            raise
        except BaseException:
            self._lists.cancel(posted.list_id, "the transfer was cut off")
            raise
        self._lists.finish(posted, nr_bytes)
        with contextlib.suppress(XshmError):  # the bytes are there, and it can look
            await self._copier.wake_part(region_id, posted.part)
        self.counts["transfers"] += 1
        self.counts["bytes_moved"] += nr_bytes
        log.debug(
            "bytes moved", region=region_id, guest=own.guest, peer=posted.part.guest,
            direction=direction.value, nr_bytes=nr_bytes, list=posted.list_id,
        )  # fmt: skip
        return nr_bytes

    async def _move(self, own: Part, posted: PostedList) -> int:
        source, target = own, posted.part
        if posted.direction is Direction.OUTPUT:
            source, target = target, source
        return await self._copier.copy_parts(
            posted.region_id, source, target, count_at=posted.count_at
        )

    # -- who has what ---------------------------------------------------------------------------

    def member(self, region_id: str, guest: str) -> Guest:
        """Return the guest of this name or domid that has a part in the region.

        Raises:
            NoSuchRegion, NoSuchGuest: it is not there, or has none.
        """
        _, member, _ = self._find(region_id, guest)
        if member is None:
            raise NoSuchGuest("dom0 is no guest", region=region_id)
        return member

    def _find(
        self, region_id: str, guest: str
    ) -> tuple[Region, Guest | None, RegionRequest | None]:
        snapshot = self._regions.snapshot()
        region = next((each for each in snapshot.regions if each.region_id == region_id), None)
        if region is None:
            raise NoSuchRegion(
                f"there is no region {region_id}",
                hint="xshmctl list shows those there are",
                id=region_id,
            )
        if guest == DOM0:
            return region, None, None
        for member in snapshot.guests:
            # The last is for ourselves: no other guest ever has it.
            if guest in (member.name, str(member.domid), member.generation):
                request = _request(member, region_id)
                if request is not None:
                    return region, member, request
        raise NoSuchGuest(
            f"guest {guest} has no part in region {region_id}",
            hint="xshmctl show says who has one",
            guest=guest,
            region=region_id,
        )

    def _cancel_left(self, event: Event) -> None:
        # Who left may be back already, and is another then.
        for posted in self._lists:
            if posted.region_id != event.region:
                continue
            if event.kind is EventKind.REGION_REMOVED:
                self._lists.cancel(posted.list_id, f"region {event.region} is gone")
            elif event.kind is EventKind.PEER_LEFT and posted.part.guest == event.guest:
                self._lists.cancel(posted.list_id, _left(posted))

    def _cancel_orphans(self) -> None:
        snapshot = self._regions.snapshot()
        regions = {each.region_id for each in snapshot.regions}
        have = {
            (guest.generation, request.region_id)
            for guest in snapshot.guests
            if guest.state is GuestState.ATTACHED
            for request in guest.requests
        }
        for posted in self._lists:
            if posted.region_id not in regions:
                self._lists.cancel(posted.list_id, f"region {posted.region_id} is gone")
            elif posted.part.generation and (posted.part.generation, posted.region_id) not in have:
                self._lists.cancel(posted.list_id, _left(posted))

    def _done(self, posted: PostedList, outcome: Outcome) -> None:
        cancelled = isinstance(outcome, ListCancelled)
        self.counts["lists_cancelled" if cancelled else "lists_done"] += 1
        if (waiting := self._waiting.pop(posted.list_id, None)) is not None:
            waiting.set()


def _left(posted: PostedList) -> str:
    return f"guest {posted.part.guest} left region {posted.region_id}"


def _request(guest: Guest, region_id: str) -> RegionRequest | None:
    if guest.state is not GuestState.ATTACHED:
        return None
    return next((each for each in guest.requests if each.region_id == region_id), None)


def _part(guest: Guest | None, ranges: tuple[ByteRange, ...]) -> Part:
    if guest is None:
        return Part(guest=DOM0, generation=DOM0, ranges=ranges)
    return Part(guest=guest.name, generation=guest.generation, ranges=ranges)


def _check(region: Region, request: RegionRequest | None, part: Part, *, writes: bool) -> None:
    """Refuse what the engine would refuse, before a list is posted or taken for it."""
    in_one_holder = region.terms.backing is Backing.HOLDER and len(region.parts) == 1
    if region.terms.is_sealed or not in_one_holder:
        raise Refused(
            f"nothing is copied in region {region.region_id}: it is sealed, or in several holders, "
            "or the host's memory",
            hint="have its guests copy, or let it be a plain region",
            region=region.region_id,
        )
    if request is None:
        check_list(part.ranges, region.size_bytes, f"region {region.region_id}")
        return
    what = f"what guest {part.guest} has of region {region.region_id}"
    check_list(part.ranges, bytes_of(request.nr_frames), what)
    if writes and request.prot is not Prot.RW:
        raise Refused(
            f"guest {part.guest} may only read region {region.region_id}",
            hint="post a list for output, or give it the region rw",
            guest=part.guest,
            region=region.region_id,
        )
