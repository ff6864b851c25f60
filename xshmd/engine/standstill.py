# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has all guests of a sealed group stand still, each by one pause of ours that outlives us.

Which guests, and how many pauses of others each has, is in the window's record before any is
paused; what Xen's pause counts say then tells a later life what is still to be given back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import structlog
import trio

from xshmd.engine import identity
from xshmd.engine.ledger import Ledger
from xshmd.engine.pauses import OwedPauses, pause_count
from xshmd.engine.window_records import Window
from xshmd.errors import Conflict, DomainGone
from xshmd.model import Guest, GuestState, Holder
from xshmd.ports import Hypervisor

log = structlog.get_logger()


class Standstill:
    """See the module.  Used by the windows alone."""

    def __init__(self, xen: Hypervisor, ledger: Ledger) -> None:
        self._xen, self._ledger = xen, ledger
        self._times: dict[str, dict[str, int]] = {}
        """By holder: on which guests this life has a pause, and their CPU time when it came."""
        self._began: dict[str, float] = {}
        self.owed = OwedPauses(xen)
        """Pauses that are to be given back."""

    # -- who ------------------------------------------------------------------------------------

    def lives(self, guest: Guest) -> bool:
        """Return whether the guest has a domain."""
        return identity.is_still(self._xen, guest.domid, guest.uuid)

    def runs(self, guest: Guest) -> bool:
        """Return whether the guest has been let run, paused or not by now."""
        return guest.state is GuestState.ATTACHED and self.lives(guest)

    def targeting(self, holder: Holder) -> list[Guest]:
        """Return every guest with a domain that has this target, or may have."""
        return [
            guest
            for guest in self._ledger.guests
            if guest.holder_uuid == holder.uuid and guest.state is not GuestState.REBOOTING
            if self.lives(guest)
        ]

    def _paused_by(self, window: Window) -> list[Guest]:
        found = [self._ledger.guest(generation) for generation, _ in window.pauses]
        return [guest for guest in found if guest is not None and self.lives(guest)]

    def _is_paused(self, guest: Guest) -> bool:
        """Return whether the guest does not run; one that has ended does not."""
        info = self._xen.domain_info(guest.domid)
        return info is None or info.uuid != guest.uuid or info.paused

    # -- beginning ------------------------------------------------------------------------------

    async def count(
        self, window: Window, guests: Sequence[Guest], known: Sequence[tuple[str, int]]
    ) -> Window:
        """Write a new window down, with who is to stand still for it.

        Args:
            window: The window.
            guests: Whose pauses are to be counted.
            known: Further guests, by generation, and how many pauses are on them.
        """
        paused = [one for one in guests if self._is_paused(one)]
        rest = [*known, *((one.generation, 0) for one in guests if one not in paused)]
        guesses = [(one.generation, 1) for one in paused]
        window = await self._ledger.put_window(
            window.with_pauses((*rest, *guesses), is_counting=bool(paused))
        )
        if not paused:
            return window
        counts = []
        for guest in paused:
            with contextlib.suppress(DomainGone):
                identity.verify(self._xen, guest)
                counts.append((guest.generation, pause_count(self._xen, guest.domid)))
        return await self._ledger.put_window(
            window.with_pauses((*rest, *counts), is_counting=False)
        )

    def begin(self, window: Window, holder: Holder) -> None:
        """Pause everybody; Conflict if one who has the target runs all the same."""
        times = self._times[holder.uuid] = {}
        self._began[holder.uuid] = trio.current_time()
        for guest in self._paused_by(window):
            with contextlib.suppress(DomainGone):
                times[guest.generation] = identity.pause(self._xen, guest).cpu_time_ns
        for guest in self.targeting(holder):
            if not self._is_paused(guest):
                raise Conflict(
                    f"guest {guest.name} runs, which xshmd is still preparing",
                    hint="do not `xl unpause` it",
                    guest=guest.name,
                )

    async def begin_again(self, window: Window) -> Window:
        """Have exactly one pause of ours on everybody; those of this life are there already."""
        if window.holder_uuid in self._times:
            return window
        was_counting = window.is_counting
        window = await self._ledger.put_window(window.with_pauses(window.pauses, is_counting=True))
        times = self._times[window.holder_uuid] = {}
        self._began[window.holder_uuid] = trio.current_time()
        before = dict(window.pauses)
        for guest in self._paused_by(window):
            with contextlib.suppress(DomainGone):
                info = identity.verify(self._xen, guest)
                count = pause_count(self._xen, guest.domid) if info.paused else 0
                ours = count - before[guest.generation] if count else 0
                if ours < 1:
                    identity.pause(self._xen, guest)
                for _ in range(ours - 1 if was_counting else 0):
                    identity.unpause(self._xen, guest)  # a count that was cut off left them
                times[guest.generation] = info.cpu_time_ns
        return window

    # -- meanwhile, and ending ------------------------------------------------------------------

    def lasted_s(self, holder_uuid: str) -> float:
        """Return for how long a holder's guests have been standing still, in seconds."""
        now = trio.current_time()
        return now - self._began.get(holder_uuid, now)

    def nr_guests(self, holder_uuid: str) -> int:
        """Return how many stand still by a pause of this life."""
        return len(self._times.get(holder_uuid, ()))

    def who_ran(self, window: Window) -> list[str]:
        """Return the names of guests that somebody let run while they should have stood still."""
        before = self._times.get(window.holder_uuid, {})
        found = []
        for guest in self._paused_by(window):
            info = self._xen.domain_info(guest.domid)
            if info and info.cpu_time_ns != before.get(guest.generation, info.cpu_time_ns):
                found.append(guest.name)
        return found

    def end(self, window: Window) -> int:
        """Give all pauses back; return for how long they were, in microseconds; 0 if nobody's."""
        times = self._times.pop(window.holder_uuid, {})
        for guest in self._paused_by(window):
            if guest.generation in times:
                self.owed.unpause(guest)
        lasted_s = self.lasted_s(window.holder_uuid)
        self._began.pop(window.holder_uuid, None)
        return round(lasted_s * 1e6) if times else 0
