# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stops every new domain before its first instruction, until it is known what it is to have.

A pause of ours is taken on it as soon as libxl has written its first node.  Pause counts nest
(xen/common/domain.c), so xl's own unpause does not start it; and libxl's creation lock keeps
``xl create`` from reporting success before us.  If xshmd is killed, the lock falls but the pause
stays: the guest waits for the next start rather than run without its memory.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from xshmd.engine.ledger import Ledger
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import DomainGone, HypercallFailed
from xshmd.model import DomainInfo, Guest, GuestState
from xshmd.policy.identity import is_holder_uuid, new_generation
from xshmd.ports import CreationLock, HeldLock, Hypervisor, Store
from xshmd.units import DOMID_0, DOMID_FIRST_RESERVED, DomId

log = structlog.get_logger()

ROOT: Final = "/libxl"
_DOMAIN_PATH: Final = re.compile(r"/libxl/([0-9]{1,5})(?:/(.*))?")

OnHeld = Callable[[Guest, bool], Awaitable[None]]
OnChange = Callable[[], Awaitable[None]]


class Gate:
    """Watches ``/libxl`` and holds what is new.

    Its own lane into Xen, so that a new guest does not run free while the reconciler zeroes memory.
    It writes nothing to the ledger but the HELD record of a domain it has just found.
    """

    def __init__(
        self, xen: Hypervisor, store: Store, ledger: Ledger, locks: CreationLock
    ) -> None:
        self._xen, self._store, self._ledger, self._locks = xen, store, ledger, locks
        self._worker = XenWorker()
        self._seen: set[DomId] = {DOMID_0}
        self._held: dict[str, HeldLock] = {}

    def adopt(self, domid: DomId) -> None:
        """Say that this domain is not new: the ledger knows it, or it ran before us."""
        self._seen.add(domid)

    def forget(self, domid: DomId) -> None:
        """Say that this domain is gone, so that its number is a new domain when it comes again."""
        self._seen.discard(domid)

    async def run(
        self,
        on_held: OnHeld,
        on_change: OnChange,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Watch for ever.

        Args:
            on_held: Called with each guest now standing still, and whether it had run before.
            on_change: Called when a domain's own node went away or the connection was lost.
            task_status: Started once what is there at the start has been looked at.
        """
        async with self._store.watch(ROOT) as events:
            started = False
            async for event in events:
                if (match := _DOMAIN_PATH.fullmatch(event.path)) is None:
                    for name in await self._store.directory(ROOT) or ():
                        if name.isdigit():
                            await self._look_at(DomId(int(name)), on_held, at_start=not started)
                    await on_change()
                else:
                    domid = DomId(int(match[1]))
                    if domid not in self._seen:
                        await self._look_at(domid, on_held, at_start=False)
                    elif match[2] is None:
                        await on_change()
                if not started:
                    started = True
                    task_status.started()

    async def _look_at(self, domid: DomId, on_held: OnHeld, *, at_start: bool) -> None:
        if domid in self._seen or not 0 <= domid < DOMID_FIRST_RESERVED:
            return
        info = await self._worker.run(self._xen.domain_info, domid)
        if info is None or info.dying:
            return  # the node of a domain that is gone already, or not made by Xen at all
        self._seen.add(domid)
        if is_holder_uuid(info.uuid):
            return
        if at_start and not (info.paused and info.cpu_time_ns == 0):
            log.info("domain found running at start, left alone", domid=domid)
            return
        guest = Guest(
            domid=domid, uuid=info.uuid, name="", generation=new_generation(), state=GuestState.HELD
        )
        # The record first: should we die between it and the pause, the next start finds it.
        await self._ledger.put_guest(guest)
        try:
            had_run = await self.hold(guest)
        except DomainGone:
            await self._ledger.drop_guest(guest.generation)
            self._seen.discard(domid)
            return
        await on_held(guest, had_run)

    async def hold(self, guest: Guest) -> bool:
        """Take the creation lock and one pause; return whether the guest had run before."""
        lock = self._locks.try_hold(guest.domid, guest.uuid)
        if lock is not None:
            self._held[guest.generation] = lock
        try:
            await self._worker.run(self._xen.pause, guest.domid)
            info: DomainInfo | None = await self._worker.run(self._xen.domain_info, guest.domid)
        except HypercallFailed:
            self.unlock(guest)
            raise
        return info is not None and info.cpu_time_ns > 0

    async def unpause(self, guest: Guest) -> None:
        """Give our pause back."""
        await self._worker.run(self._xen.unpause, guest.domid)

    def relock(self, guest: Guest) -> None:
        """Take the creation lock again after a start, where it can be had."""
        if guest.generation not in self._held:
            lock = self._locks.try_hold(guest.domid, guest.uuid)
            if lock is not None:
                self._held[guest.generation] = lock

    def creation_is_over(self, guest: Guest) -> bool:
        """Return whether the toolstack has done everything but start the guest."""
        return self._locks.is_finished(guest.domid, guest.uuid)

    def unlock(self, guest: Guest) -> None:
        """Let ``xl create`` go on; may be called again without harm."""
        lock = self._held.pop(guest.generation, None)
        if lock is not None:
            lock.release()

    def close(self) -> None:
        """Let go of every lock; pauses stay, and are found again by the next start."""
        for lock in self._held.values():
            lock.release()
        self._held.clear()
