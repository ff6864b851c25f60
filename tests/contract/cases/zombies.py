# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a domain that is destroyed and still referred to takes, and what it refuses."""

from __future__ import annotations

from xshmd.errors import HypercallFailed, OutOfMemory, PartialMap
from xshmd.machine import SHUTDOWN_POWEROFF, Arch
from xshmd.ports import Hypervisor, PageMap
from xshmd.units import DomId, Gfn, bytes_of

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, expect, raises
from ..registry import case


def _zombie(xen: Hypervisor, make: ContractHost) -> tuple[DomId, PageMap]:
    """Return a zombie, and what keeps it: a page that dom0 maps."""
    domid = make.holder(2)
    anchor = xen.map_pages(domid, HOLDER_GFN, 1, writable=False)
    make.destroy(domid)
    expect(make.info(domid).dying, "dying")
    return domid, anchor


@case
def a_zombie_has_what_is_referred_to(xen: Hypervisor, make: ContractHost) -> None:
    domid, anchor = _zombie(xen, make)
    equal(make.tot_pages(domid), 1, "tot_pages")
    anchor.close()
    make.gone(domid)


@case
def a_zombie_is_listed(xen: Hypervisor, make: ContractHost) -> None:
    domid, anchor = _zombie(xen, make)
    expect(domid in [info.domid for info in xen.domains()], "listed")
    anchor.close()


@case
def a_zombie_has_no_frames(xen: Hypervisor, make: ContractHost) -> None:
    domid, anchor = _zombie(xen, make)
    equal(xen.populated_frames(domid, [HOLDER_GFN, Gfn(HOLDER_GFN + 1)]), (), "frames")
    with raises(HypercallFailed):
        xen.map_pages(domid, HOLDER_GFN, 1, writable=False)
    equal(xen.depopulate(domid, HOLDER_GFN, 2), 0, "freed")
    anchor.close()


@case
def a_zombie_can_be_paused_and_unpaused(xen: Hypervisor, make: ContractHost) -> None:
    domid, anchor = _zombie(xen, make)
    xen.pause(domid)
    xen.unpause(domid)
    expect(make.info(domid).paused, "still paused by its creation")
    anchor.close()


@case
def a_zombie_may_be_told_its_limit(xen: Hypervisor, make: ContractHost) -> None:
    domid, anchor = _zombie(xen, make)
    xen.set_max_pages(domid, 9)
    equal(make.info(domid).max_pages, 9, "max_pages")
    anchor.close()


@case
def a_zombie_may_shut_down(xen: Hypervisor, make: ContractHost) -> None:
    domid, anchor = _zombie(xen, make)
    xen.shut_down(domid, SHUTDOWN_POWEROFF)
    expect(make.info(domid).dying, "dying")
    anchor.close()


@case
def a_zombie_has_no_pool_but_its_roots(xen: Hypervisor, make: ContractHost) -> None:
    domid, anchor = _zombie(xen, make)
    roots = 11 if make.arch is Arch.X86_64 else 0
    equal(xen.paging_pool_bytes(domid), bytes_of(roots), "pool")
    anchor.close()


@case
def a_zombie_can_be_a_target(xen: Hypervisor, make: ContractHost) -> None:
    """So it lives on for as long as who has it as target."""
    domid, anchor = _zombie(xen, make)
    guest = make.domain()
    xen.set_target(guest, domid)
    anchor.close()
    expect(make.info(domid).dying, "it stays")
    make.destroy(guest)
    make.gone(domid)


@case
def nothing_is_mapped_into_a_zombie(xen: Hypervisor, make: ContractHost) -> None:
    guest, anchor = _zombie(xen, make)
    holder = make.holder(1)
    xen.set_target(guest, holder)
    with raises(PartialMap):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    xen.depopulate(holder, HOLDER_GFN, 1)
    equal(make.tot_pages(holder), 0, "no reference was taken")
    anchor.close()


@case
def nothing_is_unmapped_from_a_zombie(xen: Hypervisor, make: ContractHost) -> None:
    guest, anchor = _zombie(xen, make)
    equal(xen.unmap(guest, HOLDER_GFN, 2), 0, "removed")
    anchor.close()


@case
def a_zombie_gets_no_pages(xen: Hypervisor, make: ContractHost) -> None:
    domid, anchor = _zombie(xen, make)
    xen.set_max_pages(domid, 100)
    with raises(OutOfMemory):
        xen.populate(domid, Gfn(HOLDER_GFN + 8), 1)
    equal(make.tot_pages(domid), 1, "tot_pages")
    anchor.close()


@case
def what_is_written_to_a_zombies_page_stays(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(1)
    anchor = xen.map_pages(domid, HOLDER_GFN, 1, writable=True)
    anchor.write(0, b"before")
    make.destroy(domid)
    equal(anchor.read(0, 6), b"before", "contents")
    anchor.close()


@case
def a_guest_reads_on_after_its_holder(xen: Hypervisor, make: ContractHost) -> None:
    """The pages of a dead holder are its guests' until they go; x86 lets dom0 look."""
    holder, guest = make.mapped(1)
    make.write(holder, HOLDER_GFN, b"left")
    make.destroy(holder)
    if make.arch is Arch.X86_64:
        equal(make.read(guest, GUEST_GFN, 4), b"left", "contents")
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "removed")
