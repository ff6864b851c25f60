# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stops every new domain before its first instruction, until it is known what it is to have.

A pause of ours is taken on it as soon as libxl has written its first node.  Pause counts nest
(xen/common/domain.c), so xl's own unpause does not start it; and libxl's creation lock keeps
``xl create`` from reporting success before us.  If xshmd is killed, the lock falls but the pause
stays: the guest waits for the next start rather than run without its memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import structlog
import trio

from xshmd.engine import identity
from xshmd.engine.ledger import Ledger
from xshmd.errors import DomainGone, HypercallFailed, XshmError
from xshmd.model import Guest, GuestState
from xshmd.policy.identity import is_holder_uuid, new_generation
from xshmd.ports import CreationLock, HeldLock, Hypervisor, Store
from xshmd.units import DOMID_0, DOMID_FIRST_RESERVED, DomId

log = structlog.get_logger()

ROOT: Final = "/libxl"
AGAIN_S: Final = 1.0
"""When to look again at what could not be looked at."""
_DOMAIN_PATH: Final = re.compile(r"/libxl/([0-9]{1,5})(?:/(.*))?")


class Gate:
    """Watches ``/libxl`` and holds what is new.

    A task of its own, so that a new guest does not run free while the reconciler zeroes memory.  It
    writes nothing to the ledger but the HELD record of a domain it has just found.
    """

    def __init__(self, xen: Hypervisor, store: Store, ledger: Ledger, locks: CreationLock) -> None:
        self._xen, self._store, self._ledger, self._locks = xen, store, ledger, locks
        self._seen: dict[DomId, str] = {}
        self._held: dict[tuple[DomId, str], HeldLock] = {}
        self._looking_at: set[DomId] = set()
        self.had_run: set[str] = set()
        """Generations of guests that had run before they could be held."""

    def adopt(self, guest: Guest) -> None:
        """Say that the ledger knows this domain from an earlier life of ours."""
        self._seen[guest.domid] = guest.uuid

    def adopt_holder(self, domid: DomId, uuid: str) -> None:
        """Say that this domain is a holder of ours."""
        self._seen[domid] = uuid

    def has_looked_at(self, domid: DomId) -> bool:
        """Return whether the domain is known here: if it is to have regions, so does the ledger."""
        return domid in self._seen and domid not in self._looking_at

    def is_ending(self, guest: Guest) -> bool:
        """Return whether the domain's nodes are gone, which libxl removes first."""
        return self._seen.get(guest.domid) != guest.uuid

    def forget(self, guest: Guest) -> None:
        """Say that this guest is gone, so that its domid is a new domain when it comes again."""
        self.had_run.discard(guest.generation)
        if self._seen.get(guest.domid) == guest.uuid:
            del self._seen[guest.domid]

    async def run(
        self,
        on_change: Callable[[], None],
        on_return: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Watch for ever.

        Args:
            on_change: Called when a domain was held, and when one may have gone.
            on_return: Called when the connection was lost and is back.
            task_status: Started once what is there at the start has been looked at.
        """
        async with self._store.watch(ROOT) as events, trio.open_nursery() as nursery:
            due: set[str] = set()

            async def again(path: str, at_start: bool) -> None:
                await trio.sleep(AGAIN_S)
                due.discard(path)
                await handle(path, at_start)

            async def handle(path: str, at_start: bool) -> None:
                try:
                    failed = await self._handle(path, on_change, at_start=at_start)
                except XshmError as error:
                    log.warning("gate could not look", path=path, reason=error.one_line())
                    match = _DOMAIN_PATH.fullmatch(path)
                    failed = [f"{ROOT}/{match[1]}" if match else path]
                for missed in failed:
                    if missed not in due:
                        due.add(missed)
                        # What ran before our start may run on, however late it is looked at.
                        nursery.start_soon(again, missed, at_start)

            started = False
            async for event in events:
                if started and event.path == ROOT:
                    on_return()
                await handle(event.path, not started)
                if not started:
                    started = True
                    task_status.started()

    async def _handle(
        self, path: str, on_change: Callable[[], None], *, at_start: bool
    ) -> list[str]:
        """Look at what an event speaks of; return the paths of the domains that failed."""
        failed = []
        if (match := _DOMAIN_PATH.fullmatch(path)) is not None:
            domids = [DomId(int(match[1]))]
        else:
            names = await self._store.directory(ROOT) or ()
            domids = [DomId(int(name)) for name in names if name.isdecimal()]
            for gone in self._seen.keys() - set(domids):
                del self._seen[gone]
                self._unlock_ending(gone)
        for domid in domids:
            if domid not in self._seen or (match is not None and match[2] is None):
                self._looking_at.add(domid)
                try:
                    await self._look_at(domid, at_start=at_start)
                except HypercallFailed as error:  # one domain's trouble is not the others'
                    log.warning("gate could not hold", domid=domid, reason=error.one_line())
                    failed.append(f"{ROOT}/{domid}")
                finally:
                    self._looking_at.discard(domid)
        if match is None or match[2] is None:
            on_change()
        return failed

    async def _look_at(self, domid: DomId, *, at_start: bool) -> None:
        if not DOMID_0 < domid < DOMID_FIRST_RESERVED:
            return
        before = self._xen.domain_info(domid)
        # libxl removes the node before it destroys the domain: without it, this is an end.
        kind, name = await self._store.read_many(
            (f"{ROOT}/{domid}/type", f"/local/domain/{domid}/name")
        )
        if kind is None:
            self._seen.pop(domid, None)
            self._unlock_ending(domid)
            return
        info = self._xen.domain_info(domid)
        if info is None or info.dying or self._seen.get(domid) == info.uuid:
            return
        if before is None or before.uuid != info.uuid:
            # What was read is the last one's; whoever made this one has yet to write its nodes.
            raise DomainGone(f"domain {domid} is another by now", hint="it is looked at again")
        self._seen[domid] = info.uuid
        if is_holder_uuid(info.uuid):
            return
        if at_start and not (info.paused and info.cpu_time_ns == 0):
            log.info("domain found running at start, left alone", domid=domid)
            return
        guest = Guest(
            domid=domid,
            uuid=info.uuid,
            name=name or "",
            generation=new_generation(),
            state=GuestState.HELD,
        )
        # The lock first, since it costs nothing and falls with us; then the record, so that should
        # we die before the pause or after it, the next start finds it.
        self.lock(guest)
        try:
            await self._ledger.put_guest(guest)
            self._hold(guest)
        except XshmError as error:
            # Looked at again soon, and until then the lock stays: without it xl starts nothing.
            self._seen.pop(domid, None)
            if isinstance(error, DomainGone):
                self.unlock(guest)
            if isinstance(error, HypercallFailed):
                await self._ledger.drop_guest(guest.generation)
            if not isinstance(error, DomainGone):
                raise

    def _hold(self, guest: Guest) -> None:
        if identity.pause(self._xen, guest).cpu_time_ns > 0:
            self.had_run.add(guest.generation)

    def unpause(self, guest: Guest) -> None:
        """Give our pause back; DomainGone if the guest is not there any more."""
        identity.unpause(self._xen, guest)

    def lock(self, guest: Guest) -> None:
        """Take the creation lock, where it can be had."""
        key = (guest.domid, guest.uuid)
        if key not in self._held:
            lock = self._locks.try_hold(*key)
            if lock is not None:
                self._held[key] = lock

    def creation_is_over(self, guest: Guest) -> bool:
        """Return whether the toolstack has done everything but start the guest."""
        return self._locks.is_finished(guest.domid, guest.uuid)

    def unlock(self, guest: Guest) -> None:
        """Let ``xl create`` go on; may be called again without harm."""
        lock = self._held.pop((guest.domid, guest.uuid), None)
        if lock is not None:
            lock.release()

    def _unlock_ending(self, domid: DomId) -> None:
        """Let libxl end a domain whose nodes it has removed: its next step is to take the lock
        (tools/libs/light/libxl_domain.c, ``devices_destroy_cb``), also where making it has failed.
        """
        recorded = self._ledger.guest_of_domain(domid)
        for key in [key for key in self._held if key[0] == domid]:
            # The doomed end by us, and then it is we who have removed the nodes.
            if (
                recorded is None
                or recorded.uuid != key[1]
                or recorded.state is not GuestState.DOOMED
            ):
                self._held.pop(key).release()

    def close(self) -> None:
        """Let go of every lock; pauses stay, and are found again by the next start."""
        for lock in self._held.values():
            lock.release()
        self._held.clear()
