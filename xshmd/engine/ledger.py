# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that exists, in memory and in xenstore alike: what is written there first is then believed.

Synchronization: only the reconciler writes; readers take :meth:`Ledger.snapshot`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Final, TypeVar

import structlog

from xshmd.engine import intents, records, window_records
from xshmd.engine.intents import Intent, Part
from xshmd.engine.window_records import Window
from xshmd.errors import StoreError
from xshmd.model import Guest, Holder, Lease, Region, Snapshot
from xshmd.ports import Store, StoreTransaction
from xshmd.units import DomId

log = structlog.get_logger()
R = TypeVar("R")

_KEPT_ROOTS: Final = (intents.ROOT, records.lease_path("").rstrip("/"), window_records.ROOT)
"""Made at the start: what is removed leaves its parent behind."""


class Ledger:
    """The records of holders, regions and guests, written through to xenstore."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._holders: dict[str, Holder] = {}
        self._regions: dict[str, Region] = {}
        self._guests: dict[str, Guest] = {}
        self._leases: dict[str, Lease] = {}
        self._members: dict[str, dict[str, None]] = {}
        """The generations of guests by region: whether a region has any is asked of each, often."""
        self._intents: dict[str, Intent] = {}
        self._windows: dict[str, Window] = {}
        self.is_whole = True
        """Whether every record could be read: otherwise there may be guests that nobody knows."""
        self._doubtful: set[str] = set()
        self._was_away = False

    async def load(self) -> tuple[StoreError, ...]:
        """Read every record back after a start; return what could not be read.

        A record that cannot be read is left where it is: it may be another version's.
        """
        if await self._store.read(records.ROOT) is None:
            await self._make_roots()
        holders, bad_holders = await self._load("holders", records.decode_holder)
        regions, bad_regions = await self._load("regions", records.decode_region)
        guests, bad_guests = await self._load("guests", records.decode_guest)
        leases, bad_leases = await self._load("leases", records.decode_lease)
        self._holders = {holder.uuid: holder for holder in holders}
        self._leases = {lease.lease_id: lease for lease in leases}
        self._regions = {region.region_id: region for region in regions}
        for guest in guests:
            self._know(guest)
        bad_intents = await self._load_intents()
        windows, bad_windows = await self._load("windows", window_records.decode)
        self._windows = {window.holder_uuid: window for window in windows}
        bad = (
            *bad_holders, *bad_regions, *bad_guests, *bad_leases, *bad_intents, *bad_windows,
        )  # fmt: skip
        self.is_whole = not bad
        return bad

    async def _make_roots(self) -> None:
        await self._store.write(records.ROOT, "")
        await self._store.set_permissions(records.ROOT, records.ROOT_PERMISSIONS)
        for root in _KEPT_ROOTS:
            await self._store.write(root, "")

    async def _load_intents(self) -> list[StoreError]:
        bad: list[StoreError] = []
        for intent_id in await self._store.directory(intents.ROOT) or ():
            at = intents.intent_path(intent_id)
            names = await self._store.directory(at) or ()
            head, *texts = await self._store.read_many([at, *(f"{at}/{name}" for name in names)])
            below = {
                name: text for name, text in zip(names, texts, strict=True) if text is not None
            }
            try:
                intent = intents.decode(intent_id, head or "", below)
            except StoreError as error:
                bad.append(error)
                continue
            if intent is None:
                await self._store.remove(at)
            else:
                self._intents[intent_id] = intent
        return bad

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
            leases=self.leases,
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

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._leases.values())

    @property
    def intents(self) -> tuple[Intent, ...]:
        return tuple(self._intents.values())

    @property
    def windows(self) -> tuple[Window, ...]:
        return tuple(self._windows.values())

    def intent(self, intent_id: str) -> Intent | None:
        """Return the set of changes with this id, if it is under way."""
        return self._intents.get(intent_id)

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
        return tuple(self._guests[one] for one in self._members.get(region_id, ()))

    def _know(self, guest: Guest) -> None:
        wanted = {request.region_id for request in guest.requests}
        self._forget_member(guest.generation, but=wanted)
        for region_id in wanted:
            self._members.setdefault(region_id, {})[guest.generation] = None
        self._guests[guest.generation] = guest

    def _forget_member(self, generation: str, but: Collection[str] = ()) -> None:
        known = self._guests.get(generation)
        for request in known.requests if known else ():
            members = self._members.get(request.region_id, {})
            if request.region_id not in but:
                members.pop(generation, None)
            if not members:
                self._members.pop(request.region_id, None)

    def leases_of(self, region_id: str) -> tuple[Lease, ...]:
        """Return the leases of a region."""
        return tuple(lease for lease in self._leases.values() if lease.region_id == region_id)

    # -- writing --------------------------------------------------------------------------------

    def doubt(self) -> None:
        """Say that xenstored was away, and may have come back without a node of ours.

        It keeps them in memory: one that was killed, and started anew, has none.
        """
        self._was_away = True

    async def settle(self) -> None:
        """Make xenstore say what memory does, where an answer was lost and nobody knows."""
        if self._was_away:
            await self._restore()
            self._was_away = False
        for path in tuple(self._doubtful):
            if path.startswith(f"{intents.ROOT}/"):
                await self._settle_intent(path)
                continue
            text = self._text(path)
            if text is None:
                await self._store.remove(path)
            else:
                await self._store.write(path, text)
            self._doubtful.discard(path)

    async def _restore(self) -> None:
        # A record that was waiting to be written has made its own parents by now, and no others.
        if None not in await self._store.read_many(_KEPT_ROOTS):
            return
        nodes = [node for intent in self._intents.values() for node in intents.nodes(intent)]
        nodes += [(records.holder_path(key), records.encode(r)) for key, r in self._holders.items()]
        nodes += [(records.region_path(key), records.encode(r)) for key, r in self._regions.items()]
        nodes += [(records.guest_path(key), records.encode(r)) for key, r in self._guests.items()]
        nodes += [(records.lease_path(key), records.encode(r)) for key, r in self._leases.items()]
        nodes += [
            (window_records.window_path(key), window_records.encode(window))
            for key, window in self._windows.items()
        ]

        async def write(inside: StoreTransaction) -> None:
            for path, text in nodes:
                await inside.write(path, text)

        # All or nothing: were we cut off, a next life would take half of them for the whole.
        await self._store.transact(write)
        await self._make_roots()
        log.error(
            "xenstored lost its nodes",
            reason="xshmd's are written again and guests keep their memory, but xl knows them no "
            "more: start the host anew as soon as they can be ended",
        )

    async def _settle_intent(self, path: str) -> None:
        intent = self._intents.get(path.split("/")[3])
        if intent is None:
            await self._store.remove(path)
        else:
            await self._store.write_many(intents.nodes(intent))
        self._doubtful.discard(path)

    def _text(self, path: str) -> str | None:
        window = self._windows.get(path.removeprefix(window_records.window_path("")))
        if window is not None:
            return window_records.encode(window)
        record = (
            self._holders.get(path.removeprefix(records.holder_path("")))
            or self._regions.get(path.removeprefix(records.region_path("")))
            or self._guests.get(path.removeprefix(records.guest_path("")))
            or self._leases.get(path.removeprefix(records.lease_path("")))
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

    async def swap_regions(self, one: Region, other: Region) -> None:
        """Record two regions at once: both are written, or neither."""
        texts = {records.region_path(r.region_id): records.encode(r) for r in (one, other)}

        async def write(inside: StoreTransaction) -> None:
            for path, text in texts.items():
                await inside.write(path, text)

        try:
            await self._store.transact(write)
        except BaseException:
            self._doubtful.update(texts)
            raise
        self._regions |= {one.region_id: one, other.region_id: other}

    def know(self, guest: Guest) -> Guest:
        """Believe something of a guest that need not be written down: it can be found out again."""
        if guest.generation in self._guests:
            self._know(guest)
        return guest

    async def put_guest(self, guest: Guest, also: Iterable[tuple[str, str]] = ()) -> Guest:
        """Record a guest, new or changed, and write ``also`` in the same go, after it."""
        await self._write(records.guest_path(guest.generation), records.encode(guest), also)
        self._know(guest)
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
        self._forget_member(generation)
        self._guests.pop(generation, None)

    async def put_lease(self, lease: Lease) -> Lease:
        """Record a lease."""
        await self._write(records.lease_path(lease.lease_id), records.encode(lease))
        self._leases[lease.lease_id] = lease
        return lease

    async def drop_lease(self, lease_id: str) -> None:
        """Forget a lease that is over."""
        await self._remove(records.lease_path(lease_id))
        self._leases.pop(lease_id, None)

    # -- sets of changes ------------------------------------------------------------------------

    async def begin_intent(self, intent: Intent) -> Intent:
        """Record a set of changes before anything of it is done."""
        *before, (at, head) = intents.nodes(intent)
        try:
            await self._store.write_many([*before, (at, head)])
        except BaseException:
            self._doubtful.add(at)
            raise
        self._intents[intent.id] = intent
        return intent

    async def commit_intent(self, intent: Intent) -> Intent:
        """Record that a set is to be finished from now on, whatever happens."""
        committed = dataclasses.replace(intent, is_committed=True)
        await self._write(intents.intent_path(intent.id), intents.encode_head(committed))
        self._intents[intent.id] = committed
        return committed

    async def put_part(self, intent_id: str, part: Part) -> Part:
        """Record how far one guest's part in a set has come."""
        await self._write(intents.part_path(intent_id, part.generation), intents.encode_part(part))
        return self.know_part(intent_id, part)

    def know_part(self, intent_id: str, part: Part) -> Part:
        """Believe it without writing it down: Xen's pause count says the same."""
        intent = self._intents.get(intent_id)
        if intent is not None:
            self._intents[intent_id] = intent.with_part(part)
        return part

    async def drop_intent(self, intent_id: str) -> None:
        """Forget a set of changes that is over."""
        await self._remove(intents.intent_path(intent_id))
        self._intents.pop(intent_id, None)

    # -- windows --------------------------------------------------------------------------------

    async def put_window(self, window: Window) -> Window:
        """Record a window, new or a step further."""
        path = window_records.window_path(window.holder_uuid)
        await self._write(path, window_records.encode(window))
        self._windows[window.holder_uuid] = window
        return window

    async def drop_window(self, holder_uuid: str) -> None:
        """Forget a window that is closed."""
        await self._remove(window_records.window_path(holder_uuid))
        self._windows.pop(holder_uuid, None)
