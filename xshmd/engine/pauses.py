# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pauses: counts them, as Xen keeps how many there are and does not tell, and gives ours back."""

from __future__ import annotations

from typing import Final

import structlog

from xshmd.engine import identity
from xshmd.errors import DomainGone, HypercallFailed
from xshmd.model import Guest
from xshmd.ports import Hypervisor
from xshmd.units import DomId

log = structlog.get_logger()

LIMIT: Final = 255
"""How many pauses Xen allows: xen/common/domain.c, _domain_pause_by_systemcontroller()."""


def pause_count(xen: Hypervisor, domid: DomId) -> int:
    """Return how many pauses are on a paused domain, without letting it run.

    Raises:
        DomainGone: the domain ended meanwhile.
    """
    taken = 0
    try:
        while taken < LIMIT:
            xen.pause(domid)
            taken += 1
    except DomainGone:
        raise
    except HypercallFailed:
        pass  # -EOVERFLOW: all that it allows are on it
    for _ in range(taken):
        xen.unpause(domid)
    return LIMIT - taken


class OwedPauses:
    """Pauses of ours that are over, and those among them that Xen would not take back yet."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen = xen
        self._guests: list[Guest] = []

    @property
    def is_any(self) -> bool:
        """Whether there is a pause that Xen would not take back yet."""
        return bool(self._guests)

    def unpause(self, guest: Guest) -> None:
        """Give a pause of ours back, or owe it; with the guest's end nothing is owed."""
        try:
            identity.unpause(self._xen, guest)
        except DomainGone:
            pass
        except HypercallFailed as error:
            log.error("guest not unpaused yet", guest=guest.name, reason=error.one_line())
            self._guests.append(guest)

    def pay(self) -> None:
        """Try again to give back what could not be."""
        owed, self._guests = self._guests, []
        for guest in owed:
            self.unpause(guest)
