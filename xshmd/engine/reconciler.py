# SPDX-License-Identifier: LGPL-2.1-or-later
"""The single writer: one loop that looks at what is, and does the next step for each thing in it.

Everything that changes the world happens in :meth:`Reconciler.run`'s loop, a piece of work at a
time, so nothing here needs a lock.  Watches are hints: each look asks Xen again.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, TypeVar

import structlog
import trio

from xshmd.api import HeldLease
from xshmd.changes import Change, RemoveRegion, Step
from xshmd.dom0_ports import Clock, ConfigFinder, Processes
from xshmd.engine import identity
from xshmd.engine.access import Access
from xshmd.engine.changes import Changes
from xshmd.engine.copies import Copies
from xshmd.engine.desired import Desired
from xshmd.engine.doorbells import Doorbells
from xshmd.engine.ends import Ends
from xshmd.engine.events import EventHub
from xshmd.engine.gate import Gate
from xshmd.engine.grants import SWEEP_S, Grants
from xshmd.engine.holders import Holders
from xshmd.engine.inspection import Inspection
from xshmd.engine.leases import Leases
from xshmd.engine.ledger import Ledger
from xshmd.engine.leftovers import remove_leftovers
from xshmd.engine.options import Options
from xshmd.engine.passage import Passage
from xshmd.engine.recovery import recover
from xshmd.engine.watches import Watches
from xshmd.engine.windows import Windows
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import (
    ConfigError,
    ConfigUnreadable,
    Conflict,
    DomainGone,
    HypercallFailed,
    NoSuchGuest,
    OutOfMemory,
    Refused,
    StoreLost,
    StoreTrouble,
    TimedOut,
    XshmError,
)
from xshmd.events import Event, EventKind
from xshmd.machine import SHUTDOWN_POWEROFF, DomainInfo, HostInfo
from xshmd.model import Guest, GuestConfig, GuestState, Holder, Process, Prot, Snapshot
from xshmd.policy.changes import ChangePlan
from xshmd.ports import CreationLock, EventChannels, Hypervisor, Keeper, Store
from xshmd.ranges import Part
from xshmd.units import DomId

log = structlog.get_logger()
T = TypeVar("T")
Work = Callable[[], Awaitable[None]]

REFUSALS: Final = (ConfigError, ConfigUnreadable, Refused, Conflict, OutOfMemory)
"""Errors that say no to what somebody wants, rather than that something is not so."""
AGAIN_S: Final = 1.0
"""When to look again after xenstored failed us in the middle of something."""
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
            inspection=inspection, ceiling_s=options.pause_ceiling_s,
        )  # fmt: skip
        self._doorbells = doorbells = Doorbells(
            channels=channels, xen=xen, ledger=ledger, holders=holders
        )
        self._watches = Watches(xen=xen, ledger=ledger, holders=holders, doorbells=doorbells)
        self._gate = gate = Gate(xen, store, ledger, locks)
        self._grants = grants = Grants(
            xen=xen, worker=self._worker, ledger=ledger, holders=holders, hub=hub
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
            windows=windows,
        )  # fmt: skip
        self._ends = Ends(
            store=store, clock=clock, ledger=ledger, holders=holders, gate=gate, grants=grants,
            changes=self._changes, leases=self._leases, hub=hub, options=options,
        )  # fmt: skip
        # Unbounded, yet never long: looks are merged into one, and a client asks one thing at a
        # time.
        self.on_ring: Callable[[str], None] = lambda region_id: None
        """Called with each region in which a guest has rung dom0."""
        self._put, self._get = trio.open_memory_channel[Work](math.inf)
        self._look_due = False
        self._changed = trio.Event()
        self._started_at = 0.0
        self._reloaded_at = 0.0
        self._nursery: trio.Nursery | None = None

    # -- the loop -------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover, then serve for ever."""
        for unreadable in await self._ledger.load():
            log.error("record unreadable", reason=unreadable.one_line())
        await recover(
            self._xen, self._worker, self._holders, self._ledger, self._gate, self._grants,
            self._windows, self._changes, self._clock,
        )  # fmt: skip
        self._started_at = trio.current_time()
        await self._desired.remember()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for holder in self._ledger.holders:
                    self._watch_holder(holder)
                nursery.start_soon(self._doorbells.run, self._on_ring)
                await nursery.start(self._gate.run, self._hint)
                await nursery.start(self._watch, "@introduceDomain", None)
                await nursery.start(self._watch, "@releaseDomain", self._note_shutdowns)
                for guest in self._ledger.guests:
                    if guest.state is GuestState.REBOOTING:
                        waited = self._clock.uptime() - guest.ended_at
                        self._look_in(max(0.0, self._options.reboot_grace_s - waited))
                self._hint()
                task_status.started()
                async for work in self._get:
                    await self._do(work)
        finally:
            self._gate.close()
            self._holders.close()

    async def _do(self, work: Work) -> None:
        try:
            await work()
        except XshmError as error:
            self._put_off(error)
        try:
            self._doorbells.settle()
        except XshmError as error:
            self._put_off(error)
        self._changed.set()
        self._changed = trio.Event()

    def _put_off(self, error: XshmError) -> None:
        # Whatever was begun is in the records, and the next look goes on with it.
        say = log.warning if isinstance(error, StoreTrouble) else log.error
        say("work put off", reason=error.one_line(), **error.facts)
        self._look_in(AGAIN_S)

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Have the loop do something, and return or raise what comes of it."""
        outcome: list[T] = []
        failed: list[XshmError] = []
        done = trio.Event()

        async def work() -> None:
            try:
                outcome.append(await question())
            except XshmError as error:
                failed.append(error)
            finally:
                done.set()

        self._put.send_nowait(work)
        await done.wait()
        if failed:
            raise failed[0]
        if not outcome:
            raise StoreLost("xshmd was stopped in the middle of it", hint="ask again")
        return outcome[0]

    async def _ask_for(self, question: Callable[[], Awaitable[T]]) -> T:
        """Do as :meth:`_ask`, of something that may be refused."""
        try:
            return await self._ask(question)
        except REFUSALS as error:
            self._hub.count_refusal(error)
            raise

    # -- hints ----------------------------------------------------------------------------------

    def _hint(self) -> None:
        if not self._look_due:
            self._look_due = True
            self._put.send_nowait(self._look)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(seconds)
            work()

        if self._nursery is not None:
            self._nursery.start_soon(wait)

    def _look_in(self, seconds: float) -> None:
        self._later(seconds, self._hint)

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
                self._hint()

    async def _note_shutdowns(self) -> None:
        # At once and past the loop, which may be busy: xl destroys a guest that has shut itself
        # down in a moment, and with it what says whether it will come back.
        try:
            self._ends.note_shutdowns(self._domains())
        except XshmError as error:
            log.warning("domains could not be listed", reason=error.one_line())

    def _domains(self) -> dict[int, DomainInfo]:
        return {int(info.domid): info for info in self._xen.domains()}

    async def _on_ring(self, region_id: str) -> None:
        async def look() -> None:
            self._watches.rung(region_id)
            self._doorbells.note_ready(region_id)
            self.on_ring(region_id)

        try:
            await self._ask(look)
        except XshmError as error:
            log.warning("ring not heard", region=region_id, reason=error.one_line())

    # -- the look -------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Compare what the ledger believes with what Xen has, and take every guest a step on."""
        self._look_due = False
        await self._ledger.settle()
        await self._windows.settle()
        await self._changes.settle()
        if not (self._windows.is_settled and self._changes.is_settled):
            self._look_in(AGAIN_S)
        domains = self._domains()
        await self._ends.check_holders(domains)
        self._inspection.inspect()
        for guest in self._ledger.guests:
            try:
                await self._look_at(guest, domains.get(guest.domid))
            except HypercallFailed as error:  # one guest's trouble is not the others'
                log.warning("guest put off", guest=guest.name, reason=error.one_line())
                self._look_in(AGAIN_S)
        if await self._leases.prune():
            self._look_in(PROCESSES_S)
        if await self._grants.sweep():
            self._look_in(SWEEP_S)
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
                if await self._passage.advance(guest) is None:
                    self._hint()
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
        self._look_in(LINGER_POLL_S)

    async def _end(self, guest: Guest) -> None:
        self._passage.forget(guest)
        if guest.state is GuestState.DOOMED:
            await self._sweep(guest)
        wait_s = await self._ends.ended(self._ledger.guest(guest.generation) or guest)
        if wait_s:
            self._look_in(wait_s)
        if guest.state is GuestState.DOOMED:
            for wait in LEFTOVERS_S:
                self._later(wait, lambda: self._put.send_nowait(lambda: self._sweep(guest)))

    async def _sweep(self, guest: Guest) -> None:
        # Twice: xl was still at work on it when it was destroyed, and may have written nodes since.
        info = self._xen.domain_info(guest.domid)
        if info is None or (info.uuid == guest.uuid and info.dying):
            await remove_leftovers(self._store, guest)

    # -- holders and `xl shutdown` --------------------------------------------------------------

    def _watch_holder(self, holder: Holder) -> None:
        assert self._nursery is not None
        self._gate.adopt_holder(holder.domid, holder.uuid)
        self._nursery.start_soon(self._answer_shutdown, holder)

    async def _answer_shutdown(self, holder: Holder) -> None:
        """Play the guest's part in ``xl shutdown``, so that ``xl shutdown -a`` does not wait."""
        path = f"/local/domain/{holder.domid}/control/shutdown"
        while self._ledger.holder(holder.uuid) is not None:
            with contextlib.suppress(XshmError):
                async with self._store.watch(path) as events:
                    async for _ in events:
                        asked = await self._store.read(path)
                        if asked is None:
                            await self._await_death(holder)
                            return
                        if asked:
                            await self._store.write(path, "")
                            # Shows as shut down and goes on holding: its frames are untouched.
                            if identity.is_still(self._xen, holder.domid, holder.uuid):
                                self._xen.shut_down(holder.domid, SHUTDOWN_POWEROFF)
            await trio.sleep(AGAIN_S)

    async def _await_death(self, holder: Holder) -> None:
        """Look out for the end of a holder whose nodes are gone.

        ``xl destroy`` removes a domain's nodes first and destroys it then (libxl_domain.c
        devices_destroy_cb); of one that was never introduced xenstored does not tell the end.
        """
        with trio.move_on_after(LINGER_S):
            while self._ledger.holder(holder.uuid) is not None:
                self._hint()
                await trio.sleep(AGAIN_S)

    # -- what clients ask -----------------------------------------------------------------------

    async def ping(self) -> None:
        """Return once the loop has come round: proof that it is alive, for the watchdog."""
        await self._ask(trio.lowlevel.checkpoint)

    def snapshot(self) -> Snapshot:
        return self._ledger.snapshot()

    async def host(self) -> HostInfo:
        await trio.lowlevel.checkpoint()
        return self._xen.host_info()

    async def declare(self, config: GuestConfig) -> GuestConfig:
        return await self._ask_for(lambda: self._passage.declare(config))

    async def withdraw(self, name: str) -> None:
        self._passage.withdraw(name)
        await trio.lowlevel.checkpoint()

    async def read_region(self, region_id: str, offset_bytes: int, nr_bytes: int) -> bytes:
        return await self._ask(lambda: self._access.read(region_id, offset_bytes, nr_bytes))

    async def write_region(
        self, region_id: str, offset_bytes: int, data: bytes, *, dry_run: bool = False
    ) -> None:
        await self._ask(lambda: self._access.write(region_id, offset_bytes, data, dry_run=dry_run))

    async def copy_parts(
        self, region_id: str, source: Part, target: Part, *, count_at: Part | None = None
    ) -> int:
        return await self._ask(lambda: self._copies.copy(region_id, source, target, count_at))

    async def read_part(self, region_id: str, part: Part) -> bytes:
        return await self._ask(lambda: self._copies.read(region_id, part))

    async def write_part(self, region_id: str, part: Part, data: bytes) -> None:
        await self._ask(lambda: self._copies.write(region_id, part, data))

    async def wake_part(self, region_id: str, part: Part) -> None:
        async def wake() -> None:
            guest = self._ledger.guest(part.generation)
            peer = guest.peer(region_id) if guest is not None else None
            if peer is not None:
                self._doorbells.ring(region_id, peer.peer_id)

        await self._ask(wake)

    @asynccontextmanager
    async def lease(self, region_id: str, prot: Prot, process: Process) -> AsyncIterator[HeldLease]:
        lease_id = secrets.token_hex(8)
        try:
            held = await self._ask_for(
                lambda: self._leases.begin(lease_id, region_id, prot, process)
            )
            self._hint()  # from now on there are looks at whether the process lives
            yield held
        finally:
            # After whatever of the beginning may still be in the queue.
            self._put.send_nowait(lambda: self._leases.end(lease_id))
            self._hint()

    async def trigger(self, region_id: str, offset_bytes: int) -> int:
        async def now() -> int:
            return self._watches.trigger(region_id, offset_bytes)

        return await self._ask(now)

    def watch(
        self, region_id: str, offset_bytes: int, counter_offset_bytes: int | None
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[None]]:
        return self._watches.watch(self._ask, region_id, offset_bytes, counter_offset_bytes)

    async def apply(self, changes: Sequence[Change], *, dry_run: bool = False) -> tuple[Step, ...]:
        wanted_back = {
            one.region_id
            for one in changes
            if isinstance(one, RemoveRegion) and one.force and self._ledger.leases_of(one.region_id)
        }
        if dry_run:
            return await self._ask(lambda: self._apply(tuple(changes), dry_run=True))
        if not wanted_back:
            return await self._ask_for(lambda: self._apply(tuple(changes), dry_run=False))
        planned = await self._ask_for(lambda: self._apply(tuple(changes), dry_run=True))
        await self._leases.wait_free(wanted_back, "removed by an administrator")
        await self._ask_for(lambda: self._apply_rest(changes, wanted_back))
        return planned

    async def _apply_rest(self, changes: Sequence[Change], wanted_back: Container[str]) -> None:
        # A region that had no members but processes has gone with the last of them.
        there = tuple(
            one
            for one in changes
            if not (isinstance(one, RemoveRegion) and one.region_id in wanted_back)
            or self._ledger.region(one.region_id) is not None
        )
        if there:
            await self._apply(there, dry_run=False)

    async def _apply(self, changes: Sequence[Change], *, dry_run: bool) -> tuple[Step, ...]:
        await self._be_settled()
        plan = await self._desired.plan(changes)
        if dry_run:
            self._changes.check_room(plan)
        else:
            self._leases.check_free(plan.removes)
            await self._carry_out(plan, "admin")
        return plan.steps

    async def reload(self, *, dry_run: bool = False) -> tuple[Step, ...]:
        ask = self._ask if dry_run else self._ask_for
        return await ask(lambda: self._reload(dry_run=dry_run))

    async def _reload(self, *, dry_run: bool) -> tuple[Step, ...]:
        await self._be_settled()
        plan, declarations = await self._desired.plan_reload()
        if dry_run:
            self._changes.check_room(plan)
        else:
            await self._carry_out(plan, "reload")
            self._desired.reloaded(declarations)
            self._reloaded_at = self._clock.now()
            steps = f"{len(plan.steps)} step{'' if len(plan.steps) == 1 else 's'}"
            self._hub.emit(Event(kind=EventKind.RELOADED, reason=steps))
        return plan.steps

    async def _be_settled(self) -> None:
        await self._ledger.settle()
        await self._windows.settle()
        await self._changes.settle()
        if self._ledger.intents or not self._windows.is_settled:
            raise Conflict(
                "an earlier set of changes is neither undone nor finished yet",
                hint="the journal of xshmd says why; try again in a moment",
            )

    async def _carry_out(self, plan: ChangePlan, reason: str) -> None:
        try:
            await self._changes.carry_out(plan, reason)
        finally:
            self._hint()  # what is left unused is collected, what was cut off is settled

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
            "last_reload_at": int(self._reloaded_at),
            "uptime_seconds": int(trio.current_time() - self._started_at),
            **{f"refusals_{rule}": count for rule, count in sorted(self._hub.refusals.items())},
        }

    async def wait_guest(self, name: str, timeout_s: float) -> Guest:
        with trio.move_on_after(timeout_s):
            while True:
                changed = self._changed
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
