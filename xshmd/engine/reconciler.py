# SPDX-License-Identifier: LGPL-2.1-or-later
"""The single writer: takes guests through the gate, follows their ends, frees what nobody has.

Everything that changes the world happens in :meth:`Reconciler.run`'s one loop, a piece of work at a
time, so nothing here needs a lock.  Watches are hints: each piece of work looks at Xen again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog
import trio

from xshmd.engine import records
from xshmd.engine.attach import attach, mappings
from xshmd.engine.gate import Gate
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.engine.leftovers import remove_leftovers
from xshmd.engine.recovery import recover
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import Conflict, DomainGone, StoreLost, TimedOut, XshmError
from xshmd.model import (
    SHUTDOWN_CRASH,
    SHUTDOWN_POWEROFF,
    SHUTDOWN_REBOOT,
    SHUTDOWN_WATCHDOG,
    Guest,
    GuestConfig,
    GuestState,
    Holder,
    HostInfo,
    Lifetime,
)
from xshmd.policy.plan import GuestPlan, plan_guest
from xshmd.ports import Clock, ConfigFinder, CreationLock, Hypervisor, Snapshot, Store
from xshmd.units import human_size

log = structlog.get_logger()
T = TypeVar("T")

REBOOT_GRACE_S: Final = 30.0
FREE_MEMORY_FLOOR_BYTES: Final = 16 << 20
COMES_BACK: Final = frozenset({SHUTDOWN_REBOOT, SHUTDOWN_CRASH, SHUTDOWN_WATCHDOG})
"""Ways a guest ends itself after which xl, as it is usually told to, makes it anew."""
INBOX: Final = 64
DECLARED_S: Final = 600.0
"""How long a declared configuration waits for its domain."""
LEFTOVERS_S: Final = 3.0
"""When to look again for nodes that xl wrote for a domain after we had destroyed it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an admin may choose."""

    reboot_grace_s: float = REBOOT_GRACE_S
    """How long the regions of a guest that rebooted or crashed wait for it to come back."""
    free_memory_floor_bytes: int = FREE_MEMORY_FLOOR_BYTES
    """How much of the host's memory regions never take."""
    destroy_on_failure: bool = True
    """Destroy a guest whose regions cannot be given; otherwise it stays paused for an admin."""


class Reconciler:
    """The engine.  Implements :class:`~xshmd.ports.RegionsApi`."""

    def __init__(
        self,
        *,
        xen: Hypervisor,
        store: Store,
        finder: ConfigFinder,
        locks: CreationLock,
        clock: Clock,
        options: Options,
    ) -> None:
        self._xen, self._store, self._finder, self._clock = xen, store, finder, clock
        self._options = options
        self._worker = XenWorker()
        self._ledger = Ledger(store)
        self._holders = Holders(
            xen, self._worker, store, self._ledger, floor_bytes=options.free_memory_floor_bytes
        )
        self._gate = Gate(xen, store, self._ledger, locks)
        self._put, self._get = trio.open_memory_channel[Callable[[], Awaitable[None]]](INBOX)
        self._rescan_due = False
        self._changed = trio.Event()
        self._declared: dict[str, tuple[GuestConfig, float]] = {}
        self._failures: dict[str, XshmError] = {}
        self._reasons: dict[str, int] = {}
        self._again: set[str] = set()
        self._nursery: trio.Nursery | None = None

    # -- the loop -------------------------------------------------------------------------------

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Recover, then serve for ever."""
        for unreadable in await self._ledger.load():
            log.error("record unreadable", reason=unreadable.one_line())
        self._again |= await recover(
            self._xen, self._worker, self._holders, self._ledger, self._gate, self._clock
        )
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for holder in self._ledger.holders:
                    nursery.start_soon(self._answer_shutdown, holder)
                await nursery.start(self._gate.run, self._on_held, self._hint)
                await nursery.start(self._watch_hints, "@introduceDomain")
                await nursery.start(self._watch_hints, "@releaseDomain")
                for guest in self._ledger.guests:
                    if guest.state in (GuestState.HELD, GuestState.ATTACHING):
                        await self._on_held(guest, False)
                await self._hint()
                task_status.started()
                async for work in self._get:
                    await self._do(work)
        finally:
            self._gate.close()
            self._holders.close()

    async def _do(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except StoreLost as lost:
            # Whatever was begun is in the records; the watches fire again once xenstored is back,
            # and that looks at everything anew.
            log.warning("xenstored was lost, work put off", reason=lost.one_line())
        except XshmError as error:
            log.error("work failed", reason=error.one_line(), **error.facts)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def ping(self) -> None:
        """Return once the loop has come round: proof that it is alive, for the watchdog."""
        await self._ask(self._nothing)

    async def _nothing(self) -> None:
        pass

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

        await self._put.send(work)
        await done.wait()
        if failed:
            raise failed[0]
        if not outcome:
            raise StoreLost("xshmd was stopped in the middle of it", hint="ask again")
        return outcome[0]

    # -- hints from outside ---------------------------------------------------------------------

    async def _watch_hints(
        self, path: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with self._store.watch(path) as events:
            task_status.started()
            async for _ in events:
                await self._hint()

    async def _hint(self) -> None:
        if not self._rescan_due:
            self._rescan_due = True
            await self._put.send(self._rescan)

    async def _on_held(self, guest: Guest, had_run: bool) -> None:
        async def work() -> None:
            await self._prepare(guest, had_run=had_run)

        await self._put.send(work)

    async def _later(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        await trio.sleep(seconds)
        await self._put.send(work)

    def _schedule(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._later, seconds, work)

    # -- a guest's way through the gate ---------------------------------------------------------

    async def _prepare(self, guest: Guest, *, had_run: bool) -> None:
        """Find out what a held guest is to have, and make it, while xl is still building it."""
        if self._ledger.guest(guest.generation) is None:
            return
        try:
            if guest.state is GuestState.HELD:
                name = await self._store.read(f"/local/domain/{guest.domid}/name") or ""
                guest = dataclasses.replace(guest, name=name)
            config = await self._config_of(guest)
            if config is None or not config.requests:
                await self._let_go(guest)
                return
            if had_run:
                raise Conflict(
                    f"guest {guest.name} ran before xshmd could stop it, without its regions",
                    hint="start it with `xshmctl create`, which is never too late",
                    domid=guest.domid,
                )
            plan = await self._plan(config)
            guest = await self._make(guest, plan)
        except DomainGone:
            await self._ended(guest)
        except StoreLost:
            raise
        except XshmError as error:
            await self._doom(guest, error)
        else:
            await self._attach_if_built(guest)

    async def _config_of(self, guest: Guest) -> GuestConfig | None:
        if guest.state is GuestState.ATTACHING:  # begun in an earlier life of ours
            return GuestConfig(name=guest.name, uuid=guest.uuid, requests=guest.requests)
        declared = self._declared.pop(guest.name, None)
        if declared is not None and declared[1] > self._clock.now():
            return declared[0]
        for earlier in self._ledger.guests:
            # xl makes a rebooted guest from the configuration it read when it first made it, under
            # the same UUID; whatever its file says by now does not count.
            if earlier.state is GuestState.REBOOTING and earlier.uuid == guest.uuid:
                return GuestConfig(name=guest.name, uuid=guest.uuid, requests=earlier.requests)
        return await trio.to_thread.run_sync(
            lambda: self._finder.find(name=guest.name, uuid=guest.uuid)
        )

    async def _plan(self, config: GuestConfig) -> GuestPlan:
        host = await self._worker.run(self._xen.host_info)
        known = await trio.to_thread.run_sync(self._finder.known)
        return plan_guest(config, host=host, snapshot=self._ledger.snapshot(), known=known)

    async def _make(self, guest: Guest, plan: GuestPlan) -> Guest:
        # A guest that was begun has its target, or may have: no other holder will do.
        uuid = guest.holder_uuid or plan.holder_uuid
        holder = self._ledger.holder(uuid) if uuid else None
        if holder is None and guest.holder_uuid:
            raise Conflict(f"the holder of guest {guest.name} is gone", hint="start the guest again")
        if holder is None:
            holder = await self._holders.create()
            assert self._nursery is not None
            self._nursery.start_soon(self._answer_shutdown, holder)
        # From here on the guest's record keeps holder and regions from being collected.
        guest = await self._ledger.put_guest(
            dataclasses.replace(
                guest,
                state=GuestState.ATTACHING,
                holder_uuid=holder.uuid,
                requests=plan.requests,
            ),
            also=[(records.mark_path(guest.domid), guest.generation)],
        )
        for new in plan.new_regions:
            holder = self._ledger.holder(holder.uuid) or holder
            await self._holders.add_region(
                holder, new.region_id, new.nr_frames, owner=new.owner, lifetime=new.lifetime
            )
            log.info(
                "region created",
                region=new.region_id,
                size_bytes=new.nr_frames << 12,
                holder=holder.uuid,
                guest=guest.name,
            )
        return guest

    async def _attach_if_built(self, guest: Guest) -> None:
        """Map, once the toolstack has made the guest's memory: not earlier, never later."""
        try:
            if not await self._store.is_introduced(guest.domid):
                return
            started = trio.current_time()
            holder = self._ledger.holder(guest.holder_uuid)
            if holder is None:
                raise Conflict(
                    f"the holder of guest {guest.name} is gone", hint="start the guest again"
                )
            await self._holders.verify(holder)
            regions = {region.region_id: region for region in self._ledger.regions}
            again = guest.generation in self._again
            self._again.add(guest.generation)
            await self._worker.run(
                lambda: attach(
                    self._xen, guest, holder, mappings(guest.requests, regions), again=again
                )
            )
            await self._store.write_many(records.published(guest))
            await self._gate.unpause(guest)
            attached = await self._ledger.put_guest(
                dataclasses.replace(guest, state=GuestState.ATTACHED)
            )
        except DomainGone:
            await self._ended(guest)
            return
        except StoreLost:
            raise
        except XshmError as error:
            await self._doom(guest, error)
            return
        self._again.discard(guest.generation)
        for earlier in self._ledger.guests:
            if earlier.state is GuestState.REBOOTING and earlier.name == guest.name:
                await self._ledger.drop_guest(earlier.generation)
        self._failures.pop(guest.name, None)
        self._gate.unlock(attached)
        log.info(
            "guest attached",
            guest=guest.name,
            domid=guest.domid,
            regions=[request.region_id for request in guest.requests],
            size=human_size(sum(request.size_bytes for request in guest.requests)),
            seconds=round(trio.current_time() - started, 4),
        )

    async def _let_go(self, guest: Guest) -> None:
        with contextlib.suppress(DomainGone):
            await self._gate.unpause(guest)
        await self._ledger.drop_guest(guest.generation)
        self._gate.unlock(guest)

    async def _doom(self, guest: Guest, error: XshmError) -> None:
        """The guest cannot have its regions, so it must not run."""
        log.error("guest refused", guest=guest.name, domid=guest.domid, reason=error.one_line())
        for note in getattr(error, "__notes__", ()):
            log.error("also", guest=guest.name, reason=note)
        self._failures[guest.name] = error
        while len(self._failures) > INBOX:
            self._failures.pop(next(iter(self._failures)))
        guest = await self._ledger.put_guest(
            dataclasses.replace(guest, state=GuestState.DOOMED, failure=error.one_line())
        )
        if not self._options.destroy_on_failure:
            self._gate.unlock(guest)
            return
        with contextlib.suppress(DomainGone):
            await self._worker.run(self._xen.destroy, guest.domid)
        await remove_leftovers(self._store, guest)
        await self._ended(guest)

        async def look_again() -> None:
            # xl was still at work on it and may have written device nodes since.
            if await self._worker.run(self._xen.domain_info, guest.domid) is None:
                await remove_leftovers(self._store, guest)

        self._schedule(LEFTOVERS_S, look_again)

    # -- ends -----------------------------------------------------------------------------------

    async def _rescan(self) -> None:
        """Compare what the ledger believes with what Xen has."""
        self._rescan_due = False
        domains = {info.domid: info for info in await self._worker.run(self._xen.domains)}
        for guest in self._ledger.guests:
            if guest.state is GuestState.REBOOTING:
                continue
            info = domains.get(guest.domid)
            if info is None or info.uuid != guest.uuid or info.dying:
                await self._ended(guest)
            elif guest.state is GuestState.ATTACHING:
                await self._attach_if_built(guest)
            elif info.shut_down:
                self._reasons[guest.generation] = info.shutdown_reason
        for holder in self._ledger.holders:
            info = domains.get(holder.domid)
            if info is None or info.uuid != holder.uuid or info.dying:
                await self._holder_lost(holder)
        await self._collect()

    async def _ended(self, guest: Guest) -> None:
        self._gate.unlock(guest)
        self._gate.forget(guest.domid)
        self._again.discard(guest.generation)
        reason = self._reasons.pop(guest.generation, SHUTDOWN_POWEROFF)
        if guest.state is GuestState.ATTACHED and reason in COMES_BACK:
            await self._ledger.put_guest(
                dataclasses.replace(
                    guest, state=GuestState.REBOOTING, ended_at=self._clock.now()
                )
            )
            self._schedule(self._options.reboot_grace_s, self._collect)
            log.info("guest awaited", guest=guest.name, domid=guest.domid)
        else:
            await self._ledger.drop_guest(guest.generation)
            if guest.requests:
                log.info("guest ended", guest=guest.name, domid=guest.domid)
        await self._collect()

    async def _collect(self) -> None:
        """Free every region and holder that nobody has or awaits."""
        now = self._clock.now()
        for guest in self._ledger.guests:
            if (
                guest.state is GuestState.REBOOTING
                and now - guest.ended_at >= self._options.reboot_grace_s
            ):
                await self._ledger.drop_guest(guest.generation)
                log.info("guest no longer awaited", guest=guest.name)
        unused = [
            region
            for region in self._ledger.regions
            if region.lifetime is Lifetime.MEMBERS and not self._ledger.members(region.region_id)
        ]
        for holder in self._ledger.holders:
            theirs = [r for r in self._ledger.regions if r.holder_uuid == holder.uuid]
            targeted = any(guest.holder_uuid == holder.uuid for guest in self._ledger.guests)
            if not targeted and all(region in unused for region in theirs):
                # All of it at once, and Xen does the wiping.
                for region in theirs:
                    await self._ledger.put_region(dataclasses.replace(region, ready=False))
                await self._holders.destroy(holder)
                for region in theirs:
                    await self._ledger.drop_region(region.region_id)
                    log.info("region freed", region=region.region_id, size_bytes=region.size_bytes)
            else:
                for region in theirs:
                    if region in unused:
                        await self._holders.free_region(region)

    async def _holder_lost(self, holder: Holder) -> None:
        self._holders.forget(holder)
        lost = [r.region_id for r in self._ledger.regions if r.holder_uuid == holder.uuid]
        log.error(
            "holder destroyed by somebody else",
            holder=holder.uuid,
            domid=holder.domid,
            regions=lost,
            reason="running guests keep their memory, and nobody can join them any more",
        )
        for region_id in lost:
            await self._ledger.drop_region(region_id)
        await self._ledger.drop_holder(holder.uuid)

    async def _answer_shutdown(self, holder: Holder) -> None:
        """Play the guest's part in ``xl shutdown``, so that ``xl shutdown -a`` does not wait for it."""
        path = f"/local/domain/{holder.domid}/control/shutdown"
        with contextlib.suppress(StoreLost):
            async with self._store.watch(path) as events:
                async for _ in events:
                    asked = await self._store.read(path)
                    if self._ledger.holder(holder.uuid) is None or asked is None:
                        return
                    if asked:
                        await self._store.write(path, "")
                        with contextlib.suppress(XshmError):
                            # Shows as shut down and goes on holding: frames and maps are untouched.
                            await self._worker.run(
                                self._xen.shut_down, holder.domid, SHUTDOWN_POWEROFF
                            )

    # -- what clients ask -----------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return self._ledger.snapshot()

    async def host(self) -> HostInfo:
        return await self._worker.run(self._xen.host_info)

    async def declare(self, config: GuestConfig) -> None:
        async def work() -> None:
            if config.requests:
                await self._plan(config)
            self._failures.pop(config.name, None)
            self._declared[config.name] = (config, self._clock.now() + DECLARED_S)

        await self._ask(work)

    async def withdraw(self, name: str) -> None:
        self._declared.pop(name, None)
        await trio.lowlevel.checkpoint()

    async def wait_guest(self, name: str, timeout_s: float) -> Guest:
        with trio.move_on_after(timeout_s if timeout_s >= 0 else math.inf):
            while True:
                changed = self._changed
                for guest in self._ledger.guests:
                    if guest.name == name and guest.state is GuestState.ATTACHED:
                        return guest
                if name in self._failures:
                    raise self._failures[name]
                await changed.wait()
        raise TimedOut(
            f"guest {name} did not get its regions within {timeout_s:g} s",
            hint="`xshmctl list --guests` shows how far it is; the journal of xshmd says why",
            guest=name,
        )
