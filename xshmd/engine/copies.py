# SPDX-License-Identifier: LGPL-2.1-or-later
"""dom0 copies between guests' parts of a region: who has what is looked up in the same breath.

It happens in the reconciler's loop, like every access of dom0's: no guest leaves, no region is
freed and no grant reference is given away between the look and the copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from xshmd.engine.access import reachable
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import NoSuchGuest, OutOfRange, Refused
from xshmd.model import GuestState, Holder, Prot, Region, Transport
from xshmd.policy.grants import free_refs
from xshmd.ports import Hypervisor
from xshmd.ranges import ByteRange, Part, check_apart, check_list, nr_frames_of
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn, bytes_of

WORD_BYTES: Final = 8


class Copies:
    """Implements :class:`xshmd.api.PartCopier`.  Used by the reconciler alone."""

    def __init__(
        self, *, xen: Hypervisor, worker: XenWorker, ledger: Ledger, holders: Holders
    ) -> None:
        self._xen, self._worker, self._ledger, self._holders = xen, worker, ledger, holders

    async def copy(self, region_id: str, source: Part, target: Part, count_at: Part | None) -> int:
        """Do as :meth:`xshmd.api.PartCopier.copy_parts`."""
        region, holder = reachable(self._ledger, self._holders, region_id)
        from_ranges = self._ranges(region, source, writes=False)
        to_ranges = self._ranges(region, target, writes=True)
        count: list[ByteRange] = []
        if count_at is not None:
            count = self._ranges(region, count_at, writes=True)
            if len(count) != 1 or count[0].nr_bytes != WORD_BYTES or count[0].offset_bytes % 8:
                raise OutOfRange(f"the count of a list is one aligned word of {WORD_BYTES} bytes")
        check_apart(from_ranges, to_ranges, count)
        start = region.holder_first_gfn << PAGE_SHIFT
        lists = [[each.moved(start) for each in ranges] for ranges in (from_ranges, to_ranges)]
        count_word = start + count[0].offset_bytes if count else None
        first_ref = self._free_refs(region, holder, lists)
        if first_ref is None:
            copy = functools.partial(self._xen.copy_ranges, holder.domid, *lists)
        else:
            copy = functools.partial(self._xen.copy_granted, holder.domid, first_ref, *lists)
        return await self._worker.run(functools.partial(copy, count_at=count_word))

    def _free_refs(
        self, region: Region, holder: Holder, lists: Sequence[Sequence[ByteRange]]
    ) -> int | None:
        """Return references by which Xen may copy; None if dom0 maps what it copies.

        Those that guests have are for them alone, so a copy takes some that nobody has.
        """
        if region.terms.transport is not Transport.GRANT:
            return None
        guests = self._ledger.guests
        taken = [one for guest in guests for one in guest.grants if one.holder_uuid == holder.uuid]
        return free_refs(holder, taken, sum(map(nr_frames_of, lists)))

    async def read(self, region_id: str, part: Part) -> bytes:
        """Do as :meth:`xshmd.api.PartCopier.read_part`."""
        region, holder = reachable(self._ledger, self._holders, region_id)
        (wanted,) = self._ranges(region, part, writes=False)
        return await self._worker.run(self._in_page, holder.domid, region, wanted, None)

    async def write(self, region_id: str, part: Part, data: bytes) -> None:
        """Do as :meth:`xshmd.api.PartCopier.write_part`."""
        region, holder = reachable(self._ledger, self._holders, region_id)
        (wanted,) = self._ranges(region, part, writes=True)
        await self._worker.run(self._in_page, holder.domid, region, wanted, data)

    def _in_page(
        self, domid: DomId, region: Region, wanted: ByteRange, data: bytes | None
    ) -> bytes:
        """Write the data, or return what is there."""
        frame, skip = divmod(wanted.offset_bytes, PAGE_SIZE)
        gfn = Gfn(region.holder_first_gfn + frame)
        pages = self._xen.map_pages(domid, gfn, 1, writable=data is not None)
        try:
            if data is None:
                return pages.read(skip, wanted.nr_bytes)
            pages.write(skip, data)
            return data
        finally:
            pages.close()

    def _ranges(self, region: Region, part: Part, *, writes: bool) -> list[ByteRange]:
        """Return the ranges as those of the region, if they are the guest's to name."""
        if not part.generation:
            check_list(part.ranges, region.size_bytes, f"region {region.region_id}")
            return list(part.ranges)
        guest = self._ledger.guest(part.generation)
        request = next(
            (each for each in guest.requests if each.region_id == region.region_id)
            if guest is not None and guest.state is GuestState.ATTACHED
            else iter(()),
            None,
        )
        if request is None:
            raise NoSuchGuest(
                f"guest {part.guest} has no part in region {region.region_id} (any more)",
                hint="xshmctl show says who has one",
                guest=part.guest,
                region=region.region_id,
            )
        if writes and request.prot is not Prot.RW:
            raise Refused(
                f"guest {part.guest} may only read region {region.region_id}, so nothing is "
                "written there at its word",
                hint="have it write into a region that it has rw",
                guest=part.guest,
                region=region.region_id,
            )
        what = f"what guest {part.guest} has of region {region.region_id}"
        check_list(part.ranges, bytes_of(request.nr_frames), what)
        return [each.moved(bytes_of(request.offset_frames)) for each in part.ranges]
