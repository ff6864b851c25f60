# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gathers what a plan of changes is made from: the files, our records, what Xen and libxl say.

Used by the reconciler alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import trio

from xshmd.changes import AttachRegion, Change, DetachRegion
from xshmd.declarations import Declarations
from xshmd.dom0_ports import ConfigFinder
from xshmd.engine.ledger import Ledger
from xshmd.errors import XshmError
from xshmd.machine import DomainInfo
from xshmd.model import GuestConfig, GuestState, GuestType, Lifetime
from xshmd.policy.changes import ChangePlan, LiveDomain, plan_changes
from xshmd.policy.desired import differences
from xshmd.policy.identity import is_holder_uuid
from xshmd.ports import Hypervisor, Store
from xshmd.units import DOMID_0


class Desired:
    """Plans sets of changes."""

    def __init__(
        self, *, xen: Hypervisor, store: Store, finder: ConfigFinder, ledger: Ledger
    ) -> None:
        self._xen, self._store, self._finder, self._ledger = xen, store, finder, ledger
        self._declarations = Declarations()

    async def remember(self) -> None:
        """Note what the files say at the start, so that a reload knows what they say no more."""
        with contextlib.suppress(XshmError):  # whoever reloads is told
            self._declarations = await trio.to_thread.run_sync(self._finder.declarations)

    async def plan(
        self, changes: Sequence[Change], lifetimes: Mapping[str, Lifetime] | None = None
    ) -> ChangePlan:
        """Return the plan of these changes; raises all that is wrong with them."""
        domains = await self._domains_named(changes)
        known, defined, policy = await trio.to_thread.run_sync(
            lambda: (self._finder.known(), self._finder.regions(), self._finder.policy())
        )
        return plan_changes(
            changes,
            host=self._xen.host_info(),
            snapshot=self._ledger.snapshot(),
            known=known,
            defined=defined,
            domains=domains,
            lifetimes=lifetimes,
            policy=policy,
        )

    async def plan_reload(self) -> tuple[ChangePlan, Declarations]:
        """Read the files anew; return what is to change, and what they say."""
        now = await trio.to_thread.run_sync(self._finder.declarations)
        strangers = await self._strangers() if now.guests else {}
        changes, lifetimes = differences(
            now, self._declarations, self._ledger.snapshot(), strangers
        )
        return await self.plan(changes, lifetimes), now

    def reloaded(self, now: Declarations) -> None:
        """Note that what exists is as these say."""
        self._declarations = now

    # -- the domains that changes speak of ------------------------------------------------------

    async def _domains_named(self, changes: Sequence[Change]) -> list[LiveDomain]:
        said = {one.guest for one in changes if isinstance(one, (AttachRegion, DetachRegion))}
        if not said:
            return []
        ours = {
            int(guest.domid)
            for guest in self._ledger.guests
            if guest.state is GuestState.ATTACHED and said & {guest.name, str(guest.domid)}
        }
        named = [
            (info, name)
            for info, name in await self._named_domains()
            if int(info.domid) in ours or said & {name, str(info.domid)}
        ]
        types = await self._store.read_many([f"/libxl/{info.domid}/type" for info, _ in named])
        return [
            LiveDomain(
                info=info, name=name, guest_type=_type(info, text),
                config=await self._config(name, info),
                is_built=await self._store.is_introduced(info.domid),
            )
            for (info, name), text in zip(named, types, strict=True)
        ]  # fmt: skip

    async def _named_domains(self) -> list[tuple[DomainInfo, str]]:
        infos = self._xen.domains()
        names = await self._store.read_many([f"/local/domain/{one.domid}/name" for one in infos])
        return [(info, name or "") for info, name in zip(infos, names, strict=True)]

    async def _strangers(self) -> dict[str, int]:
        """Return the running guests that we know nothing of, by name."""
        ours = {guest.name for guest in self._ledger.guests}
        return {
            name: int(info.domid)
            for info, name in await self._named_domains()
            if name and name not in ours and info.domid != DOMID_0
            if not is_holder_uuid(info.uuid) and await self._store.is_introduced(info.domid)
        }

    async def _config(self, name: str, info: DomainInfo) -> GuestConfig | None:
        try:
            return await trio.to_thread.run_sync(
                lambda: self._finder.find(name=name, uuid=info.uuid)
            )
        except XshmError:
            return None  # what Xen says is what there is to go by


def _type(info: DomainInfo, text: str | None) -> GuestType:
    for guest_type in GuestType:
        if guest_type.value == text:
            return guest_type
    # The one whose address space has the fewest places for a region.
    return GuestType.HVM if info.hvm else GuestType.PV
