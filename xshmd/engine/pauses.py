# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts the pauses on a domain, which Xen keeps and does not tell."""

from __future__ import annotations

from typing import Final

from xshmd.errors import DomainGone, HypercallFailed
from xshmd.ports import Hypervisor
from xshmd.units import DomId

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
