# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clears the xenstore nodes of a guest that was destroyed while xl was still making it.

libxl finds its domain gone and then leaves the nodes (tools/libs/light/libxl_domain.c,
``libxl__destroy_domid``: "Non-existent domain").  Mostly there are three, since a refusal is known
before xl makes the first device; a device that is there already is found through its backend link.
"""

from __future__ import annotations

from xshmd.model import Guest
from xshmd.ports import Store


async def remove_leftovers(store: Store, guest: Guest) -> None:
    """Remove what libxl wrote for the guest's domain, which must be gone."""
    devices = f"/libxl/{guest.domid}/device"
    for kind in await store.directory(devices) or ():
        for number in await store.directory(f"{devices}/{kind}") or ():
            backend = await store.read(f"{devices}/{kind}/{number}/backend")
            # Written by the toolstack under its own root, so it is taken at its word; still, only
            # a backend of this very domain is removed.
            if backend and backend.split("/")[-2:] == [str(guest.domid), number]:
                await store.remove(backend)
    for path in (f"/local/domain/{guest.domid}", f"/vm/{guest.uuid}", f"/libxl/{guest.domid}"):
        await store.remove(path)
