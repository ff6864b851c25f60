# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holders and their frames: made by the recipe, known by UUID, never destroyed while targeted.

Each holder has one *anchor* frame that belongs to no region.  dom0 keeps it mapped: while it is,
the holder's domid cannot be given to another domain, so what was verified stays true.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from xshmd.engine.events import EventHub
from xshmd.engine.ledger import Ledger
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import Conflict, HypercallFailed, OutOfMemory, StoreTrouble, XshmError
from xshmd.events import Event, EventKind
from xshmd.machine import DomainInfo
from xshmd.model import NOWHERE, Backing, Holder, Piece, Region
from xshmd.policy.host_ranges import check_shareable
from xshmd.policy.identity import new_holder_uuid
from xshmd.policy.plan import NewRegion
from xshmd.policy.sealing import check_alike
from xshmd.ports import Hypervisor, Keeper, PageMap, Store
from xshmd.units import PAGE_SIZE, SUPERPAGE_FRAMES, DomId, Gfn, Mfn, bytes_of, human_size

log = structlog.get_logger()

ANCHOR_GFN: Final = Gfn(0x40000)
"""1 GiB: ordinary RAM to either architecture's memory map, were the holder ever to run."""
FIRST_REGION_GFN: Final = Gfn(ANCHOR_GFN + SUPERPAGE_FRAMES)
NO_DOMAIN: Final = DomId(-1)
"""In a holder's record: the domain is about to be made."""
WIPE_FRAMES: Final = 4096
"""Frames looked at and wiped, or copied, at a time."""
POOL_SLACK_FRAMES: Final = 16
"""Paging-pool frames beyond the computed need: top-level tables, and Xen's own rounding."""
MORE_MEMORY: Final = "end guests or give dom0 less memory (`xl mem-set 0 ...`)"


def table_frames(nr_frames: int) -> int:
    """Return how many p2m table frames map ``nr_frames`` 4 KiB entries, at the most.

    One leaf table holds 512 entries, one above it 512 leaves; two more for an unaligned start.
    """
    return -(-nr_frames // SUPERPAGE_FRAMES) + -(-nr_frames // SUPERPAGE_FRAMES**2) + 4


def enlarge_paging_pool(xen: Hypervisor, domid: DomId, ranges: Iterable[int]) -> None:
    """Give the domain's p2m the table frames that more 4 KiB entries need.

    Args:
        xen: The hypervisor.
        domid: The domain.
        ranges: How many frames each new contiguous range has.

    Raises:
        OutOfMemory: the host has not that much; the pool is as it was.
    """
    extra_frames = POOL_SLACK_FRAMES + sum(table_frames(nr_frames) for nr_frames in ranges)
    before = xen.paging_pool_bytes(domid)
    try:
        xen.set_paging_pool_bytes(domid, before + bytes_of(extra_frames))
    except HypercallFailed as error:
        if error.errno != errno.ENOMEM:
            raise
        # Xen stops where it cannot go on (hap_set_allocation(), p2m_set_allocation()).
        if xen.paging_pool_bytes(domid) > before:
            xen.set_paging_pool_bytes(domid, before)
        raise OutOfMemory(
            f"domain {domid} needs {human_size(bytes_of(extra_frames))} for its page tables and "
            f"the host has {human_size(xen.host_info().free_bytes)} free",
            hint=MORE_MEMORY,
        ) from error


class Holders:
    """Makes, verifies, fills and destroys holders.  Used by the reconciler alone."""

    def __init__(
        self,
        xen: Hypervisor,
        worker: XenWorker,
        store: Store,
        ledger: Ledger,
        hub: EventHub,
        *,
        floor_bytes: int,
        on_created: Callable[[Holder], None],
        keeper: Keeper,
    ) -> None:
        self._keeper = keeper
        self._xen, self._worker, self._store, self._ledger = xen, worker, store, ledger
        self._hub = hub
        self._floor_bytes, self._on_created = floor_bytes, on_created
        self._anchors: dict[str, PageMap] = {}

    def close(self) -> None:
        """Drop the anchors' mappings; the holders live on."""
        for anchor in self._anchors.values():
            anchor.close()
        self._anchors.clear()

    # -- a holder's life ------------------------------------------------------------------------

    async def create(self, *, nr_grant_frames: int = 1) -> Holder:
        """Make a holder with nothing in it but its anchor; with more frames it serves grants."""
        holder = await self._ledger.put_holder(
            Holder(
                uuid=new_holder_uuid(), domid=NO_DOMAIN, next_gfn=FIRST_REGION_GFN,
                nr_grant_frames=nr_grant_frames,
            )
        )  # fmt: skip
        try:
            domid = await self._worker.run(self._make_domain, holder)
        except XshmError:
            await self._ledger.drop_holder(holder.uuid)
            raise
        holder = await self._ledger.put_holder(dataclasses.replace(holder, domid=domid))
        self.verify(holder)
        await self._name(holder)
        self._on_created(holder)
        self._say(EventKind.HOLDER_CREATED, holder)
        return holder

    def _make_domain(self, holder: Holder) -> DomId:
        domid = self._xen.create_holder_domain(holder.uuid, nr_grant_frames=holder.nr_grant_frames)
        try:
            enlarge_paging_pool(self._xen, domid, [1])
            self._xen.set_max_pages(domid, 1)
            self._xen.populate(domid, ANCHOR_GFN, 1)
            self._xen.zero(domid, ANCHOR_GFN, 1)
            self._xen.set_max_pages(domid, 0)
        except XshmError:
            self._xen.destroy(domid)
            raise
        return domid

    async def _name(self, holder: Holder) -> None:
        # So that `xl list` shows it by name, and `xl shutdown -a` and xendomains, which ask every
        # domain's type and write to its control/shutdown, neither stop at it nor fail
        # (tools/libs/light/libxl_dom.c libxl__domain_type, libxl_domain.c).
        at = f"/local/domain/{holder.domid}"
        await self._store.write_many(
            [
                (f"{at}/name", f"xshm-{holder.uuid[-8:]}"),
                (f"{at}/control/shutdown", ""),
                (f"/libxl/{holder.domid}/type", "pvh"),
            ]
        )

    def verify(self, holder: Holder) -> DomainInfo:
        """Pin the holder's domid, then prove that the domain of that number is this holder.

        Raises:
            Conflict: it is not; whatever it is, it is left alone.
        """
        if holder.domid == NO_DOMAIN:
            raise self._lost(holder, "it was never made")
        if holder.uuid not in self._anchors:
            try:
                self._anchors[holder.uuid] = self._xen.map_pages(
                    holder.domid, ANCHOR_GFN, 1, writable=False
                )
            except HypercallFailed as error:
                if not self._is_kept(holder):
                    raise self._lost(holder, error.message) from error
        info = self._xen.domain_info(holder.domid)
        if info is None or info.uuid != holder.uuid or not (info.hvm and info.hap) or info.dying:
            if (anchor := self._anchors.pop(holder.uuid, None)) is not None:
                anchor.close()
            raise self._lost(holder, "the domain of its number is another")
        return info

    def _is_kept(self, holder: Holder) -> bool:
        """Return whether the keeper has pages of it, which pin its domid as the anchor does.

        A member can take the anchor, but not those.
        """
        kept = {region.kept for region in self._ledger.regions}
        theirs = [name for name in kept if name.startswith(f"{holder.uuid}.")]
        try:
            return bool(theirs) and not self._keeper.kept().keys().isdisjoint(theirs)
        except XshmError:
            return False

    @staticmethod
    def _lost(holder: Holder, why: str) -> Conflict:
        return Conflict(
            f"the holder {holder.uuid}, domain {holder.domid}, is gone: {why}",
            hint="its regions are lost; end the guests that had them and start them anew",
            holder=holder.uuid,
            domid=holder.domid,
        )

    def having(self, uuid: str) -> Holder:
        """Return the holder with this UUID; Conflict if there is none any more."""
        holder = self._ledger.holder(uuid)
        if holder is None:
            raise Conflict(
                f"the holder {uuid} is gone, and its regions with it",
                hint="end the guests that had them and start them anew",
                holder=uuid,
            )
        return holder

    async def destroy(self, holder: Holder) -> None:
        """Destroy a holder that no live guest targets; Xen scrubs its pages as it frees them."""
        for region in self._ledger.regions:
            if region.holder_uuid == holder.uuid:
                await self._let_go(region)
        anchor = self._anchors.pop(holder.uuid, None)
        await self._worker.run(self._destroy_now, holder, anchor)
        if holder.domid != NO_DOMAIN:
            await self._remove_nodes(holder)
            self._say(EventKind.HOLDER_DESTROYED, holder)
        await self._ledger.drop_holder(holder.uuid)

    def _say(self, kind: EventKind, holder: Holder, reason: str = "") -> None:
        self._hub.emit(Event(kind=kind, domid=holder.domid, holder_uuid=holder.uuid, reason=reason))

    def _destroy_now(self, holder: Holder, anchor: PageMap | None) -> None:
        for info in self._xen.domains():
            # By UUID alone: the record of one that was being made may not have its domid yet.
            if info.uuid == holder.uuid and not info.dying:
                self._xen.destroy(info.domid)
        if anchor is not None:
            anchor.close()

    async def lose(self, holder: Holder) -> None:
        """Drop the records of a holder that is gone, and of its regions."""
        anchor = self._anchors.pop(holder.uuid, None)
        if anchor is not None:
            anchor.close()
        for region in self._ledger.regions:
            # One that has frames in others as well is freed there, when it is found to be lost.
            if region.holder_uuids == {holder.uuid}:
                await self._let_go(region, wipe=False)  # guests that run still have it
                await self._ledger.drop_region(region.region_id)
        info = self._xen.domain_info(holder.domid)
        if info is None or info.uuid == holder.uuid:
            # Nobody introduced it to xenstored, so nobody else removes its nodes; but if the number
            # is another domain's by now, so are they.
            await self._remove_nodes(holder)
        await self._ledger.drop_holder(holder.uuid)
        self._say(EventKind.HOLDER_LOST, holder, "destroyed by somebody else")

    async def _let_go(self, region: Region, *, wipe: bool = True) -> None:
        """Have the pages of a sealed region free once nobody has them."""
        if region.kept:
            await self._worker.run(lambda: self._keeper.drop(region.kept, wipe=wipe))

    async def _remove_nodes(self, holder: Holder) -> None:
        await self._store.remove(f"/local/domain/{holder.domid}")
        await self._store.remove(f"/libxl/{holder.domid}")

    # -- regions in it --------------------------------------------------------------------------

    async def add_region(
        self, holder_uuid: str, new: NewRegion, *, reason: str, owner_came: bool = False
    ) -> Region:
        """Give the holder fresh, zeroed frames for a region; host memory is left as it is.

        Args:
            holder_uuid: The holder.
            new: What is to be made.
            reason: Why, for the event of it.
            owner_came: Whether it is the region's owner that it is made for.

        Raises:
            OutOfMemory: the host has not that much, or too little would be left; nothing is done.
        """
        region_id, nr_frames = new.region_id, new.nr_fresh_frames
        if new.terms.backing is Backing.HOST:
            self._check_host_memory(new)
        holder = self._ledger.holder(holder_uuid)
        if holder is None:
            raise Conflict(
                f"the holder of region {region_id} is gone", hint="start the guest again"
            )
        self.check_memory(f"region {region_id}", nr_frames)
        theirs = [one for one in self._ledger.regions if one.holder_uuid == holder.uuid]
        check_alike([*((one.region_id, one.terms) for one in theirs), (region_id, new.terms)])
        if new.terms.is_sealed:
            nr_frames = 0  # they are made in a window
        region = Region(
            region_id=region_id, nr_frames=new.nr_frames, holder_uuid=holder.uuid,
            holder_first_gfn=self.next_gfn(holder), owner=new.owner, owner_came=owner_came,
            lifetime=new.lifetime, terms=new.terms, from_file=new.from_file,
        )  # fmt: skip
        await self._populate(holder, region, nr_frames)
        region = await self._ledger.put_region(dataclasses.replace(region, ready=True))
        self._hub.about_region(EventKind.REGION_CREATED, region, reason)
        return region

    @staticmethod
    def next_gfn(holder: Holder) -> Gfn:
        """Return where the next region of a holder begins."""
        return Gfn(-(-holder.next_gfn // SUPERPAGE_FRAMES) * SUPERPAGE_FRAMES)

    async def _populate(self, holder: Holder, region: Region, nr_frames: int) -> None:
        """Record a region that is not ready, and make its frames, of which there may be none."""
        first = region.holder_first_gfn
        # In this order: should only the first arrive, frames are passed over, never used twice.
        await self._ledger.put_holder(
            dataclasses.replace(holder, next_gfn=Gfn(first + nr_frames)), and_region=region
        )
        try:
            self.verify(holder)
            if nr_frames:
                await self._worker.run(self._populate_now, holder.domid, first, nr_frames)
        except StoreTrouble:
            raise  # the unready record says what to undo
        except XshmError:
            await self._ledger.drop_region(region.region_id)
            raise

    async def populate(self, piece: Piece) -> None:
        """Make the fresh, zeroed frames of a piece whose region is recorded."""
        holder = self.having(piece.holder_uuid)
        self.verify(holder)
        await self._worker.run(
            self._populate_now, holder.domid, piece.holder_first_gfn, piece.nr_frames
        )

    async def move_region(self, region: Region, holder_uuid: str, *, reason: str) -> None:
        """Have a region that no guest has in another holder, with all that is in it.

        Raises:
            OutOfMemory: the host cannot have it twice for a moment; nothing is done.
        """
        old, holder = self._ledger.holder(region.holder_uuid), self._ledger.holder(holder_uuid)
        if old is None or holder is None:
            raise Conflict(
                f"a holder of region {region.region_id} is gone", hint="start the guest again"
            )
        if region.terms.backing is Backing.HOST or region.terms.is_sealed:
            # The next window of a sealed region takes what is in it along.
            await self._ledger.put_region(dataclasses.replace(region, holder_uuid=holder_uuid))
            return
        self.check_memory(f"region {region.region_id}, for a moment twice,", region.nr_frames)
        moved = dataclasses.replace(
            region, holder_uuid=holder_uuid, holder_first_gfn=self.next_gfn(holder)
        )
        # No region can have this id, so it is nobody's; unready, so it goes if we are cut off.
        other_id = f"{region.region_id}-moving"
        copy = dataclasses.replace(moved, region_id=other_id, ready=False)
        await self._populate(holder, copy, region.nr_frames)
        self.verify(old)
        await self._worker.run(self._copy_now, old.domid, region, holder.domid, moved)
        left = dataclasses.replace(region, region_id=other_id, ready=False)
        await self._ledger.swap_regions(moved, left)
        await self.free_frames(left)
        log.info("region moved", region=region.region_id, holder=holder_uuid, reason=reason)

    def _copy_now(self, source: DomId, region: Region, target: DomId, copy: Region) -> None:
        for start in range(0, region.nr_frames, WIPE_FRAMES):
            count = min(WIPE_FRAMES, region.nr_frames - start)
            there = self._xen.map_pages(
                source, Gfn(region.holder_first_gfn + start), count, writable=False
            )
            with contextlib.closing(there):
                here = self._xen.map_pages(
                    target, Gfn(copy.holder_first_gfn + start), count, writable=True
                )
                with contextlib.closing(here):
                    here.write(0, there.read(0, bytes_of(count)))

    def _check_host_memory(self, new: NewRegion) -> None:
        first_mfn = new.terms.host_first_mfn
        if first_mfn is None:
            raise AssertionError(f"region {new.region_id} is the host's and nowhere there")
        ranges = self._xen.host_ranges()
        check_shareable(ranges, new.region_id, Mfn(first_mfn), new.nr_frames, NOWHERE)

    def check_memory(self, what: str, nr_frames: int) -> None:
        """Raise OutOfMemory if the host has too little for ``what``, a region so large."""
        host = self._xen.host_info()
        needed_bytes = bytes_of(nr_frames + table_frames(nr_frames)) + self._floor_bytes
        if host.free_bytes < needed_bytes:
            raise OutOfMemory(
                f"{what} needs {human_size(bytes_of(nr_frames))} and the host has "
                f"{human_size(host.free_bytes)} free, of which {human_size(self._floor_bytes)} "
                "stay free",
                hint=MORE_MEMORY,
            )

    def _populate_now(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        info = self._xen.domain_info(domid)
        held = info.tot_pages if info else 0
        enlarge_paging_pool(self._xen, domid, [nr_frames])
        self._xen.set_max_pages(domid, held + nr_frames)
        try:
            self._xen.populate(domid, first_gfn, nr_frames)
            # Pages that a running guest gave back by ballooning come with what it left in them:
            # Xen scrubs only what dying domains leave (page_alloc.c, free_domheap_pages).
            try:
                self._xen.zero(domid, first_gfn, nr_frames)
            except XshmError:
                self._xen.depopulate(domid, first_gfn, nr_frames)
                raise
        finally:
            self._xen.set_max_pages(domid, 0)

    async def free_region(self, region: Region, *, reason: str) -> None:
        """Wipe and free a region's frames; no member may have them any more."""
        if region.ready:
            await self._ledger.put_region(dataclasses.replace(region, ready=False))
        await self.free_frames(region)
        self._hub.about_region(EventKind.REGION_REMOVED, region, reason)

    async def free_frames(self, region: Region) -> None:
        """Wipe and free whatever there is of a region's frames, and forget it."""
        await self._let_go(region)
        in_holder = region.terms.backing is Backing.HOLDER and not region.terms.is_sealed
        for part in region.parts:
            holder = self._ledger.holder(part.holder_uuid)
            if holder is not None and in_holder:
                self.verify(holder)
                await self._worker.run(
                    self._depopulate_now, holder.domid, part.holder_first_gfn, part.nr_frames
                )
        await self._ledger.drop_region(region.region_id)

    def _depopulate_now(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        # Wiped by us: the pages of a domain that lives go back to Xen's heap as they are.  Of a
        # region whose making or freeing was cut off, some frames may be there and some not.
        end = first_gfn + nr_frames
        for start in range(first_gfn, end, WIPE_FRAMES):
            frames = [Gfn(gfn) for gfn in range(start, min(start + WIPE_FRAMES, end))]
            there = self._xen.populated_frames(domid, frames)
            if len(there) == len(frames):
                self._xen.zero(domid, frames[0], len(frames))
            else:
                for gfn in there:
                    self._xen.zero(domid, gfn, 1)
        self._xen.depopulate(domid, first_gfn, nr_frames)


assert PAGE_SIZE == 4096  # table_frames() counts on 512 entries of 8 bytes a table
