# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who in the control domain may have a region mapped, so that no frame goes while somebody has it.

A mapping in another process is out of our reach: nobody but that process can undo it, and Xen keeps
the page for as long as it lasts.  Were the region freed meanwhile, what the process goes on writing
after the wipe would be in a page that Xen then gives to a stranger, and a holder that was destroyed
would stay for ever as a dying domain.  So a region is never freed under a lease: whoever wants it
back has the process told, and waits, or is refused.

A lease ends when its connection does, which the kernel closes when the process dies.  It is on
record too: after a restart of ours it counts for as long as that process lives, or until it asks
for the same region again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import structlog
import trio

from xshmd.dom0_ports import ConfigFinder, Processes
from xshmd.engine.access import reachable
from xshmd.engine.events import EventHub
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.errors import Conflict, Refused, XshmError
from xshmd.events import EventKind
from xshmd.model import Lease, Process, Prot, Region
from xshmd.policy.quota_rules import check_lease
from xshmd.policy.refusals import keeps_it_mapped

log = structlog.get_logger()

MOST: Final = 24
"""Leases at a time: each is a connection of root's, of which the socket has 48 in all."""
LET_GO_S: Final = 5.0
"""How long a process that is told to let go of a region may take."""


class LiveLease:
    """A lease whose process is connected.  See :class:`xshmd.api.HeldLease`."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._wanted_back = trio.Event()
        self._why = ""

    def tell(self, why: str) -> None:
        """Say that the region is wanted back; only the first reason counts."""
        if not self._wanted_back.is_set():
            self._why = why
            self._wanted_back.set()

    async def wait_ending(self) -> str:
        await self._wanted_back.wait()
        return self._why


class Leases:
    """Begins and ends leases.  Used by the reconciler, whose loop runs all that writes records."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        holders: Holders,
        hub: EventHub,
        processes: Processes,
        finder: ConfigFinder,
    ) -> None:
        self._ledger, self._holders, self._hub = ledger, holders, hub
        self._processes, self._finder = processes, finder
        self._live: dict[str, LiveLease] = {}
        self._wanted_back: dict[str, str] = {}
        """Regions that somebody waits for, and why."""
        self._ended = trio.Event()

    async def begin(self, lease_id: str, region_id: str, prot: Prot, process: Process) -> LiveLease:
        """Give a process a lease, in place of one that it had before we were started anew.

        Raises:
            NoSuchRegion, Conflict, Refused: there is no such region, or it cannot be had now.
            ConfigError, ConfigUnreadable: what the administrator allows cannot be known.
        """
        region, _ = reachable(self._ledger, self._holders, region_id)
        replaced = [
            lease.lease_id
            for lease in self._ledger.leases_of(region_id)
            if lease.process == process and lease.lease_id not in self._live
        ]
        lease = Lease(lease_id=lease_id, region_id=region_id, prot=prot, process=process)
        nr_after = len(self._ledger.leases) + 1 - len(replaced)
        self._check(region, prot, nr_after=nr_after)
        if not replaced:  # what it has is not taken away by a policy that came later
            policy = await trio.to_thread.run_sync(self._finder.policy)
            if isinstance(policy, XshmError):
                raise policy
            check_lease(lease, policy, nr_leases=nr_after)
        live = self._live[lease_id] = LiveLease(lease)
        await self._ledger.put_lease(lease)
        for old in replaced:
            await self._ledger.drop_lease(old)
        self._hub.about_lease(EventKind.LEASE_BEGAN, lease, "renewed" if replaced else "")
        return live

    def _check(self, region: Region, prot: Prot, *, nr_after: int) -> None:
        region_id = region.region_id
        removes = {one for intent in self._ledger.intents for one in intent.removes}
        if region_id in removes or region_id in self._wanted_back:
            raise Conflict(
                f"region {region_id} is about to be removed",
                hint="`xshmctl list` shows when it is gone",
                region=region_id,
            )
        if region.terms.prot is Prot.RO and prot is Prot.RW:
            raise Refused(
                f"region {region_id} is prot=ro for all of its members",
                hint="ask for prot ro, or define the region with prot=rw",
                rule="prot-above-owner",
                region=region_id,
            )
        if nr_after > MOST:
            raise Refused(
                f"{MOST} leases are held in the control domain already",
                hint="`xshmctl show` says which processes have them; end one",
                rule="too-many-leases",
                region=region_id,
            )

    async def end(self, lease_id: str, reason: str = "") -> None:
        """End a lease; does nothing if it is over."""
        live = self._live.pop(lease_id, None)
        if live is not None:
            live.tell(reason)
        lease = next((one for one in self._ledger.leases if one.lease_id == lease_id), None)
        if lease is None:
            return
        await self._ledger.drop_lease(lease_id)
        self._hub.about_lease(EventKind.LEASE_ENDED, lease, reason)
        self._ended.set()
        self._ended = trio.Event()

    async def prune(self) -> bool:
        """End the leases of processes that are no more; return whether any is left."""
        regions = {region.region_id for region in self._ledger.regions}
        for lease in self._ledger.leases:
            process = lease.process
            if lease.region_id not in regions:
                await self.end(lease.lease_id, "its region is lost")
            elif not process.started and lease.lease_id in self._live:
                continue  # in another PID namespace: its connection is all there is to go by
            elif self._processes.started_at(process.pid) != process.started or not process.started:
                await self.end(lease.lease_id, "process ended")
        return bool(self._ledger.leases)

    def ask_back(self, region_ids: Iterable[str], why: str) -> None:
        """Tell whoever has these regions that they are wanted back."""
        wanted = set(region_ids)
        for live in tuple(self._live.values()):
            if live.lease.region_id in wanted:
                live.tell(why)

    async def wait_free(self, region_ids: Iterable[str], why: str) -> None:
        """Ask for regions, and wait a moment until no process has them.  Not from the loop."""
        wanted = set(region_ids)
        self._wanted_back |= dict.fromkeys(wanted, why)
        self.ask_back(wanted, why)
        try:
            with trio.move_on_after(LET_GO_S):
                while any(self._ledger.leases_of(one) for one in wanted):
                    await self._ended.wait()
        finally:
            for one in wanted:
                self._wanted_back.pop(one, None)

    def check_free(self, region_ids: Iterable[str]) -> None:
        """Raise Conflict if a process has any of these regions."""
        for region_id in region_ids:
            if leases := self._ledger.leases_of(region_id):
                raise keeps_it_mapped(region_id, leases)
