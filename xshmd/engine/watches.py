# SPDX-License-Identifier: LGPL-2.1-or-later
"""dom0's clients among those that watch a byte of a region, and trigger it.

The watches are in the region's control page (:mod:`xshmd.share.control_page`), dom0's in a row of
its own: a guest that triggers a byte finds them there and rings dom0.  What it is rung for nobody
says, so every client whose counter is not above 0 is woken, and looks for itself.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final, TypeVar

import trio

from xshmd.engine.doorbells import Doorbells
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.errors import Conflict, NoSuchRegion, Refused, UsageError, XshmError
from xshmd.model import Region
from xshmd.ports import Hypervisor, PageMap
from xshmd.share.control_page import (
    DOM0,
    NO_COUNTER,
    WATCHES_PER_PEER,
    Watch,
    encode_watch,
    watch_at,
    watches,
)
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, Gfn

T = TypeVar("T")
Ask = Callable[[Callable[[], Awaitable[T]]], Awaitable[T]]
Slot = tuple[str, int]
"""Region, and which of dom0's watches in it."""
WORD_BYTES: Final = 4


class Watches:
    """See the module.  What writes into a region happens in the reconciler's loop."""

    def __init__(
        self, *, xen: Hypervisor, ledger: Ledger, holders: Holders, doorbells: Doorbells
    ) -> None:
        self._xen, self._ledger, self._holders = xen, ledger, holders
        self._doorbells = doorbells
        self._wanted: dict[Slot, Watch] = {}
        self._listeners: dict[Slot, set[trio.MemorySendChannel[None]]] = {}

    @asynccontextmanager
    async def watch(
        self, ask: Ask[None], region_id: str, address: int, counter: int | None
    ) -> AsyncIterator[trio.MemoryReceiveChannel[None]]:
        """Do as :meth:`xshmd.api.RegionsApi.watch`.

        Args:
            ask: Has the reconciler's loop do something.
            region_id: The region.
            address: Offset of the byte.
            counter: Offset of the counter, if there is one.
        """
        wanted = Watch(DOM0, address, NO_COUNTER if counter is None else counter)
        send, receive = trio.open_memory_channel[None](1)
        slots: list[Slot] = []

        async def begin() -> None:
            slots.append(self._begin(region_id, wanted))
            self._listeners.setdefault(slots[0], set()).add(send)

        try:
            await ask(begin)
            with send, receive:
                yield receive
        finally:
            for slot in slots:
                self._listeners[slot].discard(send)
                if not self._listeners[slot]:
                    self._end(slot)

    def _begin(self, region_id: str, wanted: Watch) -> Slot:
        region = self._find(region_id)
        _check_byte(region, wanted.address)
        if wanted.counter != NO_COUNTER:
            _check_counter(region, wanted.counter)
        for slot, known in self._wanted.items():
            if slot[0] == region_id and known == wanted:
                return slot
        free = next(
            (n for n in range(WATCHES_PER_PEER) if (region_id, n) not in self._wanted), None
        )
        if free is None:
            raise Conflict(
                f"dom0 watches {WATCHES_PER_PEER} places of region {region_id} already",
                hint="stop watching one, or let several share a place",
                id=region_id,
            )
        self._write(region, free, encode_watch(wanted.address, wanted.counter))
        self._wanted[region_id, free] = wanted
        return region_id, free

    def _end(self, slot: Slot) -> None:
        del self._listeners[slot], self._wanted[slot]
        region = self._ledger.region(slot[0])
        if region is not None and region.ready:
            # Outside the loop, whose end this may be: nothing is written but zeros.
            with suppress(XshmError):
                self._write(region, slot[1], encode_watch(None))

    def _write(self, region: Region, slot: int, data: bytes) -> None:
        with self._frame(region, region.nr_frames - 1, writable=True) as page:
            page.write(watch_at(DOM0, slot), data)

    def trigger(self, region_id: str, address: int) -> int:
        """Do as :meth:`xshmd.api.RegionsApi.trigger`."""
        region = self._find(region_id)
        _check_byte(region, address)
        with self._frame(region, region.nr_frames - 1, writable=False) as page:
            found = [
                watch
                for watch in watches(page.read(0, PAGE_SIZE), region.size_bytes)
                if watch.address == address
            ]
        due = {watch.peer_id for watch in found if self._is_due(region, watch)}
        woken = sum(self._doorbells.ring(region_id, peer_id) for peer_id in due - {DOM0})
        if DOM0 in due:
            self._wake(region_id)
        return woken + (DOM0 in due)

    def _is_due(self, region: Region, watch: Watch) -> bool:
        if watch.counter == NO_COUNTER:
            return True
        frame, offset = divmod(watch.counter, PAGE_SIZE)
        with self._frame(region, frame, writable=True) as page:
            return page.decrement(offset) == 0

    def rung(self, region_id: str) -> None:
        """A peer has rung dom0: wake every client that may be meant."""
        region = self._ledger.region(region_id)
        if region is not None:
            self._wake(region_id)

    def _wake(self, region_id: str) -> None:
        for slot, listeners in self._listeners.items():
            if slot[0] != region_id or self._counts_on(slot):
                continue
            for listener in listeners:
                with suppress(trio.WouldBlock, trio.BrokenResourceError):
                    listener.send_nowait(None)

    def _counts_on(self, slot: Slot) -> bool:
        """Return whether a slot's counter is above 0: then it is not due yet."""
        region, counter = self._ledger.region(slot[0]), self._wanted[slot].counter
        if counter == NO_COUNTER or region is None:
            return False
        frame, offset = divmod(counter, PAGE_SIZE)
        try:
            with self._frame(region, frame, writable=False) as page:
                (left,) = struct.unpack("<I", page.read(offset, WORD_BYTES))
        except XshmError:
            return False
        return bool(left)

    # -- the region -----------------------------------------------------------------------------

    def _find(self, region_id: str) -> Region:
        region = self._ledger.region(region_id)
        if region is None:
            raise NoSuchRegion(
                f"there is no region {region_id}",
                hint="xshmctl list shows those there are",
                id=region_id,
            )
        if not region.terms.doorbells:
            raise Refused(
                f"region {region_id} has no doorbells, so nobody can watch it",
                hint="say doorbells= where it is defined",
                id=region_id,
            )
        return region

    @contextmanager
    def _frame(self, region: Region, frame: int, *, writable: bool) -> Iterator[PageMap]:
        holder = self._ledger.holder(region.holder_uuid)
        if holder is None or not region.ready:
            raise Conflict(
                f"the memory of region {region.region_id} is not there (any more)",
                hint="xshmctl show says how it is; try again",
                id=region.region_id,
            )
        self._holders.verify(holder)
        gfn = Gfn(region.holder_first_gfn + frame)
        page = self._xen.map_pages(holder.domid, gfn, 1, writable=writable)
        try:
            yield page
        finally:
            page.close()


def _check_byte(region: Region, address: int) -> None:
    if not 0 <= address < region.size_bytes:
        raise UsageError(
            f"byte {address} is not in region {region.region_id}",
            hint=f"it has {region.size_bytes} bytes",
        )


def _check_counter(region: Region, counter: int) -> None:
    last = ((region.nr_frames - 1) << PAGE_SHIFT) - WORD_BYTES
    if counter % WORD_BYTES or not 0 < counter <= last:
        raise UsageError(
            f"there can be no counter at byte {counter} of region {region.region_id}",
            hint=f"say a multiple of {WORD_BYTES}, from {WORD_BYTES} to {last}",
        )
