# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions of dom0's own memory, which its kernel grants to one guest at a time.

Each page of such memory is granted when it is made, to one domain for ever (xshmd/xen/lending.py).
So a region is on other pages in each life of its guest, and in between in plain memory of the
keeper, with what is in it carried from one to the next.  The keeper has all of them, since the
kernel takes a page back from a guest when no process of dom0 has it any more.

Names that the keeper has them by say whose they are; a region's record has the one that counts.
Used by :mod:`xshmd.engine.grants` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Final

import structlog

from xshmd.engine import identity
from xshmd.engine.ledger import Ledger
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import Conflict, Refused
from xshmd.model import Grant, Guest, Prot, Region, RegionRequest
from xshmd.policy.grants import MAX_RANGES
from xshmd.policy.plan import NewRegion
from xshmd.ports import Hypervisor, Keeper
from xshmd.units import bytes_of, human_size

log = structlog.get_logger()

LIMIT_FILE: Final = "/sys/module/xen_gntalloc/parameters/limit"


class Lent:
    """See the module."""

    def __init__(
        self, *, xen: Hypervisor, keeper: Keeper, worker: XenWorker, ledger: Ledger
    ) -> None:
        self._xen, self._keeper, self._worker, self._ledger = xen, keeper, worker, ledger

    # -- room -----------------------------------------------------------------------------------

    def check_room(self, new: NewRegion) -> None:
        """Raise Refused if dom0's kernel does not lend so much more."""
        what = f"region {new.region_id} is to be {human_size(bytes_of(new.nr_frames))} of dom0's"
        limit = self._xen.lendable_frames()
        if not limit:
            raise Refused(
                f"{what}, whose kernel lends none: it has no gntalloc",
                hint="modprobe xen-gntalloc",
                rule="cannot-lend",
                region=new.region_id,
            )
        there = sum(region.nr_frames for region in self._regions())
        if there + new.nr_frames > limit:
            raise Refused(
                f"{what}, whose kernel lends {human_size(bytes_of(limit))} in all, of which"
                f" {human_size(bytes_of(there))} are lent or promised by xshmd",
                hint=f"make it smaller, or raise {LIMIT_FILE}, a number of pages",
                rule="lends-too-much",
                region=new.region_id,
            )

    def _regions(self) -> list[Region]:
        return [region for region in self._ledger.regions if region.terms.is_lent]

    # -- giving ---------------------------------------------------------------------------------

    async def lend(self, guest: Guest, region: Region, request: RegionRequest) -> Guest:
        """Put a region on pages that the guest may map; return it with its references.

        May be done again; what was done then is found.

        Raises:
            Refused: references are too scattered to be told.
            Conflict, HypercallFailed, XenUnavailable: why it cannot be; nothing is lent.
        """
        name = _lent_name(region, guest.generation)
        source = "" if region.kept == name else await self._contents(region)

        def now() -> list[tuple[int, int]]:
            identity.verify(self._xen, guest)
            return list(
                self._keeper.lend(
                    name, source, guest.domid, region.nr_frames, readonly=request.prot is Prot.RO
                )
            )

        ranges = await self._worker.run(now)
        if len(ranges) > MAX_RANGES:
            await self._drop(name)
            raise Refused(
                f"dom0's free grant references are in too many pieces for region"
                f" {region.region_id}: {len(ranges)}, and a guest is told of {MAX_RANGES}",
                hint="make the region smaller, or end what else uses /dev/xen/gntalloc",
                rule="scattered-references",
                region=region.region_id,
            )
        await self._move(region, name)
        grants, at = [], 0
        for first_ref, nr_frames in ranges:
            grants.append(
                Grant(
                    region_id=region.region_id, holder_uuid="", first_ref=first_ref,
                    nr_frames=nr_frames, offset_frames=at,
                )
            )  # fmt: skip
            at += nr_frames
        return dataclasses.replace(guest, grants=(*guest.grants, *grants))

    async def _contents(self, region: Region) -> str:
        """Return by which name the keeper has what is in a region; empty if nothing is."""
        if not region.kept:
            return ""
        kept = await self._worker.run(self._keeper.kept)
        if kept.get(region.kept) != region.nr_frames:
            log.error("contents lost", region=region.region_id, reason="xshmd-keeper was ended")
            return ""
        return region.kept

    async def _move(self, region: Region, name: str) -> None:
        """Have what is kept by this name be the region, and let go of what was."""
        if region.kept != name:
            await self._ledger.put_region(dataclasses.replace(region, kept=name))
            if region.kept:
                await self._drop(region.kept)

    async def _drop(self, name: str) -> None:
        await self._worker.run(lambda: self._keeper.drop(name, wipe=True))

    # -- taking back ----------------------------------------------------------------------------

    async def take_back(self, generation: str, region_ids: Collection[str] | None = None) -> None:
        """Lend these regions, or all, no more to a life of a guest; what is in them stays.

        What the guest has mapped it has until it unmaps it, and nobody else sees what it writes
        there.
        """
        for region in self._regions():
            if region_ids is not None and region.region_id not in region_ids:
                continue
            name = _lent_name(region, generation)
            if region.kept == name:
                await self._park(region, f"parked.{region.region_id}.{generation}")
            await self._drop(name)

    async def _park(self, region: Region, name: str) -> None:
        try:
            await self._worker.run(lambda: self._keeper.park(name, region.kept, region.nr_frames))
        except Conflict as lost:
            log.error("contents lost", region=region.region_id, reason=lost.one_line())
            name = ""
        await self._move(region, name)

    async def sweep(self) -> None:
        """Take back what was lent to lives of guests that are on record no more."""
        for region in self._regions():
            word, _, generation = region.kept.rpartition(".")
            if word == f"lent.{region.region_id}" and self._ledger.guest(generation) is None:
                await self.take_back(generation, [region.region_id])

    # -- dom0's own way to it -------------------------------------------------------------------

    async def have_memory(self, region: Region) -> Region:
        """Return a region that can be written to: one that no guest has had yet has no memory."""
        if not region.kept:
            name = f"parked.{region.region_id}.new"
            await self._worker.run(lambda: self._keeper.park(name, "", region.nr_frames))
            await self._move(region, name)
        return self._ledger.region(region.region_id) or region

    async def recover(self) -> None:
        """After a start: say so if the keeper that had lent something is gone."""
        regions = [region for region in self._regions() if region.kept]
        if not regions:
            return
        try:
            kept = await self._worker.run(self._keeper.kept)
        except Conflict as error:
            log.error("memory of dom0's cannot be lent", reason=error.one_line())
            return
        for region in regions:
            if region.kept not in kept:
                log.error(
                    "contents lost", region=region.region_id,
                    reason="xshmd-keeper was ended: a guest that has it mapped goes on with what"
                    " it has, alone, and nobody can map it any more until that guest has ended",
                )  # fmt: skip


def _lent_name(region: Region, generation: str) -> str:
    """Return the name of a region's pages in one life of a guest; ids have no dots."""
    return f"lent.{region.region_id}.{generation}"
