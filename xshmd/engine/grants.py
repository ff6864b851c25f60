# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions that guests map themselves: their holders, and who has which references to them.

A guest's record names its references before they are written into any grant table, and for as long
as it has one of them mapped: a reference is given to nobody else before.  The holders here are
nobody's target, so a guest reaches what it was granted and nothing else.

What it means to take references away, as Xen has it (xen/common/grant_table.c, map_grant_ref()):
nobody maps them any more from that moment on, but what a guest has mapped stays mapped, and it may
map that very page again, until it has unmapped it everywhere or ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import structlog

from xshmd.engine import identity, records
from xshmd.engine.events import EventHub
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.engine.lent import Lent
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import Conflict, Refused, StoreTrouble, XshmError
from xshmd.events import EventKind
from xshmd.model import Grant, Guest, GuestState, Piece, Prot, Region, RegionRequest, Transport
from xshmd.policy import grants as policy
from xshmd.policy.plan import NewRegion
from xshmd.ports import Hypervisor
from xshmd.units import DomId, Gfn, bytes_of, human_size

log = structlog.get_logger()

SWEEP_S: Final = 5.0
"""When to look again whether a guest has unmapped what was taken from it: nothing tells."""


class Grants:
    """See the module.  Used by the reconciler alone."""

    def __init__(
        self,
        *,
        xen: Hypervisor,
        worker: XenWorker,
        ledger: Ledger,
        holders: Holders,
        lent: Lent,
        hub: EventHub,
    ) -> None:
        self._xen, self._worker, self._ledger = xen, worker, ledger
        self._holders, self._lent, self._hub = holders, lent, hub

    def is_granted(self, request: RegionRequest) -> bool:
        """Return whether the region of this entry is one that its members map themselves."""
        region = self._ledger.region(request.region_id)
        return region is not None and region.terms.transport is Transport.GRANT

    def mapped_for(self, requests: Iterable[RegionRequest]) -> tuple[RegionRequest, ...]:
        """Return the entries that are ours to map."""
        return tuple(one for one in requests if not self.is_granted(one))

    def mapped_by_guest(self, requests: Iterable[RegionRequest]) -> tuple[RegionRequest, ...]:
        """Return the entries that the guest maps itself."""
        return tuple(one for one in requests if self.is_granted(one))

    # -- regions --------------------------------------------------------------------------------

    def check_room(self, new: NewRegion) -> None:
        """Raise Refused if a region is more than can be granted and told of."""
        if new.terms.is_lent:
            self._lent.check_room(new)
        elif new.is_granted and len(self._shares(new, {})) > policy.MAX_RANGES:
            raise Refused(
                f"region {new.region_id} of {human_size(bytes_of(new.nr_frames))} needs the grant "
                f"tables of more than {policy.MAX_RANGES} holders",
                hint="make it smaller, boot Xen with a larger gnttab_max_frames, or say "
                "transport=physmap",
                region=new.region_id,
            )

    def _shares(self, new: NewRegion, room: Mapping[str, int]) -> tuple[policy.Share, ...]:
        nr_table_frames = policy.table_frames(self._xen.host_info())
        return policy.shares(
            new.nr_frames, new.nr_members, nr_table_frames=nr_table_frames, room=room
        )

    async def add_region(self, new: NewRegion, *, reason: str, owner_came: bool = False) -> Region:
        """Make a region in holders that serve grants, as many as its references need.

        Args:
            new: What is to be made.
            reason: Why, for the event of it.
            owner_came: Whether it is the region's owner that it is made for.

        Raises:
            OutOfMemory: the host has not that much, or too little would be left; nothing is done.
            Refused: it is too large for grants; nothing is done.
        """
        self.check_room(new)
        self._holders.check_memory(f"region {new.region_id}", new.nr_needed_frames)
        pieces = () if new.terms.is_lent else await self._make_room(new)
        region = Region(
            region_id=new.region_id, nr_frames=new.nr_frames, holder_uuid="",
            holder_first_gfn=Gfn(0), owner=new.owner, owner_came=owner_came,
            lifetime=new.lifetime, terms=new.terms, from_file=new.from_file, pieces=pieces,
        )  # fmt: skip
        if pieces:
            region = dataclasses.replace(
                region, holder_uuid=pieces[0].holder_uuid,
                holder_first_gfn=pieces[0].holder_first_gfn,
            )  # fmt: skip
            await self._populate(region)
        region = await self._ledger.put_region(dataclasses.replace(region, ready=True))
        self._hub.about_region(EventKind.REGION_CREATED, region, reason)
        return region

    async def _make_room(self, new: NewRegion) -> tuple[Piece, ...]:
        guests, regions = self._ledger.guests, self._ledger.regions
        room = {
            holder.uuid: policy.room_left(holder, regions, guests)
            for holder in self._ledger.holders
            if holder.serves_grants
        }
        nr_table_frames = policy.table_frames(self._xen.host_info())
        pieces: list[Piece] = []
        at = 0
        for share in self._shares(new, room):
            holder = self._ledger.holder(share.holder_uuid) or await self._holders.create(
                nr_grant_frames=nr_table_frames
            )
            pieces.append(
                Piece(
                    holder_uuid=holder.uuid, holder_first_gfn=self._holders.next_gfn(holder),
                    offset_frames=at, nr_frames=share.nr_frames,
                )
            )  # fmt: skip
            at += share.nr_frames
        return tuple(pieces)

    async def _populate(self, region: Region) -> None:
        for piece in region.pieces:
            holder = self._holders.having(piece.holder_uuid)
            next_gfn = Gfn(piece.holder_first_gfn + piece.nr_frames)
            # Before the region's record: frames may be passed over, and are never used twice.
            await self._ledger.put_holder(dataclasses.replace(holder, next_gfn=next_gfn))
        await self._ledger.put_region(region)
        try:
            for piece in region.pieces:
                await self._holders.populate(piece)
        except StoreTrouble:
            raise  # the unready record says what to undo
        except XshmError:
            await self._holders.free_frames(region)
            raise

    # -- members --------------------------------------------------------------------------------

    async def allot(self, guest: Guest, requests: Iterable[RegionRequest]) -> Guest:
        """Return the guest with references for all of these entries.

        Nothing is written into a holder's table yet; to dom0's memory the guest has them already,
        as its kernel chooses them.

        Raises:
            Refused: a grant table has too few left.
            Conflict, HypercallFailed, XenUnavailable: dom0 cannot lend it.
        """
        for request in self.mapped_by_guest(requests):
            if any(one.region_id == request.region_id for one in self._living(guest)):
                continue  # allotted before we were cut off
            region = self._ledger.region(request.region_id)
            if region is not None and region.terms.is_lent:
                guest = await self._lent.lend(guest, region, request)
            else:
                guest = self._allot_one(guest, request)
        return guest

    @staticmethod
    def _living(guest: Guest) -> list[Grant]:
        return [one for one in guest.grants if not one.is_ended]

    def _allot_one(self, guest: Guest, request: RegionRequest) -> Guest:
        region = self._ledger.region(request.region_id)
        assert region is not None
        for piece in policy.wanted_pieces(region, request.offset_frames, request.nr_frames):
            holder = self._holders.having(piece.holder_uuid)
            others = [one for one in self._ledger.guests if one.generation != guest.generation]
            guests = (*others, guest)
            left = policy.room_left(holder, self._ledger.regions, guests, region.region_id)
            taken = [g for one in guests for g in one.grants if g.holder_uuid == holder.uuid]
            found = policy.allot(region.region_id, piece, holder, taken)
            if left < piece.nr_frames or sum(one.nr_frames for one in found) < piece.nr_frames:
                raise _no_room(guest, request, max(left, 0))
            guest = dataclasses.replace(guest, grants=(*guest.grants, *found))
        if sum(one.region_id == region.region_id for one in guest.grants) > policy.MAX_RANGES:
            raise _no_room(guest, request, 0)
        return guest

    async def give(self, guest: Guest, requests: Sequence[RegionRequest]) -> None:
        """Write the references that a guest's record names into the grant tables.

        What is written already stays as it is, so it may be done again.

        Raises:
            DomainGone: the guest ended meanwhile.
            Conflict: a holder is gone.
        """
        readonly = {one.region_id: one.prot is Prot.RO for one in requests}
        todo = [
            (grant, *self._frames_of(grant))
            for grant in self._living(guest)
            if grant.region_id in readonly and grant.holder_uuid
        ]

        def write() -> None:
            for grant, holder, first_gfn in todo:
                identity.verify(self._xen, guest)
                self._xen.write_grants(
                    holder, grant.first_ref, grant.nr_frames, first_gfn, guest.domid,
                    readonly=readonly[grant.region_id],
                )  # fmt: skip

        if todo:
            await self._worker.run(write)

    def _frames_of(self, grant: Grant) -> tuple[DomId, Gfn]:
        region = self._ledger.region(grant.region_id)
        if region is None:
            raise Conflict(f"region {grant.region_id} went away", hint="start the guest again")
        (piece,) = policy.wanted_pieces(region, grant.offset_frames, grant.nr_frames)
        holder = self._holders.having(piece.holder_uuid)
        self._holders.verify(holder)
        return holder.domid, piece.holder_first_gfn

    async def attach(self, guest: Guest, requests: Sequence[RegionRequest]) -> None:
        """Give a guest that runs references to more regions, which it is not told of yet."""
        guest = await self.allot(guest, requests)
        records.check_fits(guest)
        await self._ledger.put_guest(guest)
        await self.give(guest, requests)

    # -- taking away ----------------------------------------------------------------------------

    async def take(self, guest: Guest, region_ids: Collection[str]) -> Guest:
        """Let a guest map these regions no more.

        What it still has mapped stays on record, but for dom0's memory: there nobody can tell.
        """
        await self._lent.take_back(guest.generation, region_ids)
        ended = tuple(
            dataclasses.replace(one, is_ended=True) if one.region_id in region_ids else one
            for one in guest.grants
        )
        if ended != guest.grants:
            guest = await self._ledger.put_guest(dataclasses.replace(guest, grants=ended))
        guest, in_use = await self._let_go(guest)
        for region_id in sorted(region_ids):
            nr_frames = sum(nr for one, nr in in_use.items() if one.region_id == region_id)
            if nr_frames:
                log.warning(
                    "withdrawn region still mapped",
                    guest=guest.name, domid=guest.domid, region=region_id, nr_frames=nr_frames,
                    reason="Xen takes no mapping away: destroy the guest to end it",
                )  # fmt: skip
        return guest

    async def _let_go(self, guest: Guest) -> tuple[Guest, dict[Grant, int]]:
        """Forget what was taken from a guest and is unmapped; return how many of the rest are."""
        ended = [one for one in guest.grants if one.is_ended]
        if not ended:
            return guest, {}
        in_use = await self._worker.run(self._end, ended)
        left = tuple(one for one in guest.grants if not one.is_ended or in_use[one])
        if left != guest.grants:
            guest = await self._ledger.put_guest(dataclasses.replace(guest, grants=left))
        return guest, in_use

    def _end(self, grants: Sequence[Grant]) -> dict[Grant, int]:
        """Let nobody map these references; return how many of each range are mapped."""
        in_use = dict.fromkeys(grants, 0)
        for grant in grants:
            holder = self._ledger.holder(grant.holder_uuid)
            if holder is None:
                continue
            try:
                self._holders.verify(holder)
            except Conflict:
                continue  # it is gone, and its table with it
            in_use[grant] = self._xen.end_grants(holder.domid, grant.first_ref, grant.nr_frames)
        return in_use

    async def forget(self, guest: Guest) -> Guest:
        """Return a guest whose domain is gone without references: its domid may come again.

        Xen has unmapped what it had mapped (gnttab_release_mappings()).
        """
        await self._lent.take_back(guest.generation)
        if guest.grants:
            await self._worker.run(self._end, guest.grants)
        return dataclasses.replace(guest, grants=())

    async def sweep(self) -> bool:
        """Forget what has been unmapped since; return whether anything is still mapped."""
        await self._lent.sweep()
        for guest in self._ledger.guests:
            if guest.state is GuestState.ATTACHED:
                await self._let_go(guest)
        return any(one.is_ended for guest in self._ledger.guests for one in guest.grants)


def _no_room(guest: Guest, request: RegionRequest, left: int) -> Refused:
    return Refused(
        f"{request.place}: guest {guest.name} needs {request.nr_frames} grant references to "
        f"{human_size(request.size_bytes)} of region {request.region_id}, and its holder has "
        f"{left} left for it",
        hint="detach it from another guest; or end its guests, so that it is made anew with room "
        "for all that the configurations name",
        region=request.region_id,
    )
