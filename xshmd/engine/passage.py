# SPDX-License-Identifier: LGPL-2.1-or-later
"""One guest's way through the gate: what it is to have, made and mapped, or its end.

Every step is written down before it is taken and may be taken again: a step cut off by a lost
xenstored is repeated by the next look, one cut off by our own end by the next start.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Final

import structlog
import trio

from xshmd.dom0_ports import Clock, ConfigFinder
from xshmd.engine import identity, records
from xshmd.engine.attach import attach, check, mappings
from xshmd.engine.discovery import reserve_in_memory_map
from xshmd.engine.doorbells import Doorbells
from xshmd.engine.events import EventHub
from xshmd.engine.gate import Gate
from xshmd.engine.grants import Grants
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.engine.options import Options
from xshmd.engine.window_plan import Join
from xshmd.engine.windows import Windows
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import Conflict, DomainGone, StoreTrouble, XshmError
from xshmd.model import Guest, GuestConfig, GuestState
from xshmd.policy.plan import GuestPlan, plan_guest
from xshmd.ports import Hypervisor, Store
from xshmd.units import DomId, human_size

log = structlog.get_logger()

GUEST_CREATED: Final = "guest created"
DECLARED_S = 600.0
"""How long, in seconds, a declared configuration waits for its domain."""
FAILURES_KEPT = 256


def _as_recorded(guest: Guest, earlier: Guest) -> GuestConfig:
    # Where its regions are was found right when it was first made.
    return GuestConfig(
        name=guest.name, uuid=guest.uuid, reserve=earlier.reserve, extended_regions=False,
        requests=earlier.requests,
    )  # fmt: skip


class Passage:
    """Takes held guests to ATTACHED, or lets them go, or dooms them.

    Used by the reconciler alone.
    """

    def __init__(
        self,
        *,
        xen: Hypervisor,
        worker: XenWorker,
        store: Store,
        finder: ConfigFinder,
        clock: Clock,
        ledger: Ledger,
        holders: Holders,
        grants: Grants,
        windows: Windows,
        gate: Gate,
        hub: EventHub,
        doorbells: Doorbells,
        options: Options,
    ) -> None:
        self._grants, self._windows, self._hub = grants, windows, hub
        self._doorbells = doorbells
        self._xen, self._worker, self._store = xen, worker, store
        self._finder, self._clock = finder, clock
        self._ledger, self._holders, self._gate = ledger, holders, gate
        self._options = options
        self._declared: dict[str, tuple[GuestConfig, float]] = {}
        self.failures: dict[str, XshmError] = {}
        """Why a guest of this name was last refused; until one of that name comes again."""
        self.doomed_at: dict[str, float] = {}
        """When the destruction of a guest was begun, in trio's time."""
        self._prepared: set[str] = set()
        self._released: set[str] = set()

    def forget(self, guest: Guest) -> None:
        """Drop what is remembered of a guest that is through or gone."""
        for memory in (self._prepared, self._released):
            memory.discard(guest.generation)
        self.doomed_at.pop(guest.generation, None)

    # -- what it is to have ---------------------------------------------------------------------

    async def declare(self, config: GuestConfig) -> GuestConfig:
        """Use this configuration for the next domain of its name, if it can be given."""
        config = await trio.to_thread.run_sync(self._finder.complete, config)
        if config.requests:
            self._check_memory(await self._plan(config))
        self.failures.pop(config.name, None)
        self._declared[config.name] = (config, self._clock.uptime() + DECLARED_S)
        return config

    def withdraw(self, name: str) -> None:
        """Forget a declaration."""
        self._declared.pop(name, None)

    async def _config_of(self, guest: Guest) -> GuestConfig | None:
        if guest.state is not GuestState.HELD:  # begun before we, or xenstored, went away
            return _as_recorded(guest, guest)
        declared, until = self._declared.get(guest.name, (None, 0.0))
        if declared is not None and until > self._clock.uptime():
            return declared
        for earlier in self._ledger.guests:
            # xl makes a rebooted guest from the configuration it read when it first made it, under
            # the same UUID; whatever its file says by now does not count.
            if earlier.state is GuestState.REBOOTING and earlier.uuid == guest.uuid:
                return _as_recorded(guest, earlier)
        return await trio.to_thread.run_sync(
            lambda: self._finder.find(name=guest.name, uuid=guest.uuid)
        )

    async def _plan(self, config: GuestConfig, domid: DomId | None = None) -> GuestPlan:
        host = self._xen.host_info()
        info = None if domid is None else self._xen.domain_info(domid)
        known, defined, policy = await trio.to_thread.run_sync(
            lambda: (self._finder.known(), self._finder.regions(), self._finder.policy())
        )
        return plan_guest(
            config,
            host=host,
            snapshot=self._ledger.snapshot(),
            known=known,
            defined=defined,
            gpaddr_bits=info.gpaddr_bits if info else 0,
            policy=policy,
        )

    # -- the steps ------------------------------------------------------------------------------

    async def advance(self, guest: Guest) -> Guest | None:
        """Take a guest that is not ATTACHED yet as far as it can go now.

        Returns:
            The guest as it is now; None if it is through with us: let go, doomed or gone.

        Raises:
            StoreTrouble: xenstored failed us in the middle; call again.
        """
        try:
            if guest.generation not in self._prepared:
                prepared = await self._prepare(guest)
                if prepared is None:
                    return None
                guest = prepared
                self._prepared.add(guest.generation)
            return await self._attach_if_built(guest)
        except StoreTrouble:
            raise
        except XshmError as error:
            if isinstance(error, DomainGone):
                info = self._xen.domain_info(guest.domid)
                if info is None or info.uuid != guest.uuid:
                    raise
                # It lives, so what is gone is its holder.
                error = Conflict(
                    f"the holder of guest {guest.name} went away while it was made: "
                    f"{error.message}",
                    hint="start the guest again",
                )
            await self._refuse(self._ledger.guest(guest.generation) or guest, error)
            return None

    async def _prepare(self, guest: Guest) -> Guest | None:
        """Find out what a held guest is to have, and make it, while xl is still building it."""
        if guest.state is GuestState.HELD:
            self.failures.pop(guest.name, None)
        for region in self._ledger.regions:
            if not region.ready:
                # Between two pieces of work nothing is half made: a lost xenstored left it so.
                await self._holders.free_region(region, reason="its making was cut off")
        config = await self._config_of(guest)
        if config is None or not config.requests:
            await self._let_go(guest)
            return None
        if guest.generation in self._gate.had_run:
            raise Conflict(
                f"guest {guest.name} ran before xshmd could stop it, without its regions",
                hint="start it with `xshmctl create`, which is never too late",
                domid=guest.domid,
            )
        plan = await self._plan(config, guest.domid)
        return await self._make(guest, plan, reserve=config.reserve)

    async def _make(self, guest: Guest, plan: GuestPlan, *, reserve: bool) -> Guest:
        records.check_fits(dataclasses.replace(guest, requests=plan.requests))
        # A guest that was begun has its target, or may have: no other holder will do.
        uuid = guest.holder_uuid or plan.holder_uuid
        self._check_memory(plan)
        holder = self._ledger.holder(uuid) if uuid else None
        if holder is None and uuid:
            # Others run with pages of it: a new one would give this guest other memory than theirs.
            raise Conflict(
                f"the holder of what guest {guest.name} wants was destroyed by somebody else",
                hint="end all guests of the region, then start them again",
                guest=guest.name,
            )
        if holder is None and plan.needs_holder:
            holder = await self._holders.create()
        # From here on what is known of the guest keeps holder and regions from being collected.
        # Nothing of the guest is touched yet, so its record may go on saying HELD: after a crash
        # all of this is planned anew.  One whose maps may be half done stays marked as such.
        guest = self._ledger.know(
            dataclasses.replace(
                guest,
                state=GuestState.ATTACHING if guest.state is GuestState.HELD else guest.state,
                holder_uuid=holder.uuid if holder else "",
                requests=plan.requests,
                reserve=reserve,
            )
        )
        for region_id in plan.movable:
            region = self._ledger.region(region_id)
            if region is not None and region.holder_uuid != guest.holder_uuid:
                await self._holders.move_region(region, guest.holder_uuid, reason=GUEST_CREATED)
        for new in plan.new_regions:
            came = new.owner == guest.name
            if new.is_granted:
                await self._grants.add_region(new, reason=GUEST_CREATED, owner_came=came)
            else:
                await self._holders.add_region(
                    guest.holder_uuid, new, reason=GUEST_CREATED, owner_came=came
                )
        return guest

    def _check_memory(self, plan: GuestPlan) -> None:
        """Refuse before anything is made what the host has not the memory for."""
        places = {request.region_id: request.place for request in plan.requests}
        for new in plan.new_regions:
            self._grants.check_room(new)
            self._holders.check_memory(
                f"{places[new.region_id]}: region {new.region_id}", new.nr_needed_frames
            )

    async def _attach_if_built(self, guest: Guest) -> Guest:
        """Map, once the toolstack has made the guest's memory: not earlier, never later."""
        started = trio.current_time()
        if guest.generation not in self._released:
            if not await self._store.is_introduced(guest.domid):
                return guest
            guest = await self._map(guest)
            self._released.add(guest.generation)
            self._gate.unpause(guest)
        attached = await self._ledger.put_guest(
            dataclasses.replace(guest, state=GuestState.ATTACHED)
        )
        self._declared.pop(guest.name, None)
        self._gate.unlock(attached)
        self.forget(attached)
        seconds = trio.current_time() - started
        self._hub.attached(seconds)
        log.info(
            "guest attached",
            guest=guest.name,
            domid=guest.domid,
            regions=[request.region_id for request in guest.requests],
            size=human_size(sum(request.size_bytes for request in guest.requests)),
            seconds=round(seconds, 4),
        )
        return attached

    async def _map(self, guest: Guest) -> Guest:
        wanted = mappings(
            dataclasses.replace(guest, requests=self._grants.mapped_for(guest.requests)),
            {region.region_id: region for region in self._ledger.regions},
        )
        if wanted:
            self._holders.verify(self._holders.having(guest.holder_uuid))
        again = guest.state is GuestState.MAPPING
        if not again:
            if wanted:
                check(self._xen, guest, wanted)
            guest = await self._grants.allot(guest, guest.requests)
            records.check_fits(guest)
            guest = dataclasses.replace(guest, state=GuestState.MAPPING)
            if guest.reserve:
                guest = await self._worker.run(reserve_in_memory_map, self._xen, guest)
            guest = self._doorbells.ports.plan(guest)
        # Again too: the record may have been written, and not what follows it.
        guest = await self._ledger.put_guest(
            guest, also=records.published(guest, self._ledger.snapshot())
        )
        sealed = [mapping for mapping in wanted if mapping.is_sealed]
        if plain := [mapping for mapping in wanted if not mapping.is_sealed]:
            holder = self._holders.having(guest.holder_uuid)
            await self._worker.run(lambda: attach(self._xen, guest, holder, plain, again=again))
        if sealed:
            await self._windows.renew(
                guest.holder_uuid,
                (mapping.request.region_id for mapping in sealed),
                reason=GUEST_CREATED,
                join=Join(guest=guest, wanted=sealed, again=again),
            )
        await self._grants.give(guest, guest.requests)
        provided = self._doorbells.ports.provide(guest)
        if provided != guest:
            guest = await self._ledger.put_guest(
                provided, also=records.published(provided, self._ledger.snapshot())
            )
        self._doorbells.welcome(guest)
        self._hub.joined(guest, guest.requests, GUEST_CREATED)
        return guest

    async def _let_go(self, guest: Guest) -> None:
        if guest.generation not in self._released:
            self._released.add(guest.generation)
            self._gate.unpause(guest)
        await self._ledger.drop_guest(guest.generation)
        self._gate.unlock(guest)
        self.forget(guest)

    # -- refusal --------------------------------------------------------------------------------

    async def _refuse(self, guest: Guest, error: XshmError) -> None:
        """The guest cannot have its regions, so it must not run."""
        self._hub.refused(guest, error)
        self.failures[guest.name] = error
        while len(self.failures) > FAILURES_KEPT:
            self.failures.pop(next(iter(self.failures)))
        self._declared.pop(guest.name, None)
        doomed = await self._ledger.put_guest(
            dataclasses.replace(
                guest, state=GuestState.DOOMED, failure=_shortened(error.one_line())
            )
        )
        await self.finish_doom(doomed)

    async def finish_doom(self, guest: Guest) -> None:
        """Destroy a DOOMED guest, unless an admin wants to look at it; then it stays paused.

        The creation lock stays ours until Xen has forgotten the domain: while somebody still maps
        a page of it (xenconsoled, mostly), libxl takes what is left for a domain, and succeeds.
        """
        if not self._options.destroy_on_failure:
            self._gate.unlock(guest)
            return
        self.doomed_at.setdefault(guest.generation, trio.current_time())
        with contextlib.suppress(DomainGone):
            await self._worker.run(identity.destroy, self._xen, guest)


def _shortened(text: str) -> str:
    """Cut what a record has no room for; the journal and whoever waits have all of it."""
    limit = records.FAILURE_MAX
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
