# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carries out sets of changes to running guests, each whole or not at all.

What is made and mapped comes first and can be undone; then the set is committed; then comes what
is taken away, which cannot fail but for a guest's end.  Each guest stands still, by a pause of
ours, for just as long as its own memory changes.  Used by the reconciler alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import structlog

from xshmd.engine import identity, records
from xshmd.engine.attach import Span, attach, check, detach, mappings, span_of
from xshmd.engine.doorbells import Doorbells
from xshmd.engine.events import EventHub
from xshmd.engine.grants import Grants
from xshmd.engine.holders import Holders
from xshmd.engine.intents import Intent, Part
from xshmd.engine.ledger import Ledger
from xshmd.engine.pauses import LIMIT, OwedPauses, pause_count
from xshmd.engine.window_plan import Join
from xshmd.engine.windows import Windows
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import DomainGone, NoSuchGuest, StoreTrouble, TimedOut, XshmError
from xshmd.model import Guest, GuestState, Region, RegionRequest
from xshmd.policy.changes import ChangePlan, GuestChange
from xshmd.policy.grouping import is_new_home
from xshmd.policy.identity import new_generation
from xshmd.ports import Hypervisor, Store

log = structlog.get_logger()


class Changes:
    """See the module."""

    def __init__(
        self,
        *,
        xen: Hypervisor,
        worker: XenWorker,
        store: Store,
        ledger: Ledger,
        holders: Holders,
        grants: Grants,
        windows: Windows,
        hub: EventHub,
        doorbells: Doorbells,
    ) -> None:
        self._windows = windows
        self._xen, self._worker, self._store = xen, worker, store
        self._doorbells = doorbells
        self._ledger, self._holders, self._hub = ledger, holders, hub
        self._grants = grants
        self._had: dict[str, set[Span]] = {}
        self._owed = OwedPauses(xen)

    # -- a set of changes -----------------------------------------------------------------------

    def check_room(self, plan: ChangePlan) -> None:
        """Raise OutOfMemory or Refused if there is no room for what is made, or its records."""
        for change in plan.guests:
            after = (*change.guest.requests, *change.attach, *change.detach)
            records.check_fits(dataclasses.replace(change.guest, requests=after))
        for new, _ in plan.creates:
            self._grants.check_room(new)
        nr_frames = sum(new.nr_needed_frames for new, _ in plan.creates)
        if nr_frames:
            names = ", ".join(new.region_id for new, _ in plan.creates)
            self._holders.check_memory(f"what is to be made ({names})", nr_frames)

    async def carry_out(self, plan: ChangePlan, reason: str) -> None:
        """Do all of it, or none.

        Raises:
            StoreTrouble: xenstored failed us in the middle; :meth:`settle` goes on from there.
            TimedOut: it is decided, and :meth:`settle` goes on with what could not be done at once.
            XshmError: why it cannot be done; nothing is.
        """
        self.check_room(plan)
        guests = {self._ours(change): change for change in plan.guests}
        intent = await self._ledger.begin_intent(
            Intent(
                id=secrets.token_hex(8),
                reason=reason,
                creates=tuple(new.region_id for new, _ in plan.creates),
                lifetimes=plan.lifetimes,
                removes=plan.removes,
                parts=tuple(
                    Part(
                        generation=guest.generation,
                        attach=change.attach,
                        detach=change.detach,
                        is_late=change.is_late,
                    )
                    for guest, change in guests.items()
                ),
            )
        )
        try:
            homes = await self._make(plan, reason)
            for guest, change in guests.items():
                if change.is_late:
                    await self._join(guest, homes[change.home])
                elif homes[change.home] != guest.holder_uuid:
                    # All it had until now it maps itself.
                    await self._ledger.put_guest(
                        dataclasses.replace(guest, holder_uuid=homes[change.home])
                    )
            for part in intent.parts:
                if part.attach:
                    await self._attach(intent, part)
        except StoreTrouble:
            raise
        except XshmError:
            await self._undo(self._now(intent))
            raise
        committed = await self._ledger.commit_intent(self._now(intent))
        try:
            await self._finish(committed)
        except StoreTrouble:
            raise
        except XshmError as error:
            raise TimedOut(
                f"it is decided, and not all of it is done yet: {error.message}",
                hint="xshmd goes on trying; its log says when it is done",
            ) from error

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be undone, finished or given back."""
        return not self._ledger.intents and not self._owed.is_any

    def _now(self, intent: Intent) -> Intent:
        return self._ledger.intent(intent.id) or intent

    @staticmethod
    def _ours(change: GuestChange) -> Guest:
        if not change.is_late:
            return change.guest
        return dataclasses.replace(change.guest, generation=new_generation())

    async def _make(self, plan: ChangePlan, reason: str) -> dict[str, str]:
        """Make holders and regions; return the holder of each home."""
        homes = {change.home: change.home for change in plan.guests}
        homes |= {home: home for _, home in (*plan.creates, *plan.moves)}
        for home in homes:
            if is_new_home(home):
                homes[home] = (await self._holders.create()).uuid
        for region_id, home in plan.moves:
            region = self._ledger.region(region_id)
            if region is not None:
                await self._holders.move_region(region, homes[home], reason=reason)
        for new, home in plan.creates:
            if new.is_granted:
                await self._grants.add_region(new, reason=reason)
            else:
                await self._holders.add_region(homes[home], new, reason=reason)
        return homes

    async def _join(self, guest: Guest, holder_uuid: str) -> None:
        """Make a guest that runs already one of ours: it has nothing yet but a mark."""
        guest = dataclasses.replace(guest, holder_uuid=holder_uuid)
        await self._ledger.put_guest(guest, also=records.published(guest, self._ledger.snapshot()))

    async def settle(self) -> None:
        """Undo or finish what was cut off; what cannot be now is tried again at the next look."""
        self._owed.pay()
        for intent in self._ledger.intents:
            try:
                if intent.is_committed:
                    await self._finish(intent)
                else:
                    await self._undo(intent)
            except StoreTrouble:
                raise
            except XshmError as error:
                log.error("changes neither undone nor finished", reason=error.one_line())

    async def withdraw(self, regions: Iterable[Region], reason: str) -> None:
        """Take regions from every guest that has or awaits them, and free them.

        One that a process has mapped is freed when it has it no more.
        """
        gone = {region.region_id for region in regions}
        leased = {lease.region_id for lease in self._ledger.leases}
        parts = []
        for guest in self._ledger.guests:
            theirs = tuple(one for one in guest.requests if one.region_id in gone)
            if theirs:
                parts.append(Part(generation=guest.generation, detach=theirs))
        intent = Intent(
            id=secrets.token_hex(8), reason=reason, is_committed=True,
            removes=tuple(sorted(gone - leased)), parts=tuple(parts),
        )  # fmt: skip
        await self._finish(await self._ledger.begin_intent(intent))

    # -- before the commit ----------------------------------------------------------------------

    async def _attach(self, intent: Intent, part: Part) -> None:
        guest = self._ledger.guest(part.generation)
        if guest is None:
            raise NoSuchGuest("the guest ended meanwhile", hint="look again")
        if requests := self._grants.mapped_for(part.attach):
            await self._map(intent, part, guest, requests)
        if requests := self._grants.mapped_by_guest(part.attach):
            await self._grants.attach(guest, requests)
        self._hub.joined(guest, part.attach, intent.reason)

    async def _map(
        self, intent: Intent, part: Part, guest: Guest, requests: tuple[RegionRequest, ...]
    ) -> None:
        holder = self._ledger.holder(guest.holder_uuid)
        if holder is None:
            raise NoSuchGuest("the guest's holder ended meanwhile", hint="look again")
        self._holders.verify(holder)
        to_be = dataclasses.replace(guest, requests=requests)
        wanted = mappings(to_be, {region.region_id: region for region in self._ledger.regions})
        async with self._held(intent, part, guest) as part:
            check(self._xen, guest, wanted)
            part = await self._ledger.put_part(
                intent.id, dataclasses.replace(part, is_mapping=True)
            )
            # Again: its target may be set, and what is there has just been seen to be nothing.
            tables = self._tables_of(guest)
            if plain := [mapping for mapping in wanted if not mapping.is_sealed]:
                await self._worker.run(
                    lambda: attach(self._xen, guest, holder, plain, again=True, with_tables=tables)
                )
            if sealed := [mapping for mapping in wanted if mapping.is_sealed]:
                await self._windows.renew(
                    holder.uuid,
                    (mapping.request.region_id for mapping in sealed),
                    reason=intent.reason,
                    join=Join(
                        guest=guest, wanted=sealed, again=True, with_tables=tables,
                        pauses=(part.pauses or 0) + 1,
                    ),
                )  # fmt: skip
            self._had[guest.generation] |= {span_of(one) for one in requests}

    def _tables_of(self, guest: Guest) -> set[Span]:
        """Return where the guest has or had regions, as far as this life of ours knows."""
        living = {one.generation for one in self._ledger.guests}
        self._had = {one: spans for one, spans in self._had.items() if one in living}
        return self._had.setdefault(guest.generation, {span_of(one) for one in guest.requests})

    async def _undo(self, intent: Intent) -> None:
        for part in intent.parts:
            guest = self._ledger.guest(part.generation)
            if guest is None:
                continue
            guest = await self._take_grants(guest, part.attach)
            if part.is_mapping:
                with contextlib.suppress(DomainGone):
                    await self._unmap_attached(intent, part, guest)
            elif part.is_late and not guest.grants:
                if await self._store.read(records.mark_path(guest.domid)) == guest.generation:
                    await self._store.remove(records.mark_path(guest.domid))
                await self._ledger.drop_guest(guest.generation)
        for region_id in intent.creates:
            region = self._ledger.region(region_id)
            if region is not None:
                await self._holders.free_region(region, reason=f"{intent.reason}: undone")
        given = [one for part in intent.parts if part.is_mapping for one in part.attach]
        await self._renew_what_was_taken(given, f"{intent.reason}: undone")
        await self._ledger.drop_intent(intent.id)
        log.info("changes undone", reason=intent.reason)

    async def _take_grants(self, guest: Guest, requests: Iterable[RegionRequest]) -> Guest:
        granted = set(_ids(self._grants.mapped_by_guest(requests)))
        return await self._grants.take(guest, granted) if granted else guest

    async def _unmap_attached(self, intent: Intent, part: Part, guest: Guest) -> None:
        async with self._held(intent, part, guest) as part:
            theirs = self._grants.mapped_for(part.attach)
            await self._worker.run(lambda: detach(self._xen, guest, theirs, self._ledger.regions))
            # While it stands still: what it puts there from now on is its own.  Its target stays
            # set, so it stays ours.
            done = dataclasses.replace(part, is_mapping=False, is_late=False)
            self._hub.left(guest, part.attach, f"{intent.reason}: undone")
            self._ledger.know_part(intent.id, done)
            await self._ledger.put_part(intent.id, done)

    # -- after it -------------------------------------------------------------------------------

    async def _finish(self, intent: Intent) -> None:
        for part in intent.parts:
            guest = self._ledger.guest(part.generation)
            if guest is not None and part.attach:
                await self._note_attached(part, guest)
        for part in intent.parts:
            guest = self._ledger.guest(part.generation)
            if guest is not None and part.detach:
                await self._take_away(intent, part, guest)
        lost = [one for part in intent.parts for one in part.detach]
        kept = [one for one in lost if one.region_id not in intent.removes]
        await self._renew_what_was_taken(kept, intent.reason)
        for region_id, lifetime in intent.lifetimes:
            region = self._ledger.region(region_id)
            if region is not None:
                await self._ledger.put_region(dataclasses.replace(region, lifetime=lifetime))
        for region_id in intent.removes:
            region = self._ledger.region(region_id)
            if region is not None:
                await self._holders.free_region(region, reason=intent.reason)
        await self._ledger.drop_intent(intent.id)

    async def _note_attached(self, part: Part, guest: Guest) -> None:
        """Have the guest's record and its nodes say what it was given; may be done again."""
        new = tuple(one for one in part.attach if one not in guest.requests)
        guest = dataclasses.replace(guest, requests=(*guest.requests, *new))
        if self._lives(guest):
            guest = self._doorbells.ports.provide_running(guest)
        also = records.published(guest, self._ledger.snapshot()) if self._lives(guest) else ()
        await self._ledger.put_guest(guest, also=also)

    async def _take_away(self, intent: Intent, part: Part, guest: Guest) -> None:
        """Unmap what a guest is to have no more, and forget it; may be done again."""
        old = [one for one in part.detach if one in guest.requests]
        without = dataclasses.replace(
            guest, requests=tuple(one for one in guest.requests if one not in old)
        )
        if guest.state is GuestState.REBOOTING or not self._lives(guest):
            await self._ledger.put_guest(without)  # should it come back, it comes without
            return
        guest = await self._take_grants(guest, part.detach)
        without = dataclasses.replace(without, grants=guest.grants)
        if mapped := self._grants.mapped_for(old):
            try:
                await self._unmap(intent, part, guest, without, mapped)
            except DomainGone:  # and its mappings with it
                await self._ledger.put_guest(without)
                return
        if granted := self._grants.mapped_by_guest(old):
            await self._ledger.put_guest(without)
            self._hub.left(guest, granted, intent.reason)
        for region_id in set(_ids(part.detach)) - set(_ids(without.requests)):
            await self._store.remove(f"{records.mark_path(guest.domid)}/{region_id}")

    async def _unmap(
        self,
        intent: Intent,
        part: Part,
        guest: Guest,
        without: Guest,
        old: Sequence[RegionRequest],
    ) -> None:
        async with self._held(intent, part, guest):
            self._tables_of(guest)
            await self._worker.run(lambda: detach(self._xen, guest, old, self._ledger.regions))
            self._hub.left(guest, old, intent.reason)
            # While it stands still: what it puts there from now on is its own.
            self._ledger.know(without)
            await self._ledger.put_guest(without)

    async def _renew_what_was_taken(self, taken: Iterable[RegionRequest], reason: str) -> None:
        """Put sealed regions that were taken from guests on fresh pages.

        Unmapped as they are, Xen itself may still write to one for such a guest: to one registered
        for its vCPUs' times or its event channels (xen/common/domain.c, map_guest_area()).
        """
        by_holder: dict[str, list[str]] = {}
        for region_id in dict.fromkeys(_ids(taken)):
            region = self._ledger.region(region_id)
            if region is not None and region.terms.is_sealed and region.kept:
                by_holder.setdefault(region.holder_uuid, []).append(region_id)
        for holder_uuid, region_ids in by_holder.items():
            try:
                await self._windows.renew(holder_uuid, region_ids, reason=reason)
            except StoreTrouble:
                raise
            except XshmError as error:
                # What was asked for is done; this is the thorough end of it.
                log.error("no fresh pages", regions=region_ids, reason=error.one_line())

    def _lives(self, guest: Guest) -> bool:
        return identity.is_still(self._xen, guest.domid, guest.uuid)

    # -- holding a guest still ------------------------------------------------------------------

    @asynccontextmanager
    async def _held(self, intent: Intent, part: Part, guest: Guest) -> AsyncIterator[Part]:
        """Pause a guest for the body, with its other pauses on record should we be cut off."""
        pauses = 0
        if identity.verify(self._xen, guest).paused:
            part = await self._ledger.put_part(
                intent.id, dataclasses.replace(part, pauses=1, is_counting=True)
            )
            identity.verify(self._xen, guest)
            pauses = pause_count(self._xen, guest.domid)
        part = await self._ledger.put_part(
            intent.id, dataclasses.replace(part, pauses=pauses, is_counting=False)
        )
        identity.pause(self._xen, guest)
        try:
            yield part
        finally:
            self._owed.unpause(guest)
            now = next(one for one in self._now(intent).parts if one.generation == part.generation)
            self._ledger.know_part(intent.id, dataclasses.replace(now, pauses=None))

    async def give_pauses_back(self) -> None:
        """After a start: leave on every guest the pauses of others, and none of ours."""
        for intent in self._ledger.intents:
            for part in intent.parts:
                guest = self._ledger.guest(part.generation)
                if guest is None or part.pauses is None:
                    continue
                with contextlib.suppress(DomainGone):
                    await self._give_back(intent, part, guest)

    async def _give_back(self, intent: Intent, part: Part, guest: Guest) -> None:
        before = part.pauses or 0
        info = self._xen.domain_info(guest.domid)
        if info is not None and info.uuid == guest.uuid and info.paused and not info.dying:
            limit = 1
            if part.is_counting:
                limit = LIMIT  # the count was cut off, and left more than there were
            else:
                await self._ledger.put_part(intent.id, dataclasses.replace(part, is_counting=True))
            for _ in range(min(limit, pause_count(self._xen, guest.domid) - before)):
                self._xen.unpause(guest.domid)
        await self._ledger.put_part(
            intent.id, dataclasses.replace(part, pauses=None, is_counting=False)
        )


def _ids(requests: Iterable[RegionRequest]) -> list[str]:
    return [request.region_id for request in requests]
