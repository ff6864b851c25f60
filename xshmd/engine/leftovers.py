# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clears the xenstore nodes that a guest's untimely end leaves behind.

libxl finds its domain gone and then leaves the nodes (tools/libs/light/libxl_domain.c,
``libxl__destroy_domid``: "Non-existent domain").  Mostly there are three, since a refusal is known
before xl makes the first device; a device that is there already is found through its backend link.
"""

from __future__ import annotations

from xshmd.model import Guest
from xshmd.ports import Store, StoreTransaction
from xshmd.units import DomId


async def remove_leftovers(store: Store, guest: Guest) -> None:
    """Remove what libxl wrote for the guest's domain, which must be gone.

    libxl gives a number away again after a minute at the earliest (``libxl__is_domid_recent``), and
    this is called within a quarter of one: what is there is still the guest's.
    """
    devices = f"/libxl/{guest.domid}/device"
    for kind in await store.directory(devices) or ():
        for number in await store.directory(f"{devices}/{kind}") or ():
            backend = await store.read(f"{devices}/{kind}/{number}/backend")
            # Written by the toolstack under its own root, so it is taken at its word; still, only
            # a backend of this very domain is removed.
            if backend and backend.split("/")[-2:] == [str(guest.domid), number]:
                await _remove_with_parents(store, backend)
    for path in (f"/local/domain/{guest.domid}", f"/vm/{guest.uuid}", f"/libxl/{guest.domid}"):
        await store.remove(path)


async def _remove_with_parents(store: Store, backend: str) -> None:
    """Remove a backend's node, and the directories above it that are then empty, as libxl does.

    In a transaction, since another guest's backend may be made in one of them at that moment.
    """

    async def remove(inside: StoreTransaction) -> None:
        path = backend
        while path.count("/") > 3:  # /local/domain/N stays
            await inside.remove(path)
            path = path.rpartition("/")[0]
            if await inside.directory(path):
                return

    await store.transact(remove)


async def remove_stray(store: Store, domid: DomId) -> None:
    """Remove a gone domain's directory if nothing but our own nodes is in it.

    Writing a node makes its directory, so one we write while libxl is removing the domain's would
    bring it back for ever.
    """
    at = f"/local/domain/{domid}"
    left = set(await store.directory(at) or ())
    if "device" in left:
        left |= set(await store.directory(f"{at}/device") or ()) - {"suspend"}
    if left and left <= {"xshm", "device"}:
        await store.remove(at)
