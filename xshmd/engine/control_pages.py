# SPDX-License-Identifier: LGPL-2.1-or-later
"""dom0's hand in the control pages of regions: it writes who is there, and reads who is ready.

In the reconciler's loop alone, so that no page is written that is just being freed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.model import Guest, Region
from xshmd.ports import Hypervisor
from xshmd.share import control_page
from xshmd.share.control_page import Row
from xshmd.units import PAGE_SIZE, Gfn

NO_WATCHES: Final = bytes(control_page.WATCHES_PER_PEER * control_page.WATCH.size)


class ControlPages:
    """See the module."""

    def __init__(self, *, xen: Hypervisor, ledger: Ledger, holders: Holders) -> None:
        self._xen, self._ledger, self._holders = xen, ledger, holders
        self._told: dict[tuple[str, int], dict[int, Row]] = {}
        """What pages say, by their holder and frame in it: no frame is used twice."""

    def forget_others(self, regions: Iterable[Region]) -> None:
        """Forget the pages of all regions but these."""
        places = {(region.holder_uuid, _gfn(region)) for region in regions}
        self._told = {where: rows for where, rows in self._told.items() if where in places}

    def tell(self, region: Region, rows: dict[int, Row]) -> bool:
        """Write who is there, unless the page says so already; return whether it was written.

        Raises:
            XshmError: the page cannot be reached now.
        """
        holder = self._ledger.holder(region.holder_uuid)
        if not region.ready or holder is None:
            return False
        where = (holder.uuid, _gfn(region))
        if self._told.get(where) == rows:
            return False
        self._holders.verify(holder)
        page = self._xen.map_pages(holder.domid, _gfn(region), 1, writable=True)
        try:
            for at, data in control_page.table(
                rows, region.terms.doorbells, page.read(0, PAGE_SIZE)
            ):
                page.write(at, data)
            if where not in self._told:  # in this life nobody in dom0 watches yet
                page.write(control_page.watch_at(control_page.DOM0, 0), NO_WATCHES)
        finally:
            page.close()
        self._told[where] = rows
        return True

    def note_ready(self, region: Region, here: Iterable[Guest]) -> None:
        """Have the records of these guests say which of them say that they use a region."""
        holder = self._ledger.holder(region.holder_uuid)
        if holder is None or not region.ready:
            return
        self._holders.verify(holder)
        page = self._xen.map_pages(holder.domid, _gfn(region), 1, writable=False)
        try:
            data = page.read(0, PAGE_SIZE)
        finally:
            page.close()
        for guest in here:
            peers = tuple(
                dataclasses.replace(peer, is_ready=control_page.is_ready(data, peer.peer_id))
                if peer.region_id == region.region_id and peer.peer_id >= 0
                else peer
                for peer in guest.peers
            )
            if peers != guest.peers:
                self._ledger.know(dataclasses.replace(guest, peers=peers))


def _gfn(region: Region) -> Gfn:
    return Gfn(region.holder_first_gfn + region.nr_frames - 1)
