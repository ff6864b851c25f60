# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends: in which order domains go, and what keeps them."""

from __future__ import annotations

from xshmd.errors import OutOfMemory, PartialMap
from xshmd.ports import Hypervisor
from xshmd.units import Gfn, bytes_of

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, expect, raises
from ..registry import case


@case
def destroying_the_guest_first_drops_its_references(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder, guest = make.mapped(4)
        make.destroy(guest)
        make.gone(guest)
        equal(make.tot_pages(holder), 4, "tot_pages")
        equal(xen.depopulate(holder, HOLDER_GFN, 4), 4, "freed")
        equal(make.tot_pages(holder), 0, "no reference is left")
        make.destroy(holder)
        make.gone(holder)


@case
def destroying_the_holder_first_keeps_it_as_a_zombie(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder, guest = make.mapped(4)
        make.destroy(holder)
        info = make.info(holder)
        expect(info.dying, "dying")
        equal(info.tot_pages, 4, "its pages live on")
        equal(xen.unmap(guest, GUEST_GFN, 4), 4, "the guest still has them")
        equal(make.tot_pages(holder), 0, "freed with their last reference")
        make.destroy(guest)
        make.gone(holder)


@case
def destroying_both_in_any_order_gives_all_back(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        for holder_first in (True, False):
            holder, guest = make.mapped(600)
            for domid in (holder, guest) if holder_first else (guest, holder):
                make.destroy(domid)
            make.gone(holder)
            make.gone(guest)


@case
def a_zombie_can_be_destroyed_again_without_harm(xen: Hypervisor, make: ContractHost) -> None:
    holder, _ = make.mapped(2)
    make.destroy(holder)
    xen.destroy(holder)
    equal(make.tot_pages(holder), 2, "tot_pages")


@case
def a_zombie_gives_nothing_more(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    make.destroy(holder)
    with raises(PartialMap):
        xen.map_foreign(guest, Gfn(GUEST_GFN + 16), holder, HOLDER_GFN, 1)
    equal(xen.populated_frames(holder, [HOLDER_GFN]), (), "frames")
    xen.set_max_pages(holder, 100)
    with raises(OutOfMemory):
        xen.populate(holder, Gfn(HOLDER_GFN + 64), 1)
    equal(xen.unmap(guest, GUEST_GFN, 17), 2, "removed")


@case
def a_mapping_of_dom0_keeps_the_domid(xen: Hypervisor, make: ContractHost) -> None:
    """The anchor: while dom0 has one of its pages, the domid is nobody else's."""
    uuid = make.fresh_uuid()
    domid = make.bare(uuid)
    xen.set_paging_pool_bytes(domid, bytes_of(64))
    xen.set_max_pages(domid, 1)
    xen.populate(domid, HOLDER_GFN, 1)
    anchor = xen.map_pages(domid, HOLDER_GFN, 1, writable=True)
    make.destroy(domid)
    info = make.info(domid)
    expect(info.dying and info.uuid == uuid, "a zombie of the same uuid")
    anchor.write(0, b"still there")
    equal(anchor.read(0, 11), b"still there", "contents")
    anchor.close()
    make.gone(domid)


@case
def destroying_the_target_of_a_zombie_guest(xen: Hypervisor, make: ContractHost) -> None:
    """A guest whose own page dom0 holds is a zombie, and keeps its target."""
    with make.page_exact():
        holder, guest = make.mapped(1)
        xen.set_max_pages(guest, 1)
        xen.populate(guest, Gfn(16), 1)
        anchor = xen.map_pages(guest, Gfn(16), 1, writable=False)
        make.destroy(guest)
        expect(make.info(guest).dying, "the guest is a zombie")
        equal(xen.depopulate(holder, HOLDER_GFN, 1), 1, "freed")
        equal(make.tot_pages(holder), 0, "its foreign references are gone all the same")
        make.destroy(holder)
        expect(make.info(holder).dying, "the holder is one too")
        anchor.close()
        make.gone(guest)
        make.gone(holder)
