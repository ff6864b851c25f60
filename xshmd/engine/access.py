# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads and writes the bytes of a region from dom0: to fill it beforehand, or to look into it.

It happens in the reconciler's loop, so no region is freed meanwhile: what was written after the
wipe would be left in a page that Xen gives to somebody else.
"""

from __future__ import annotations

import structlog

from xshmd.api import MAX_ACCESS_BYTES
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.engine.lent import Lent
from xshmd.engine.windows import Windows
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import Conflict, NoSuchRegion, Refused, UsageError
from xshmd.model import Backing, Holder, Piece, Region
from xshmd.ports import Hypervisor, Keeper
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn, bytes_of, is_within

log = structlog.get_logger()


class Access:
    """dom0's own way into regions.  Used by the reconciler alone."""

    def __init__(
        self,
        *,
        xen: Hypervisor,
        keeper: Keeper,
        worker: XenWorker,
        ledger: Ledger,
        holders: Holders,
        windows: Windows,
        lent: Lent,
    ) -> None:
        self._xen, self._worker, self._ledger, self._holders = xen, worker, ledger, holders
        self._keeper, self._windows, self._lent = keeper, windows, lent
        self._written: tuple[str, int] = ("", 0)
        """Where the last write ended: region and byte."""

    async def read(self, region_id: str, offset_bytes: int, nr_bytes: int) -> bytes:
        """Do as :meth:`xshmd.api.RegionsApi.read_region`."""
        spans = self._find(region_id, offset_bytes, nr_bytes)
        if (region := self._kept(region_id)) is not None:
            if not region.kept:
                return bytes(nr_bytes)
            return await self._worker.run(self._keeper.read, region.kept, offset_bytes, nr_bytes)
        return b"".join([await self._worker.run(self._read_now, *span) for span in spans])

    async def write(
        self, region_id: str, offset_bytes: int, data: bytes, *, dry_run: bool = False
    ) -> None:
        """Do as :meth:`xshmd.api.RegionsApi.write_region`, and leave a line in the log."""
        spans = self._find(region_id, offset_bytes, len(data))
        if dry_run:
            return
        if self._kept(region_id) is not None:
            await self._write_kept(region_id, offset_bytes, data)
            spans = []
        done = 0
        for domid, start, nr_bytes in spans:
            await self._worker.run(self._write_now, domid, start, data[done : done + nr_bytes])
            done += nr_bytes
        # A large load comes in many pieces: one line says where it began, for a flood of them
        # would have the journal drop others.
        say = log.debug if self._written == (region_id, offset_bytes) else log.info
        say("region written", region=region_id, offset_bytes=offset_bytes, nr_bytes=len(data))
        self._written = (region_id, offset_bytes + len(data))

    def _kept(self, region_id: str) -> Region | None:
        """Return the region if it is one that only the keeper can reach."""
        region = self._ledger.region(region_id)
        ours = region is not None and (region.terms.is_sealed or region.terms.is_lent)
        return region if ours else None

    async def _write_kept(self, region_id: str, offset_bytes: int, data: bytes) -> None:
        region = self._kept(region_id)
        if region is not None and not region.kept:  # nobody has had it yet
            if region.terms.is_lent:
                await self._lent.have_memory(region)
            else:
                await self._windows.renew(region.holder_uuid, [region_id], reason="written")
            region = self._kept(region_id)
        if region is not None:
            await self._worker.run(self._keeper.write, region.kept, offset_bytes, data)

    def _find(
        self, region_id: str, offset_bytes: int, nr_bytes: int
    ) -> list[tuple[DomId, int, int]]:
        """Return the domains to map, the byte of each at which to begin, and how many bytes."""
        region, parts = reachable_parts(self._ledger, self._holders, region_id)
        _check_bounds(region, offset_bytes, nr_bytes)
        spans = []
        for part, holder in parts:
            first = bytes_of(part.offset_frames)
            begin = max(offset_bytes, first)
            end = min(offset_bytes + nr_bytes, first + bytes_of(part.nr_frames))
            if begin < end:
                start = bytes_of(part.holder_first_gfn) + begin - first
                spans.append((holder.domid, start, end - begin))
        return spans

    def _read_now(self, domid: DomId, start: int, nr_bytes: int) -> bytes:
        first_gfn, skip, nr_frames = _frames(start, nr_bytes)
        pages = self._xen.map_pages(domid, first_gfn, nr_frames, writable=False)
        try:
            return pages.read(skip, nr_bytes)
        finally:
            pages.close()

    def _write_now(self, domid: DomId, start: int, data: bytes) -> None:
        first_gfn, skip, nr_frames = _frames(start, len(data))
        pages = self._xen.map_pages(domid, first_gfn, nr_frames, writable=True)
        try:
            pages.write(skip, data)
        finally:
            pages.close()


def reachable(ledger: Ledger, holders: Holders, region_id: str) -> tuple[Region, Holder]:
    """Return a region whose frames dom0 can map in one go, and its holder, whose domid is pinned.

    Raises:
        NoSuchRegion, Conflict, Refused: it is not there, not ready or not to be had this way.
    """
    region, parts = reachable_parts(ledger, holders, region_id)
    if region.terms.is_lent:
        raise Refused(
            f"region {region_id} is dom0's own memory, on other pages in each life of its guest: it"
            " is not to be mapped by others",
            hint="read and write it with `xshmctl dump` and `xshmctl load`",
            rule="lease-backing",
            id=region_id,
        )
    if region.terms.is_sealed:
        raise Refused(
            f"region {region_id} is sealed: its memory is not to be mapped in dom0",
            hint="read and write it with `xshmctl dump` and `xshmctl load`",
            rule="lease-isolation",
            id=region_id,
        )
    if len(parts) > 1:
        raise Refused(
            f"region {region_id} is in {len(parts)} holders: one grant table is too small for it",
            hint="read and write it with `xshmctl dump` and `xshmctl load`",
            id=region_id,
        )
    return region, parts[0][1]


def reachable_parts(
    ledger: Ledger, holders: Holders, region_id: str
) -> tuple[Region, tuple[tuple[Piece, Holder], ...]]:
    """Do as :func:`reachable`, wherever its frames are."""
    region = ledger.region(region_id)
    if region is None:
        raise NoSuchRegion(
            f"there is no region {region_id}",
            hint="xshmctl list shows those there are",
            id=region_id,
        )
    if region.terms.backing is Backing.HOST:
        raise Refused(
            f"region {region_id} is memory of the host, which xshmd itself does not touch",
            hint="read or write it in a guest that has it",
            id=region_id,
        )
    found = []
    for part in region.parts:
        holder = ledger.holder(part.holder_uuid)
        if not region.ready or holder is None:
            raise Conflict(
                f"the memory of region {region_id} is not there (any more)",
                hint="xshmctl show says how it is; try again",
                id=region_id,
            )
        holders.verify(holder)
        found.append((part, holder))
    return region, tuple(found)


def _check_bounds(region: Region, offset_bytes: int, nr_bytes: int) -> None:
    if not 1 <= nr_bytes <= MAX_ACCESS_BYTES:
        raise UsageError(
            f"{nr_bytes} bytes of a region at a time",
            hint=f"read and write it in pieces of 1 to {MAX_ACCESS_BYTES} bytes",
        )
    if not is_within(offset_bytes, nr_bytes, region.size_bytes):
        raise UsageError(
            f"{nr_bytes} bytes at {offset_bytes} are not in region {region.region_id}",
            hint=f"it has {region.size_bytes} bytes",
        )


def _frames(start: int, nr_bytes: int) -> tuple[Gfn, int, int]:
    """Return the frames that hold a range of bytes: the first, the bytes to skip, how many."""
    first, skip = start >> PAGE_SHIFT, start % PAGE_SIZE
    return Gfn(first), skip, -(-(skip + nr_bytes) // PAGE_SIZE)
