# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks whether holders are as they were left: their members may change a good deal of them.

A member has the rights of a device model over its holder (xen/include/xsm/dummy.h, XSM_TARGET): it
can take frames out of it, though it can put none in.  Those that have a frame keep it; the next one
to be given it would not, and Xen says so then.  It can also map a frame where nobody knows of it,
and keeps the page when the region goes.  This says so: at each look at all there is, one holder is
looked at, in turn, so that what a look costs does not grow with their number.
"""

from __future__ import annotations

import contextlib

from xshmd.engine.events import EventHub
from xshmd.engine.holders import ANCHOR_GFN, NO_DOMAIN
from xshmd.engine.ledger import Ledger
from xshmd.errors import HypercallFailed
from xshmd.events import Event, EventKind
from xshmd.model import Backing, Holder
from xshmd.ports import Hypervisor
from xshmd.units import Gfn, bytes_of, human_size


class Inspection:
    """See the module; says each thing once.  Used by the reconciler alone."""

    def __init__(self, xen: Hypervisor, ledger: Ledger, hub: EventHub) -> None:
        self._xen, self._ledger, self._hub = xen, ledger, hub
        self._said: set[tuple[str, str]] = set()
        self._last = ""
        """UUID of the holder that was looked at last."""

    def inspect(self) -> None:
        """Look at the next holder that a guest may have as target, if it is not worked on."""
        there = {holder.uuid for holder in self._ledger.holders}
        self._said = {said for said in self._said if said[0] in there}
        busy = {window.holder_uuid for window in self._ledger.windows}
        targets = [
            holder
            for holder in self._ledger.holders
            if holder.uuid not in busy and holder.domid != NO_DOMAIN and not holder.serves_grants
        ]
        if targets:
            in_order = sorted(targets, key=lambda holder: holder.uuid)
            holder = next((one for one in in_order if one.uuid > self._last), in_order[0])
            self._last = holder.uuid
            with contextlib.suppress(HypercallFailed):  # it is looked at again
                self._inspect(holder)

    def _inspect(self, holder: Holder) -> None:
        expected = {ANCHOR_GFN: "its anchor"}
        nr_pages, is_sealed = 1, False
        for region in self._ledger.regions:
            ours = region.holder_uuid == holder.uuid and region.terms.backing is Backing.HOLDER
            is_sealed = is_sealed or (ours and region.terms.is_sealed)
            nr_pages += region.nr_frames if ours else 0
            if ours and region.ready and not region.terms.is_sealed:
                first = region.holder_first_gfn
                for gfn in (first, Gfn(first + region.nr_frames - 1)):
                    expected[gfn] = f"memory of region {region.region_id}"
        there = set(self._xen.populated_frames(holder.domid, tuple(expected)))
        gone = dict.fromkeys(what for gfn, what in expected.items() if gfn not in there)
        for what in gone:
            self.suspect(holder, f"{what} was taken out of it: whoever has it keeps it")
        if not is_sealed:  # the window that seals counts those
            self._look_for_left(holder, nr_pages)

    def _look_for_left(self, holder: Holder, nr_pages: int) -> None:
        """Say so if pages of regions that went are still there."""
        info = self._xen.domain_info(holder.domid)
        if info is not None and info.uuid == holder.uuid and info.tot_pages > nr_pages:
            left = human_size(bytes_of(info.tot_pages - nr_pages))
            self.suspect(
                holder,
                f"{left} of regions that were freed is still there: a guest has mapped it by"
                " itself, which ends when it does",
            )

    def suspect(self, holder: Holder, reason: str) -> None:
        """Tell everybody that a holder is not as it was left, unless they know."""
        if (holder.uuid, reason) not in self._said:
            self._said.add((holder.uuid, reason))
            self._hub.emit(
                Event(
                    kind=EventKind.HOLDER_SUSPECT, domid=holder.domid, holder_uuid=holder.uuid,
                    reason=reason,
                )
            )  # fmt: skip
