# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has libxl refuse to save or migrate a guest that has regions, before it touches the guest.

A save would put the regions' contents into the file as memory of the guest's own, which no restore
can put back (the domain's limit leaves no room for it, and the other members are not there).  Xen
has no veto, but libxl's first step is one that can be made to fail: it binds the event channel that
is named here (tools/libs/light/libxl_dom_suspend.c, ``libxl__domain_suspend_init``), and what is no
number is port 0 (tools/libs/store/xs.c, ``xs_suspend_evtchn_port``), which is never to be bound.
``xl save``, ``xl migrate`` and ``xl suspend`` then fail at once and the guest runs on.  Only a soft
reset of an HVM guest (kexec) goes the same way, and fails too; that of others fails on any host.

The node is there for PV guests of long ago to fill in; libxl makes it for every guest.
"""

from __future__ import annotations

from typing import Final

from xshmd.units import DomId

REASON: Final = "xshmd: a guest with shared memory can be neither saved nor migrated"
"""What an admin finds who follows libxl's message about the suspend event channel."""


def forbidden(domid: DomId) -> tuple[str, str]:
    """Return the node that forbids saving a domain, and its value."""
    return f"/local/domain/{domid}/device/suspend/event-channel", REASON
