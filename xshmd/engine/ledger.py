# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that exists, in memory and in xenstore alike: what is written there first is then believed.

Synchronization: only the reconciler writes; readers take :meth:`Ledger.snapshot`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from xshmd.engine import records
from xshmd.errors import StoreError
from xshmd.model import Guest, Holder, Region, Snapshot
from xshmd.ports import Store
from xshmd.units import DomId

R = TypeVar("R")


class Ledger:
    """The records of holders, regions and guests, written through to xenstore."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._holders: dict[str, Holder] = {}
        self._regions: dict[str, Region] = {}
        self._guests: dict[str, Guest] = {}
        self._doubtful: set[str] = set()

    async def load(self) -> tuple[StoreError, ...]:
        """Read every record back after a start; return what could not be read.

        A record that cannot be read is left where it is: it may be another version's.
        """
        if await self._store.read(records.ROOT) is None:
            await self._store.write(records.ROOT, "")
            await self._store.set_permissions(records.ROOT, records.ROOT_PERMISSIONS)
        holders, bad_holders = await self._load("holders", records.decode_holder)
        regions, bad_regions = await self._load("regions", records.decode_region)
        guests, bad_guests = await self._load("guests", records.decode_guest)
        self._holders = {holder.uuid: holder for holder in holders}
        self._regions = {region.region_id: region for region in regions}
        self._guests = {guest.generation: guest for guest in guests}
        return (*bad_holders, *bad_regions, *bad_guests)

    async def _load(
        self, kind: str, decode: Callable[[str, str], R]
    ) -> tuple[list[R], list[StoreError]]:
        names = await self._store.directory(f"{records.ROOT}/{kind}") or ()
        paths = [f"{records.ROOT}/{kind}/{name}" for name in names]
        found: list[R] = []
        bad: list[StoreError] = []
        for path, text in zip(paths, await self._store.read_many(paths), strict=True):
            try:
                if text is not None:
                    found.append(decode(path, text))
            except StoreError as error:
                bad.append(error)
        return found, bad

    def snapshot(self) -> Snapshot:
        """Return everything as of now."""
        return Snapshot(
            holders=tuple(self._holders.values()),
            regions=tuple(sorted(self._regions.values(), key=lambda region: region.region_id)),
            guests=tuple(sorted(self._guests.values(), key=lambda guest: guest.domid)),
        )

    @property
    def guests(self) -> tuple[Guest, ...]:
        return tuple(self._guests.values())

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(self._regions.values())

    @property
    def holders(self) -> tuple[Holder, ...]:
        return tuple(self._holders.values())

    def holder(self, uuid: str) -> Holder | None:
        """Return the holder with this UUID, if there is one."""
        return self._holders.get(uuid)

    def region(self, region_id: str) -> Region | None:
        """Return the region with this id, if there is one."""
        return self._regions.get(region_id)

    def guest(self, generation: str) -> Guest | None:
        """Return the guest of this generation, if there is one."""
        return self._guests.get(generation)

    def guest_of_domain(self, domid: DomId) -> Guest | None:
        """Return the guest that lives as this domain; one awaiting its reboot lives as none."""
        return next(
            (
                guest
                for guest in self._guests.values()
                if guest.domid == domid and not guest.ended_at
            ),
            None,
        )

    def members(self, region_id: str) -> tuple[Guest, ...]:
        """Return every guest that has or awaits the region."""
        return tuple(
            guest
            for guest in self._guests.values()
            if any(request.region_id == region_id for request in guest.requests)
        )

    # -- writing --------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Make xenstore say what memory does, where an answer was lost and nobody knows."""
        for path in tuple(self._doubtful):
            text = self._text(path)
            if text is None:
                await self._store.remove(path)
            else:
                await self._store.write(path, text)
            self._doubtful.discard(path)

    def _text(self, path: str) -> str | None:
        record = (
            self._holders.get(path.removeprefix(records.holder_path("")))
            or self._regions.get(path.removeprefix(records.region_path("")))
            or self._guests.get(path.removeprefix(records.guest_path("")))
        )
        return None if record is None else records.encode(record)

    async def _write(self, path: str, text: str, also: Iterable[tuple[str, str]] = ()) -> None:
        try:
            await self._store.write_many([(path, text), *also])
        except BaseException:
            self._doubtful.add(path)
            raise
        self._doubtful.discard(path)

    async def _remove(self, path: str) -> None:
        try:
            await self._store.remove(path)
        except BaseException:
            self._doubtful.add(path)
            raise
        self._doubtful.discard(path)

    async def put_holder(self, holder: Holder, and_region: Region | None = None) -> Holder:
        """Record a holder, new or changed, and in the same go, after it, a region of it."""
        also = []
        if and_region is not None:
            also = [(records.region_path(and_region.region_id), records.encode(and_region))]
        try:
            await self._write(records.holder_path(holder.uuid), records.encode(holder), also)
        except BaseException:
            self._doubtful.update(path for path, _ in also)
            raise
        self._holders[holder.uuid] = holder
        if and_region is not None:
            self._regions[and_region.region_id] = and_region
        return holder

    async def put_region(self, region: Region) -> Region:
        """Record a region, new or changed."""
        await self._write(records.region_path(region.region_id), records.encode(region))
        self._regions[region.region_id] = region
        return region

    def know(self, guest: Guest) -> Guest:
        """Believe something of a guest that need not be written down: it can be found out again."""
        if guest.generation in self._guests:
            self._guests[guest.generation] = guest
        return guest

    async def put_guest(self, guest: Guest, also: Iterable[tuple[str, str]] = ()) -> Guest:
        """Record a guest, new or changed, and write ``also`` in the same go, after it."""
        await self._write(records.guest_path(guest.generation), records.encode(guest), also)
        self._guests[guest.generation] = guest
        return guest

    async def drop_holder(self, uuid: str) -> None:
        """Forget a holder that is gone."""
        await self._remove(records.holder_path(uuid))
        self._holders.pop(uuid, None)

    async def drop_region(self, region_id: str) -> None:
        """Forget a region whose frames are gone."""
        await self._remove(records.region_path(region_id))
        self._regions.pop(region_id, None)

    async def drop_guest(self, generation: str) -> None:
        """Forget one life of a guest."""
        await self._remove(records.guest_path(generation))
        self._guests.pop(generation, None)
