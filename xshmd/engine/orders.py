# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an administrator orders is done whole or refused, and never on top of what is half done.

So each order first has the earlier ones settled, and is planned in the same piece of work that
carries it out.  Regions that processes of dom0 have mapped are asked back before, outside the loop.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from xshmd.changes import Change, RemoveRegion, Step
from xshmd.dom0_ports import Clock
from xshmd.engine.changes import Changes
from xshmd.engine.desired import Desired
from xshmd.engine.events import EventHub
from xshmd.engine.leases import Leases
from xshmd.engine.ledger import Ledger
from xshmd.engine.loop import Loop
from xshmd.engine.windows import Windows
from xshmd.errors import Conflict
from xshmd.events import Event, EventKind
from xshmd.policy.changes import ChangePlan


class Orders:
    """See the module.  Used by the reconciler alone."""

    def __init__(
        self,
        *,
        loop: Loop,
        clock: Clock,
        ledger: Ledger,
        windows: Windows,
        changes: Changes,
        desired: Desired,
        leases: Leases,
        hub: EventHub,
    ) -> None:
        self._loop, self._clock, self._ledger, self._windows = loop, clock, ledger, windows
        self._changes, self._desired, self._leases, self._hub = changes, desired, leases, hub
        self.reloaded_at = 0.0
        """When files were last read again, in seconds since the epoch; 0: not yet."""

    async def apply(self, changes: Sequence[Change], *, dry_run: bool = False) -> tuple[Step, ...]:
        """Do as :meth:`xshmd.api.RegionsApi.apply`."""
        wanted_back = {
            one.region_id
            for one in changes
            if isinstance(one, RemoveRegion) and one.force and self._ledger.leases_of(one.region_id)
        }
        if dry_run:
            return await self._loop.ask(lambda: self._apply(tuple(changes), dry_run=True))
        if not wanted_back:
            return await self._loop.ask_for(lambda: self._apply(tuple(changes), dry_run=False))
        planned = await self._loop.ask_for(lambda: self._apply(tuple(changes), dry_run=True))
        await self._leases.wait_free(wanted_back, "removed by an administrator")
        await self._loop.ask_for(lambda: self._apply_rest(changes, wanted_back))
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
        """Do as :meth:`xshmd.api.RegionsApi.reload`."""
        ask = self._loop.ask if dry_run else self._loop.ask_for
        return await ask(lambda: self._reload(dry_run=dry_run))

    async def _reload(self, *, dry_run: bool) -> tuple[Step, ...]:
        await self._be_settled()
        plan, declarations = await self._desired.plan_reload()
        if dry_run:
            self._changes.check_room(plan)
        else:
            await self._carry_out(plan, "reload")
            self._desired.reloaded(declarations)
            self.reloaded_at = self._clock.now()
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
            self._loop.hint()  # what is left unused is collected, what was cut off is settled
