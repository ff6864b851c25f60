# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine: looks at what is, again and again, and decides the next step for each thing in it.

Everything that changes the world happens in the loop (:mod:`xshmd.engine.loop`), a piece of work at
a time, so nothing here needs a lock.  Watches are hints: each look asks Xen again.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import structlog
import trio

from xshmd.api import HeldLease
from xshmd.changes import Change, Step
from xshmd.dom0_ports import Clock, ConfigFinder, Processes
from xshmd.engine.access import Access
from xshmd.engine.changes import Changes
from xshmd.engine.copies import Copies
from xshmd.engine.desired import Desired
from xshmd.engine.doorbells import Doorbells
from xshmd.engine.ends import Ends
from xshmd.engine.events import EventHub
from xshmd.engine.gate import Gate
from xshmd.engine.grants import SWEEP_S, Grants
from xshmd.engine.holder_shutdown import HolderShutdown
from xshmd.engine.holders import Holders
from xshmd.engine.inspection import Inspection
from xshmd.engine.leases import Leases
from xshmd.engine.ledger import Ledger
from xshmd.engine.leftovers import remove_leftovers
from xshmd.engine.lent import Lent
from xshmd.engine.loop import AGAIN_S, Loop, Work
from xshmd.engine.options import Options
from xshmd.engine.orders import Orders
from xshmd.engine.passage import Passage
from xshmd.engine.recovery import recover
from xshmd.engine.watches import Watches
from xshmd.engine.windows import Windows
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import DomainGone, HypercallFailed, NoSuchGuest, TimedOut, XshmError
from xshmd.events import Event, EventKind
from xshmd.machine import DomainInfo, HostInfo
from xshmd.model import Guest, GuestConfig, GuestState, Holder, Process, Prot, Snapshot
from xshmd.ports import CreationLock, EventChannels, Hypervisor, Keeper, Store
from xshmd.ranges import Part
from xshmd.units import DomId

log = structlog.get_logger()

LINGER_S: Final = 20.0
"""How long xl waits with us for a destroyed domain to be forgotten by Xen."""
LINGER_POLL_S: Final = 0.1
PROCESSES_S: Final = 5.0
"""When to look again whether the processes that have leases still live."""
LEFTOVERS_S: Final = (3.0, 15.0)
"""When to look again for nodes that xl wrote for a domain after we had destroyed it."""


class Reconciler:
    """The engine.  Implements :class:`~xshmd.api.RegionsApi` and ``PartCopier``."""

    def __init__(
        self,
        *,
        xen: Hypervisor,
        keeper: Keeper,
        store: Store,
        finder: ConfigFinder,
        locks: CreationLock,
        clock: Clock,
        processes: Processes,
        options: Options,
        channels: EventChannels | None = None,
    ) -> None:
        self._xen, self._store, self._clock, self._options = xen, store, clock, options
        self._worker = XenWorker()
        self._ledger = ledger = Ledger(store)
        self._hub = hub = EventHub()
        self._holders = holders = Holders(
            xen, self._worker, store, ledger, hub,
            floor_bytes=options.free_memory_floor_bytes, on_created=self._watch_holder,
            keeper=keeper,
        )  # fmt: skip
        self._inspection = inspection = Inspection(xen, ledger, hub)
        self._windows = windows = Windows(
            xen=xen, keeper=keeper, worker=self._worker, ledger=ledger, holders=holders, hub=hub,
            inspection=inspection, finder=finder,
        )  # fmt: skip
        self._doorbells = doorbells = Doorbells(
            channels=channels, xen=xen, ledger=ledger, holders=holders
        )
        self._watches = Watches(xen=xen, ledger=ledger, holders=holders, doorbells=doorbells)
        self._gate = gate = Gate(xen, store, ledger, locks)
        self._lent = lent = Lent(xen=xen, keeper=keeper, worker=self._worker, ledger=ledger)
        self._grants = grants = Grants(
            xen=xen, worker=self._worker, ledger=ledger, holders=holders, lent=lent, hub=hub
        )
        self._passage = Passage(
            xen=xen, worker=self._worker, store=store, finder=finder, clock=clock,
            ledger=ledger, holders=holders, grants=grants, windows=windows, gate=gate, hub=hub,
            doorbells=doorbells, options=options,
        )  # fmt: skip
        self._changes = Changes(
            xen=xen, worker=self._worker, store=store, ledger=ledger, holders=holders,
            grants=grants, windows=windows, hub=hub, doorbells=doorbells,
        )  # fmt: skip
        self._desired = Desired(xen=xen, store=store, finder=finder, ledger=ledger)
        self._copies = Copies(xen=xen, worker=self._worker, ledger=ledger, holders=holders)
        self._leases = Leases(
            ledger=ledger, holders=holders, hub=hub, processes=processes, finder=finder
        )
        self._access = Access(
            xen=xen, keeper=keeper, worker=self._worker, ledger=ledger, holders=holders,
            windows=windows, lent=lent,
        )  # fmt: skip
        self._ends = Ends(
            store=store, clock=clock, ledger=ledger, holders=holders, gate=gate, grants=grants,
            changes=self._changes, leases=self._leases, hub=hub, options=options,
        )  # fmt: skip
        self._loop = Loop(look=self._look, after=doorbells.settle, on_refusal=hub.count_refusal)
        self._orders = Orders(
            loop=self._loop, clock=clock, ledger=ledger, windows=windows, changes=self._changes,
            desired=self._desired, leases=self._leases, hub=hub,
        )  # fmt: skip
        self._shutdown = HolderShutdown(xen=xen, store=store, ledger=ledger, hint=self._loop.hint)
        self.on_ring: Callable[[str], None] = lambda region_id: None
        """Called with each region in which a guest has rung dom0."""
        self._started_at = 0.0

    # -- its life -------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover, then serve for ever."""
        for unreadable in await self._ledger.load():
            log.error("record unreadable", reason=unreadable.one_line())
        await self._lent.recover()
        await recover(
            self._xen, self._worker, self._holders, self._ledger, self._gate, self._grants,
            self._windows, self._changes, self._clock,
        )  # fmt: skip
        self._started_at = trio.current_time()
        await self._desired.remember()
        try:
            async with self._loop.tasks() as nursery:
                for holder in self._ledger.holders:
                    self._watch_holder(holder)
                nursery.start_soon(self._doorbells.run, self._on_ring)
                await nursery.start(self._gate.run, self._loop.hint, self._on_return)
                await nursery.start(self._watch, "@introduceDomain", None)
                await nursery.start(self._watch, "@releaseDomain", self._note_shutdowns)
                for guest in self._ledger.guests:
                    if guest.state is GuestState.REBOOTING:
                        waited = self._clock.uptime() - guest.ended_at
                        self._loop.look_in(max(0.0, self._options.reboot_grace_s - waited))
                self._loop.hint()
                task_status.started()
                await self._loop.run()
        finally:
            self._gate.close()
            self._holders.close()

    def _watch_holder(self, holder: Holder) -> None:
        self._gate.adopt_holder(holder.domid, holder.uuid)
        self._loop.start_soon(self._shutdown.answer, holder)

    async def _watch(
        self,
        path: str,
        before: Work | None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with self._store.watch(path) as events:
            task_status.started()
            async for _ in events:
                if before is not None:
                    await before()
                self._loop.hint()

    async def _note_shutdowns(self) -> None:
        # At once and past the loop, which may be busy: xl destroys a guest that has shut itself
        # down in a moment, and with it what says whether it will come back.
        try:
            self._ends.note_shutdowns(self._domains())
        except XshmError as error:
            log.warning("domains could not be listed", reason=error.one_line())

    def _on_return(self) -> None:
        self._ledger.doubt()
        self._loop.hint()

    def _domains(self) -> dict[int, DomainInfo]:
        return {int(info.domid): info for info in self._xen.domains()}

    async def _on_ring(self, region_id: str) -> None:
        async def look() -> None:
            self._watches.rung(region_id)
            self._doorbells.note_ready(region_id)
            self.on_ring(region_id)

        try:
            await self._loop.ask(look)
        except XshmError as error:
            log.warning("ring not heard", region=region_id, reason=error.one_line())

    # -- the look -------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Compare what the ledger believes with what Xen has, and take every guest a step on."""
        await self._ledger.settle()
        await self._windows.settle()
        await self._changes.settle()
        if not (self._windows.is_settled and self._changes.is_settled):
            self._loop.look_in(AGAIN_S)
        domains = self._domains()
        await self._ends.check_holders(domains)
        self._inspection.inspect()
        for guest in self._ledger.guests:
            try:
                await self._look_at(guest, domains.get(guest.domid))
            except HypercallFailed as error:  # one guest's trouble is not the others'
                log.warning("guest put off", guest=guest.name, reason=error.one_line())
                self._loop.look_in(AGAIN_S)
        if await self._leases.prune():
            self._loop.look_in(PROCESSES_S)
        if await self._grants.sweep():
            self._loop.look_in(SWEEP_S)
        await self._ends.collect()

    async def _look_at(self, guest: Guest, info: DomainInfo | None) -> None:
        if guest.state is GuestState.REBOOTING:
            return
        if info is None or info.uuid != guest.uuid:
            await self._end(guest)
        elif guest.state is GuestState.DOOMED:
            await self._see_doomed(guest, info)
        elif info.dying:
            await self._end(guest)
        elif guest.state is not GuestState.ATTACHED:
            try:
                after = await self._passage.advance(guest)
                if after is None:
                    self._loop.hint()
                elif after.state is not GuestState.ATTACHED and self._gate.is_ending(guest):
                    # xenstored tells nobody of the end of what was not introduced to it.
                    self._loop.look_in(AGAIN_S)
            except DomainGone:
                await self._end(guest)

    async def _see_doomed(self, guest: Guest, info: DomainInfo) -> None:
        if not info.dying:
            await self._passage.finish_doom(guest)
            if not self._options.destroy_on_failure:
                return  # it stays as it is until an admin destroys it
        began = self._passage.doomed_at.get(guest.generation, trio.current_time())
        if trio.current_time() - began > LINGER_S:
            self._gate.unlock(guest)  # somebody keeps its pages: that shall not hang xl
        self._loop.look_in(LINGER_POLL_S)

    async def _end(self, guest: Guest) -> None:
        self._passage.forget(guest)
        if guest.state is GuestState.DOOMED:
            await self._sweep(guest)
        wait_s = await self._ends.ended(self._ledger.guest(guest.generation) or guest)
        if wait_s:
            self._loop.look_in(wait_s)
        if guest.state is GuestState.DOOMED:
            for wait in LEFTOVERS_S:
                self._loop.later(wait, lambda: self._loop.put(lambda: self._sweep(guest)))

    async def _sweep(self, guest: Guest) -> None:
        # Twice: xl was still at work on it when it was destroyed, and may have written nodes since.
        info = self._xen.domain_info(guest.domid)
        if info is None or (info.uuid == guest.uuid and info.dying):
            await remove_leftovers(self._store, guest)

    # -- what clients ask -----------------------------------------------------------------------

    async def ping(self) -> None:
        """Return once the loop has come round: proof that it is alive, for the watchdog."""
        await self._loop.ask(trio.lowlevel.checkpoint)

    def snapshot(self) -> Snapshot:
        return self._ledger.snapshot()

    async def host(self) -> HostInfo:
        await trio.lowlevel.checkpoint()
        return self._xen.host_info()

    async def declare(self, config: GuestConfig) -> GuestConfig:
        return await self._loop.ask_for(lambda: self._passage.declare(config))

    async def withdraw(self, name: str) -> None:
        self._passage.withdraw(name)
        await trio.lowlevel.checkpoint()

    async def read_region(self, region_id: str, offset_bytes: int, nr_bytes: int) -> bytes:
        return await self._loop.ask(lambda: self._access.read(region_id, offset_bytes, nr_bytes))

    async def write_region(
        self, region_id: str, offset_bytes: int, data: bytes, *, dry_run: bool = False
    ) -> None:
        await self._loop.ask(
            lambda: self._access.write(region_id, offset_bytes, data, dry_run=dry_run)
        )

    async def copy_parts(
        self, region_id: str, source: Part, target: Part, *, count_at: Part | None = None
    ) -> int:
        return await self._loop.ask(lambda: self._copies.copy(region_id, source, target, count_at))

    async def read_part(self, region_id: str, part: Part) -> bytes:
        return await self._loop.ask(lambda: self._copies.read(region_id, part))

    async def write_part(self, region_id: str, part: Part, data: bytes) -> None:
        await self._loop.ask(lambda: self._copies.write(region_id, part, data))

    async def wake_part(self, region_id: str, part: Part) -> None:
        async def wake() -> None:
            guest = self._ledger.guest(part.generation)
            peer = guest.peer(region_id) if guest is not None else None
            if peer is not None:
                self._doorbells.ring(region_id, peer.peer_id)

        await self._loop.ask(wake)

    @asynccontextmanager
    async def lease(self, region_id: str, prot: Prot, process: Process) -> AsyncIterator[HeldLease]:
        lease_id = secrets.token_hex(8)
        try:
            held = await self._loop.ask_for(
                lambda: self._leases.begin(lease_id, region_id, prot, process)
            )
            self._loop.hint()  # from now on there are looks at whether the process lives
            yield held
        finally:
            # After whatever of the beginning may still be in the queue.
            self._loop.put(lambda: self._leases.end(lease_id))
            self._loop.hint()

    async def trigger(self, region_id: str, offset_bytes: int) -> int:
        async def now() -> int:
            return self._watches.trigger(region_id, offset_bytes)

        return await self._loop.ask(now)

    def watch(
        self, region_id: str, offset_bytes: int, counter_offset_bytes: int | None
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[None]]:
        return self._watches.watch(self._loop.ask, region_id, offset_bytes, counter_offset_bytes)

    async def apply(self, changes: Sequence[Change], *, dry_run: bool = False) -> tuple[Step, ...]:
        return await self._orders.apply(changes, dry_run=dry_run)

    async def reload(self, *, dry_run: bool = False) -> tuple[Step, ...]:
        return await self._orders.reload(dry_run=dry_run)

    def monitor(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Event]]:
        return self._hub.listen()

    def statistics(self) -> Mapping[str, int]:
        counts, now = self._hub.counts, self._ledger.snapshot()
        return {
            "attaches": counts[EventKind.PEER_JOINED],
            "detaches": counts[EventKind.PEER_LEFT],
            "refusals": counts[EventKind.GUEST_REFUSED],
            "reloads": counts[EventKind.RELOADED],
            "guests_attached": self._hub.guests_attached,
            "attach_microseconds": int(self._hub.attach_s * 1e6),
            "regions": len(now.regions),
            "guests": sum(bool(guest.requests) for guest in now.guests),
            "holders": len(now.holders),
            "bytes_shared": sum(region.size_bytes for region in now.regions),
            "messages_sent": self._store.messages_sent,
            "events_dropped": self._hub.dropped,
            "doorbell_rings": self._doorbells.rings,
            "doorbells_held_up": self._doorbells.held_up,
            "last_reload_at": int(self._orders.reloaded_at),
            "uptime_seconds": int(trio.current_time() - self._started_at),
            **{f"refusals_{rule}": count for rule, count in sorted(self._hub.refusals.items())},
        }

    async def wait_guest(self, name: str, timeout_s: float) -> Guest:
        with trio.move_on_after(timeout_s):
            while True:
                changed = self._loop.changed
                for guest in self._ledger.guests:
                    if name not in (guest.name, str(guest.domid)):
                        continue
                    if guest.state is GuestState.ATTACHED:
                        return guest
                    if guest.state is GuestState.DOOMED and guest.name in self._passage.failures:
                        raise self._passage.failures[guest.name]
                if name in self._passage.failures:
                    raise self._passage.failures[name]
                named = any(guest.name == name for guest in self._ledger.guests)
                if not named and name.isdecimal() and self._has_nothing(DomId(int(name))):
                    raise NoSuchGuest(f"domain {name} is to have no shared memory", guest=name)
                await changed.wait()
        raise TimedOut(
            f"guest {name} did not get its regions within {timeout_s:g} s",
            hint="`xshmctl list --guests` shows how far it is; the journal of xshmd says why",
            guest=name,
        )

    def _has_nothing(self, domid: DomId) -> bool:
        """Return whether the domain is known to be none of ours: it is not worth waiting for."""
        return self._gate.has_looked_at(domid) and self._ledger.guest_of_domain(domid) is None
