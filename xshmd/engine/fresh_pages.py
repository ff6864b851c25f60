# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pages that a sealed region is put on: made, filled and kept while a window is open.

Synchronous, as :mod:`xshmd.engine.attach` is, and for the same reason.  Nobody runs meanwhile who
could map any of them: that is what a window is.
"""

from __future__ import annotations

from collections.abc import Iterable

from xshmd.engine.holders import Holders
from xshmd.engine.window_records import Fresh
from xshmd.errors import HypercallFailed
from xshmd.model import Holder
from xshmd.policy.grants import ENTRIES_PER_FRAME
from xshmd.ports import Hypervisor, Keeper
from xshmd.units import Gfn


class FreshPages:
    """See the module.  Used by the windows alone."""

    def __init__(self, xen: Hypervisor, keeper: Keeper, holders: Holders) -> None:
        self._xen, self._keeper, self._holders = xen, keeper, holders

    def open(self, holder: Holder, nr_frames: int) -> None:
        """Let the holder have so many frames more."""
        info = self._holders.verify(holder)
        # A member can map the holder's grant table, and could have put entries there beforehand, by
        # which a domain that nobody pauses gets the pages as soon as they are in the p2m.
        self._xen.end_grants(holder.domid, 0, ENTRIES_PER_FRAME)
        self._xen.set_max_pages(holder.domid, info.tot_pages + nr_frames)

    def make(self, holder: Holder, fresh: Fresh, old: str, start: int, count: int) -> None:
        """Make a part of a region's pages, and fill it.

        Args:
            holder: The holder.
            fresh: The region's pages.
            old: The keeper's name for those it was on; empty: there are none, so it is zero.
            start: The first frame of the part.
            count: How many frames it has.
        """
        first = Gfn(fresh.first_gfn + start)
        self._xen.populate(holder.domid, first, count)
        if not old:
            self._xen.zero(holder.domid, first, count)
            self._keeper.keep(fresh.kept, holder.domid, first, count)
            return
        self._keeper.keep(fresh.kept, holder.domid, first, count)
        self._keeper.copy(fresh.kept, old, start, count)
        self._xen.flush(holder.domid, first, count)

    def keep_again(self, holder: Holder, fresh: Fresh) -> None:
        """Have a keeper that is another by now keep what is in the holder."""
        self._keeper.drop(fresh.kept, wipe=False)
        self._keeper.keep(fresh.kept, holder.domid, fresh.first_gfn, fresh.nr_frames)

    def seal(self, holder: Holder, all_fresh: Iterable[Fresh]) -> None:
        """Take the pages out of the holder, for good; may be done again.

        Raises:
            HypercallFailed: some are still there.
        """
        for fresh in all_fresh:
            frames = [Gfn(fresh.first_gfn + at) for at in range(fresh.nr_frames)]
            # Nobody but us could have taken one out, so all are, or the seal was begun before.
            if self._xen.depopulate(holder.domid, fresh.first_gfn, len(frames)) == len(frames):
                frames = [frames[0], frames[len(frames) // 2], frames[-1]]
            if left := self._xen.populated_frames(holder.domid, frames):
                raise HypercallFailed(
                    f"Xen left {len(left)} frames of region {fresh.region_id} in its holder",
                    hint="its guests stand still until that is done",
                    first_gfn=left[0],
                )
        self._xen.set_max_pages(holder.domid, 0)

    def undo(self, holder: Holder, all_fresh: Iterable[Fresh]) -> None:
        """Free pages that no member has been given; may be done again."""
        for fresh in all_fresh:
            self._xen.depopulate(holder.domid, fresh.first_gfn, fresh.nr_frames)
            self._keeper.drop(fresh.kept, wipe=True)
        self._xen.set_max_pages(holder.domid, 0)
