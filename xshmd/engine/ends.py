# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ends: guests, the regions nobody has or awaits any more, and their holders."""

from __future__ import annotations

import dataclasses
from typing import Final

import structlog

from xshmd.dom0_ports import Clock
from xshmd.engine.changes import Changes
from xshmd.engine.events import EventHub
from xshmd.engine.gate import Gate
from xshmd.engine.grants import Grants
from xshmd.engine.holders import NO_DOMAIN, Holders
from xshmd.engine.leases import Leases
from xshmd.engine.ledger import Ledger
from xshmd.engine.leftovers import remove_stray
from xshmd.engine.options import Options
from xshmd.events import EventKind
from xshmd.machine import (
    SHUTDOWN_CRASH,
    SHUTDOWN_POWEROFF,
    SHUTDOWN_REBOOT,
    SHUTDOWN_WATCHDOG,
    DomainInfo,
)
from xshmd.model import Guest, GuestState, Holder, Lifetime, Region, Role
from xshmd.ports import Store

log = structlog.get_logger()

COMES_BACK: Final = frozenset({SHUTDOWN_REBOOT, SHUTDOWN_CRASH, SHUTDOWN_WATCHDOG})
"""Ways a guest ends itself after which xl, as it is usually told to, makes it anew."""
OWNER_GONE: Final = "owner gone"
SLACK_S: Final = 0.01
"""How much too early a look at the end of a grace may be: no other follows, and clocks round."""
_THROUGH: Final = (GuestState.ATTACHED, GuestState.REBOOTING)
"""States of guests that have come through the gate."""


class Ends:
    """Follows guests to their end and frees what they leave.  Used by the reconciler alone."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        ledger: Ledger,
        holders: Holders,
        gate: Gate,
        grants: Grants,
        changes: Changes,
        leases: Leases,
        hub: EventHub,
        options: Options,
    ) -> None:
        self._grants, self._changes, self._leases, self._hub = grants, changes, leases, hub
        self._store, self._clock, self._ledger = store, clock, ledger
        self._holders, self._gate, self._options = holders, gate, options
        self._reasons: dict[str, int] = {}

    def note_shutdowns(self, domains: dict[int, DomainInfo]) -> None:
        """Remember how guests shut themselves down, before xl destroys what would tell."""
        for guest in self._ledger.guests:
            info = domains.get(guest.domid)
            if info is not None and info.uuid == guest.uuid and info.shut_down:
                self._reasons[guest.generation] = info.shutdown_reason

    async def ended(self, guest: Guest) -> float:
        """Record that the guest's domain is gone.

        Returns:
            After how many seconds to collect again; 0 if now.
        """
        guest = await self._grants.forget(guest)
        self._gate.unlock(guest)
        self._gate.forget(guest)
        await remove_stray(self._store, guest.domid)
        reason = self._reasons.pop(guest.generation, SHUTDOWN_POWEROFF)
        if guest.state is GuestState.ATTACHED:
            self._hub.left(guest, guest.requests, "guest ended")
        if guest.state is GuestState.ATTACHED and reason in COMES_BACK:
            await self._ledger.put_guest(
                dataclasses.replace(
                    guest, state=GuestState.REBOOTING, ended_at=self._clock.uptime()
                )
            )
            self._hub.about_guest(EventKind.GUEST_AWAITED, guest)
            return self._options.reboot_grace_s
        await self._ledger.drop_guest(guest.generation)
        if guest.requests:
            log.info("guest ended", guest=guest.name, domid=guest.domid)
        return 0.0

    async def collect(self) -> None:
        """Free every region and holder that nobody has or awaits."""
        for region in self._ledger.regions:
            if any(self._ledger.holder(uuid) is None for uuid in region.holder_uuids):
                await self._holders.free_frames(region)
        back = {g.name for g in self._ledger.guests if g.state is GuestState.ATTACHED}
        for guest in self._ledger.guests:
            if guest.state is not GuestState.REBOOTING:
                continue
            if guest.name in back:
                await self._ledger.drop_guest(guest.generation)
            elif self._clock.uptime() - guest.ended_at >= self._options.reboot_grace_s - SLACK_S:
                await self._ledger.drop_guest(guest.generation)
                log.info("guest no longer awaited", guest=guest.name)
        await self._note_owners()
        await self._withdraw_orphans()
        by_holder: dict[str, list[Region]] = {}
        for region in self._ledger.regions:
            if len(region.holder_uuids) != 1 and self._is_unused(region):
                # Now, so that below each of its holders is found to be empty; or it has none.
                await self._holders.free_region(region, reason="its last member ended")
                continue
            for uuid in region.holder_uuids:
                by_holder.setdefault(uuid, []).append(region)
        for holder in self._ledger.holders:
            theirs = by_holder.get(holder.uuid, [])
            unused = [region for region in theirs if self._is_unused(region)]
            if unused == theirs and not self._is_needed(holder):
                await self._free_all(holder, theirs)
            else:
                for region in unused:
                    await self._holders.free_region(region, reason="its last member ended")

    async def _note_owners(self) -> None:
        """Write down of regions that were made before their owner came that it has come."""
        for guest in self._ledger.guests:
            if guest.state not in _THROUGH:
                continue
            for request in guest.requests:
                region = self._ledger.region(request.region_id)
                if request.role is Role.OWNER and region is not None and not region.owner_came:
                    await self._ledger.put_region(dataclasses.replace(region, owner_came=True))

    async def _withdraw_orphans(self) -> None:
        """Take the regions whose owner is gone for good from those that borrow them."""
        begun = {one for intent in self._ledger.intents for one in intent.removes}
        there = {g.name for g in self._ledger.guests if g.state is not GuestState.DOOMED}
        orphans = [
            region
            for region in self._ledger.regions
            if region.lifetime is Lifetime.OWNER and region.owner_came
            if region.owner not in there and self._is_settled(region)
            if region.region_id not in begun
        ]
        if orphans:
            await self._changes.withdraw(orphans, OWNER_GONE)

    def _is_settled(self, region: Region) -> bool:
        """Return whether it has members, none of which is being given it just now."""
        members = self._ledger.members(region.region_id)
        return bool(members) and all(guest.state in _THROUGH for guest in members)

    def _is_unused(self, region: Region) -> bool:
        if region.lifetime is Lifetime.SYSTEM or self._ledger.members(region.region_id):
            return False
        if not self._ledger.leases_of(region.region_id):
            return True
        if region.lifetime is Lifetime.OWNER:  # of which a process is no substitute
            self._leases.ask_back([region.region_id], OWNER_GONE)
        return False

    def _is_needed(self, holder: Holder) -> bool:
        """Return whether a guest has the holder as its target, or references of it."""
        return any(
            guest.holder_uuid == holder.uuid
            or any(grant.holder_uuid == holder.uuid for grant in guest.grants)
            for guest in self._ledger.guests
        )

    async def _free_all(self, holder: Holder, regions: list[Region]) -> None:
        # At one go, and Xen does the wiping: the pages of a dying domain are scrubbed.
        for region in regions:
            if region.ready:
                await self._ledger.put_region(dataclasses.replace(region, ready=False))
        await self._holders.destroy(holder)
        for region in regions:
            await self._ledger.drop_region(region.region_id)
            self._hub.about_region(EventKind.REGION_REMOVED, region, "its last member ended")

    async def check_holders(self, domains: dict[int, DomainInfo]) -> None:
        """Notice holders that somebody else destroyed, and undo those whose making was cut off."""
        for holder in self._ledger.holders:
            if holder.domid == NO_DOMAIN:
                await self._holders.destroy(holder)
                continue
            info = domains.get(holder.domid)
            if info is None or info.uuid != holder.uuid or info.dying:
                regions = self._ledger.regions
                lost = [r.region_id for r in regions if holder.uuid in r.holder_uuids]
                log.error(
                    "holder destroyed by somebody else",
                    holder=holder.uuid,
                    domid=holder.domid,
                    regions=lost,
                    reason="running guests keep their memory, and nobody can join them any more",
                )
                await self._holders.lose(holder)
