# SPDX-License-Identifier: LGPL-2.1-or-later
"""A holder whose pages are out of its own p2m, and in its members' only."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed, OutOfMemory, PartialMap
from xshmd.ports import Hypervisor
from xshmd.units import PAGE_SIZE, Gfn

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, raises
from ..registry import case


@case
def a_sealed_holder_can_be_mapped_by_nobody(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    late = make.domain()
    xen.set_target(late, holder)
    equal(xen.depopulate(holder, HOLDER_GFN, 2), 2, "taken out of the holder")
    with raises(PartialMap, errno.EINVAL):
        xen.map_foreign(late, GUEST_GFN, holder, HOLDER_GFN, 2)
    equal(make.tot_pages(holder), 2, "the guest keeps them")
    equal(xen.unmap(guest, GUEST_GFN, 2), 2, "removed")
    equal(make.tot_pages(holder), 0, "tot_pages")


@case
def pages_kept_by_a_member_count_against_the_limit(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    xen.depopulate(holder, HOLDER_GFN, 2)
    xen.set_max_pages(holder, 2)
    with raises(OutOfMemory):
        xen.populate(holder, Gfn(HOLDER_GFN + 8), 2)
    xen.set_max_pages(holder, 4)
    xen.populate(holder, Gfn(HOLDER_GFN + 8), 2)
    equal(make.tot_pages(holder), 4, "tot_pages")
    xen.unmap(guest, GUEST_GFN, 2)
    equal(make.tot_pages(holder), 2, "tot_pages")


@case
def what_dom0_mapped_before_a_seal_it_has_for_as_long_as_it_likes(
    xen: Hypervisor, make: ContractHost
) -> None:
    holder, guest = make.mapped(2)
    pages = xen.map_pages(holder, HOLDER_GFN, 2, writable=True)
    try:
        make.write(holder, HOLDER_GFN + 1, b"before")
        equal(xen.depopulate(holder, HOLDER_GFN, 2), 2, "taken out of the holder")
        with raises(HypercallFailed, errno.EINVAL):
            xen.map_pages(holder, HOLDER_GFN, 2, writable=False)
        equal(pages.read(PAGE_SIZE, 6), b"before", "through the old mapping")
        pages.write(PAGE_SIZE, b"after.")
        equal(pages.read(PAGE_SIZE, 6), b"after.", "and back")
        # All members may end: the pages, and what is in them, stay.
        equal(xen.unmap(guest, GUEST_GFN, 2), 2, "removed")
        equal(pages.read(PAGE_SIZE, 6), b"after.", "nobody else has them")
        equal(make.tot_pages(holder), 2, "dom0 keeps them")
        pages.wipe()
        equal(pages.read(0, 2 * PAGE_SIZE), bytes(2 * PAGE_SIZE), "wiped")
    finally:
        pages.close()
    equal(make.tot_pages(holder), 0, "freed with the mapping")


@case
def a_window_puts_members_on_fresh_pages_at_the_same_frames(
    xen: Hypervisor, make: ContractHost
) -> None:
    holder, guest = make.mapped(2)
    old = xen.map_pages(holder, HOLDER_GFN, 2, writable=True)
    old.write(0, b"contents")
    xen.depopulate(holder, HOLDER_GFN, 2)
    xen.set_max_pages(holder, 4)
    xen.populate(holder, HOLDER_GFN, 2)
    new = xen.map_pages(holder, HOLDER_GFN, 2, writable=True)
    try:
        new.write(0, old.read(0, 2 * PAGE_SIZE))
        xen.flush(holder, HOLDER_GFN, 2)
        equal(xen.unmap(guest, GUEST_GFN, 2), 2, "the old ones removed")
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 2)
        equal(xen.depopulate(holder, HOLDER_GFN, 2), 2, "sealed")
        xen.set_max_pages(holder, 0)
        equal(xen.populated_frames(holder, [HOLDER_GFN, Gfn(HOLDER_GFN + 1)]), (), "nothing there")
        old.wipe()
        equal(new.read(0, 8), b"contents", "the new ones are others")
    finally:
        old.close()
    equal(make.tot_pages(holder), 2, "the old ones are free")
    new.close()
    equal(make.tot_pages(holder), 2, "the guest has the new ones")
    equal(xen.unmap(guest, GUEST_GFN, 2), 2, "and gives them back")
    equal(make.tot_pages(holder), 0, "tot_pages")
