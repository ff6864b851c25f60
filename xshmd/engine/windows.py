# SPDX-License-Identifier: LGPL-2.1-or-later
"""Windows: moments in which sealed regions get fresh pages while nobody runs who could take them.

A guest can map whatever is in its target's p2m, and Xen has no call that puts a page back into one.
So a sealed holder's p2m is empty, and each change of who has a region is a window: every guest with
that target stands still, the region is populated anew and filled from the old pages, through the
mappings of the keeper; the members get the new ones; they are taken out of the holder; the guests
run on; the old ones are wiped.  A bounded pause is why it is given up before any member is touched,
if it takes too long.  Used by the reconciler alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Final

import structlog
import trio

from xshmd.dom0_ports import ConfigFinder
from xshmd.engine import attach as maps
from xshmd.engine.events import EventHub
from xshmd.engine.fresh_pages import FreshPages
from xshmd.engine.holders import Holders, enlarge_paging_pool
from xshmd.engine.inspection import Inspection
from xshmd.engine.ledger import Ledger
from xshmd.engine.standstill import Standstill
from xshmd.engine.window_plan import Join, members, new_window, nr_moved, placed
from xshmd.engine.window_records import Phase, Window
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import Conflict, DomainGone, StoreTrouble, XshmError
from xshmd.events import Event, EventKind
from xshmd.host_policy import Limit
from xshmd.model import Guest, GuestState, Holder, Region
from xshmd.policy.sealing import Pace, check_alike, check_pause, count_of
from xshmd.ports import Hypervisor, Keeper
from xshmd.units import Gfn, bytes_of

log = structlog.get_logger()

PIECE_FRAMES: Final = 4096
"""Frames made and filled between two looks at the clock."""
ATTEMPTS: Final = 3
"""How often a window is opened if somebody keeps starting the guests that stand still in it."""


class Windows:
    """See the module."""

    def __init__(
        self,
        *,
        xen: Hypervisor,
        keeper: Keeper,
        worker: XenWorker,
        ledger: Ledger,
        holders: Holders,
        hub: EventHub,
        inspection: Inspection,
        finder: ConfigFinder,
    ) -> None:
        self._xen, self._keeper, self._worker = xen, keeper, worker
        self._ledger, self._holders, self._hub = ledger, holders, hub
        self._inspection, self._finder = inspection, finder
        self._pace = Pace()
        self._still = Standstill(xen, ledger)
        self._fresh = FreshPages(xen, keeper, holders)

    @property
    def is_settled(self) -> bool:
        """Whether no window is open, and no pause owed to anybody."""
        return not self._ledger.windows and not self._still.owed.is_any

    async def renew(
        self, holder_uuid: str, region_ids: Iterable[str], *, reason: str, join: Join | None = None
    ) -> None:
        """Put regions of a holder on fresh pages, with what is in them, for all that have them.

        Args:
            holder_uuid: The holder.
            region_ids: Its regions.
            reason: Why, for the event of it.
            join: Who gets them for the first time.

        Raises:
            StoreTrouble: xenstored failed us in the middle; :meth:`settle` goes on from there.
            Refused: the pause would be too long; nothing is done.
            XshmError: why it cannot be.  Nothing is done, but where :attr:`is_settled` is false:
                then the guests stand still until :meth:`settle` has been able to go on.
        """
        wanted = tuple(dict.fromkeys(region_ids))
        for _ in range(ATTEMPTS):
            ran = await self._once(holder_uuid, wanted, reason, join)
            if not ran:
                return
            if join is not None:
                join = dataclasses.replace(join, again=True)
        raise Conflict(
            f"{' and '.join(ran)} ran while {', '.join(wanted)} had fresh pages: somebody unpauses"
            " the guests of a sealed group",
            hint="do not `xl unpause` a guest that xshmd has paused",
        )

    async def _once(
        self, holder_uuid: str, region_ids: Sequence[str], reason: str, join: Join | None
    ) -> list[str]:
        """Open and close a window; return who ran meanwhile, which nobody may."""
        holder = self._ledger.holder(holder_uuid)
        if holder is None:
            raise Conflict("the holder is gone", hint="start the guest again", holder=holder_uuid)
        self._holders.verify(holder)
        regions = await self._regions(holder, region_ids)
        ceiling = await self._ceiling()
        window = await self._begin(holder, regions, reason, join, ceiling)
        try:
            self._still.begin(window, holder)
            await self._prepare(window, holder, ceiling)
            if join is not None:
                await self._give(window, holder, join)
        except StoreTrouble:
            raise
        except XshmError:
            await self._roll_back(window, holder)
            raise
        window = await self._step(window, Phase.SWAPPING)
        await self._swap(window, holder)
        return await self._close(await self._step(window, Phase.SEALING), holder)

    # -- before anything is done ----------------------------------------------------------------

    async def _ceiling(self) -> Limit | None:
        """Return for how long a group may stand still, if the administrator says so."""
        policy = await trio.to_thread.run_sync(self._finder.policy)
        # While it is wrong nobody gets anything new, and what is taken away has to be.
        return None if isinstance(policy, XshmError) else policy.limits.pause

    async def _regions(self, holder: Holder, region_ids: Iterable[str]) -> list[Region]:
        """Return the regions; Conflict if they cannot be put on fresh pages."""
        if not self._ledger.is_whole:
            raise Conflict(
                "some records of xshmd cannot be read, so there may be guests of a sealed group"
                " that nobody would pause",
                hint="the log of xshmd's start names the records",
            )
        if any(window.holder_uuid == holder.uuid for window in self._ledger.windows):
            raise Conflict(
                f"the guests of holder {holder.uuid} stand still already, for a change that is not"
                " finished",
                hint="the log of xshmd says why; try again in a moment",
            )
        theirs = [one for one in self._ledger.regions if one.holder_uuid == holder.uuid]
        check_alike((one.region_id, one.terms) for one in theirs)
        kept = await self._worker.run(self._keeper.kept)
        found = []
        for region_id in region_ids:
            region = next((one for one in theirs if one.region_id == region_id), None)
            if region is None:
                raise Conflict(f"region {region_id} went away", hint="try again")
            if region.kept and kept.get(region.kept) != region.nr_frames:
                region = await self._forget_contents(region)
            found.append(region)
        return found

    async def _forget_contents(self, region: Region) -> Region:
        """The keeper was ended, and dom0's only way to a region's pages with it."""
        having = [
            one.name for one in self._ledger.members(region.region_id) if self._still.runs(one)
        ]
        if having:
            raise Conflict(
                f"what is in region {region.region_id} cannot be reached any more, since"
                f" xshmd-keeper was ended: {', '.join(having)} go on with it, and nobody can join",
                hint="end those guests; the region is empty when they start again",
                region=region.region_id,
            )
        log.error("contents lost", region=region.region_id, reason="xshmd-keeper was ended")
        return await self._ledger.put_region(dataclasses.replace(region, kept=""))

    def _members(self, window: Window, holder: Holder) -> list[tuple[Guest, list[maps.Mapping]]]:
        """Return who has the window's regions, but for the joiner, and what they are to have."""
        guests = [one for one in self._still.targeting(holder) if self._still.runs(one)]
        return members(window, guests, self._ledger.regions, self._ledger.intents)

    # -- opening --------------------------------------------------------------------------------

    async def _begin(
        self,
        holder: Holder,
        regions: Sequence[Region],
        reason: str,
        join: Join | None,
        ceiling: Limit | None,
    ) -> Window:
        """Write down what is going to be done."""
        nr_frames = sum(region.nr_frames for region in regions)
        names = ", ".join(region.region_id for region in regions)
        self._holders.check_memory(f"sealed {names}, for a moment twice,", nr_frames)
        window = new_window(holder, regions, reason, join)
        others = [
            guest
            for guest in self._still.targeting(holder)
            if guest.state is GuestState.ATTACHED and guest.generation != window.joiner
        ]
        last = window.fresh[-1]
        await self._have_tables(holder, Gfn(last.first_gfn + last.nr_frames))
        moved = nr_moved(window, self._members(window, holder))
        if self._pace.fresh_s:
            rest_s = self._pace.rest_s(nr_frames, moved)
            check_pause(f"sealed {names}", rest_s, ceiling, nr_frames, len(others))
        pauses: list[tuple[str, int]] = []
        if join is not None and join.pauses is not None:
            pauses.append((join.guest.generation, join.pauses))
        return await self._still.count(window, others, pauses)

    async def _have_tables(self, holder: Holder, end: Gfn) -> None:
        """Have the p2m tables up to a frame: Xen never frees one, so the same frames are used."""
        if end > holder.next_gfn:
            enlarge_paging_pool(self._xen, holder.domid, [end - holder.next_gfn])
            await self._ledger.put_holder(dataclasses.replace(holder, next_gfn=end))

    async def _prepare(self, window: Window, holder: Holder, ceiling: Limit | None) -> None:
        """Make the fresh pages and fill them."""
        began = trio.current_time()
        nr_frames = sum(fresh.nr_frames for fresh in window.fresh)
        moved = nr_moved(window, self._members(window, holder))
        await self._worker.run(self._fresh.open, holder, nr_frames)
        done = 0
        for fresh in window.fresh:
            region = self._ledger.region(fresh.region_id)
            old = region.kept if region else ""
            for start in range(0, fresh.nr_frames, PIECE_FRAMES):
                count = min(PIECE_FRAMES, fresh.nr_frames - start)
                await self._worker.run(self._fresh.make, holder, fresh, old, start, count)
                done += count
                spent = trio.current_time() - began
                rest_s = (nr_frames - done) * spent / done + self._pace.rest_s(0, moved)
                total_s = self._still.lasted_s(holder.uuid) + rest_s
                check_pause(
                    f"sealed region {fresh.region_id}", total_s, ceiling, nr_frames,
                    len(window.pauses),
                )  # fmt: skip
        kept = await self._worker.run(self._keeper.kept)
        if any(kept.get(fresh.kept) != fresh.nr_frames for fresh in window.fresh):
            raise Conflict("xshmd-keeper was ended in the middle of it", hint="try again")
        self._pace.learn_fresh(nr_frames, trio.current_time() - began)

    async def _give(self, window: Window, holder: Holder, join: Join) -> None:
        wanted = placed(join.wanted, window)
        await self._worker.run(
            lambda: maps.attach(
                self._xen, join.guest, holder, wanted,
                again=join.again, with_tables=join.with_tables,
            )
        )  # fmt: skip

    # -- from here on only forward --------------------------------------------------------------

    async def _step(self, window: Window, phase: Phase) -> Window:
        return await self._ledger.put_window(dataclasses.replace(window, phase=phase))

    async def _swap(self, window: Window, holder: Holder) -> None:
        """Give every member the new pages instead of the old; may be done again."""
        began, moved = trio.current_time(), 0
        for guest, wanted in self._members(window, holder):
            with contextlib.suppress(DomainGone):
                await self._worker.run(maps.remap, self._xen, guest, holder, wanted)
                moved += sum(one.request.nr_frames for one in wanted)
        if moved:
            self._pace.learn_map(moved, trio.current_time() - began)

    async def _close(self, window: Window, holder: Holder) -> list[str]:
        """Seal, let everybody run on, and wipe the old pages; may be done again."""
        nr_guests = self._still.nr_guests(holder.uuid)
        await self._worker.run(self._fresh.seal, holder, window.fresh)
        ran = self._still.who_ran(window)
        pause_us = self._still.end(window)
        old = []
        for fresh in window.fresh:
            region = self._ledger.region(fresh.region_id)
            if region is not None:
                old.append(region.kept)
                await self._ledger.put_region(
                    dataclasses.replace(
                        region, kept=fresh.kept, holder_first_gfn=fresh.first_gfn,
                        pause_us=pause_us,
                    )
                )  # fmt: skip
        await self._drop({*old} - {fresh.kept for fresh in window.fresh} - {""}, wipe=True)
        await self._ledger.drop_window(window.holder_uuid)
        self._tell(window, holder, pause_us, nr_guests)
        for name in ran:
            self._inspection.suspect(holder, f"guest {name} ran while pages were in it")
        self._check_pages(holder)
        return ran

    async def _roll_back(self, window: Window, holder: Holder) -> None:
        """Undo a window in which no member was touched."""
        await self._worker.run(self._fresh.undo, holder, window.fresh)
        self._still.end(window)
        await self._ledger.drop_window(window.holder_uuid)

    # -- after a failure, or a start ------------------------------------------------------------

    async def recover(self) -> None:
        """After a start: finish or undo what was cut off, and let go of what nobody has."""
        await self.settle()
        try:
            kept = await self._worker.run(self._keeper.kept)
        except XshmError as error:
            if any(region.kept for region in self._ledger.regions):
                log.error("sealed regions cannot be changed", reason=error.one_line())
            return
        known = {region.kept for region in self._ledger.regions}
        known |= {fresh.kept for window in self._ledger.windows for fresh in window.fresh}
        if self._ledger.is_whole:
            await self._drop(kept.keys() - known, wipe=True)

    async def settle(self) -> None:
        """Finish or undo windows that could not be; what cannot be now is tried again later."""
        self._still.owed.pay()
        for window in self._ledger.windows:
            try:
                await self._resume(window)
            except StoreTrouble:
                raise
            except XshmError as error:
                log.error("a sealed group stands still", reason=error.one_line())

    async def _resume(self, window: Window) -> None:
        holder = self._ledger.holder(window.holder_uuid)
        window = await self._still.begin_again(window)
        if holder is None:  # nobody can map anything of it any more
            self._still.end(window)
            await self._drop((fresh.kept for fresh in window.fresh), wipe=False)
            await self._ledger.drop_window(window.holder_uuid)
            return
        joiner = self._ledger.guest(window.joiner)
        if joiner is not None:  # whoever gives it the regions does all of it again, or undoes it
            with contextlib.suppress(DomainGone):
                await self._worker.run(maps.clear, self._xen, joiner, window.joins)
        if window.phase is Phase.PREPARING:
            await self._roll_back(window, holder)
            return
        if window.phase is Phase.SWAPPING:
            await self._keep_again(window, holder)
            await self._swap(window, holder)
            window = await self._step(window, Phase.SEALING)
        await self._close(window, holder)

    async def _keep_again(self, window: Window, holder: Holder) -> None:
        """Have the keeper keep the fresh pages, should it be another by now."""
        kept = await self._worker.run(self._keeper.kept)
        for fresh in window.fresh:
            if kept.get(fresh.kept) != fresh.nr_frames:
                await self._worker.run(self._fresh.keep_again, holder, fresh)

    async def _drop(self, names: Iterable[str], *, wipe: bool) -> None:
        for name in names:
            await self._worker.run(functools.partial(self._keeper.drop, name, wipe=wipe))

    # -- what is said of it ---------------------------------------------------------------------

    def _tell(self, window: Window, holder: Holder, pause_us: int, nr_guests: int) -> None:
        if not nr_guests:
            return
        size_bytes = bytes_of(sum(fresh.nr_frames for fresh in window.fresh))
        self._hub.emit(
            Event(
                kind=EventKind.GROUP_PAUSED, domid=holder.domid, holder_uuid=holder.uuid,
                region=", ".join(fresh.region_id for fresh in window.fresh),
                size_bytes=size_bytes, pause_us=pause_us,
                reason=f"{window.reason}; {count_of(nr_guests)} stood still",
            )
        )  # fmt: skip

    def _check_pages(self, holder: Holder) -> None:
        """Say so if the old pages are still there: Xen itself may write to one for a guest."""
        info = self._xen.domain_info(holder.domid)
        mine = [r for r in self._ledger.regions if r.kept.startswith(f"{holder.uuid}.")]
        expected = 1 + sum(region.nr_frames for region in mine)
        if info is not None and info.uuid == holder.uuid and info.tot_pages > expected:
            self._inspection.suspect(
                holder,
                f"{info.tot_pages - expected} old pages are not free: a guest has had Xen keep"
                " them, which ends when it does",
            )
