# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control domain's own memory lent to guests, as its kernel does it.

From drivers/xen/gntalloc.c and grant-table.c of Linux 6.12.  A reference that is ended while its
page is mapped stays as it is until that is over; here the kernel then sees it at once, and not at
the next tick of a second.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from fakes.machine import CONTROL_DOMAIN, Machine, SimulatedMap
from fakes.objects import Entry, GrantEntry, Page
from xshmd.units import DomId
from xshmd.xen.errno_table import failure

FIRST_REF: Final = 8
USUAL_LIMIT: Final = 1024
"""gntalloc.c: limit"""
LENT_GFN: Final = 0x100000
"""Where the control domain has these pages, in this model."""


class LentMap(SimulatedMap):
    """Pages that the control domain has mapped and a guest may map."""

    def __init__(self, machine: Lending, refs: Sequence[int], pages: Sequence[Page]) -> None:
        super().__init__(machine, pages, writable=True)
        self._lender, self.refs = machine, tuple(refs)
        machine.open_maps.add(self)

    def close(self) -> None:
        pages = self._pages
        super().close()
        if pages:
            self._lender.end_lending(self.refs, pages)


class Lending(Machine):
    """The calls that are about memory of the control domain's own."""

    gntalloc_limit: int = USUAL_LIMIT
    _nr_lent: int = 0
    _ended: tuple[int, ...] = ()
    """References that are to be ended as soon as nobody has their pages mapped."""

    def lendable_frames(self) -> int:
        return self.gntalloc_limit

    def lend_pages(self, guest: DomId, nr_frames: int, *, readonly: bool) -> LentMap:
        with self._call("lend_pages", guest, nr_frames, readonly):
            call, dom0 = "IOCTL_GNTALLOC_ALLOC_GREF", self.by_domid[CONTROL_DOMAIN]
            if self._nr_lent + nr_frames > self.gntalloc_limit:
                raise failure(call, guest, errno.ENOSPC)
            if nr_frames > dom0.overhead_pages:
                raise failure(call, guest, errno.ENOMEM)
            self._nr_lent += nr_frames
            refs: list[int] = []
            pages = []
            ref = FIRST_REF
            while len(refs) < nr_frames:
                if ref not in dom0.grants:
                    refs.append(ref)
                ref += 1
            for one in refs:
                page = Page(dom0)
                page.wipe()
                dom0.pages.add(page)
                gfn = LENT_GFN + one
                dom0.p2m[gfn] = Entry(page, foreign=False)
                dom0.grants[one] = GrantEntry(valid=True, readonly=readonly, domid=guest, gfn=gfn)
                pages.append(page)
            dom0.overhead_pages -= nr_frames
            return LentMap(self, refs, pages)

    def end_lending(self, refs: Sequence[int], pages: Sequence[Page]) -> None:
        """__del_gref(): the last process of the control domain's has let go of these."""
        with self._lock:
            self.unwiped_frees += sum(page.touched for page in pages)
            self._nr_lent -= len(refs)
            self._ended += tuple(refs)
            self.settle_lent()

    def settle_lent(self) -> None:
        """gnttab_handle_deferred(): free what nobody has mapped any more."""
        dom0 = self.by_domid[CONTROL_DOMAIN]
        left = tuple(ref for ref in self._ended if dom0.grants[ref].in_use)
        for ref in set(self._ended) - set(left):
            page = dom0.p2m.pop(dom0.grants.pop(ref).gfn).page
            dom0.pages.remove(page)
            dom0.overhead_pages += 1
        self._ended = left
