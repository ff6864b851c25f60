# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages of one domain at the frames of another: the calls the product is made of."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed, PartialMap
from xshmd.machine import Arch
from xshmd.ports import Hypervisor
from xshmd.units import PAGE_SIZE, DomId, Gfn

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, expect, raises
from ..registry import case


@case
def mapping_and_unmapping_counts(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(5)
    equal(make.tot_pages(guest), 0, "the guest owns none of them")
    equal(make.tot_pages(holder), 5, "the holder owns all")
    equal(xen.unmap(guest, Gfn(GUEST_GFN - 1), 7), 5, "removed")
    equal(xen.unmap(guest, Gfn(GUEST_GFN - 1), 7), 0, "removed again")


@case
def unmapping_what_is_absent_is_nothing(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.unmap(make.domain(), GUEST_GFN, 1000), 0, "removed")


@case
def unmapping_with_holes(xen: Hypervisor, make: ContractHost) -> None:
    _, guest = make.mapped(8)
    equal(xen.unmap(guest, Gfn(GUEST_GFN + 3), 2), 2, "removed in the middle")
    equal(xen.unmap(guest, GUEST_GFN, 8), 6, "removed around it")


@case
def a_mapping_of_a_hole_is_einval_and_undone(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(9)
    xen.depopulate(holder, Gfn(HOLDER_GFN + 4), 1)
    with raises(PartialMap, errno.EINVAL) as caught:
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 9)
    assert caught.error is not None
    equal(caught.error.facts["first_gfn"], GUEST_GFN + 4, "first bad frame")
    equal(xen.unmap(guest, GUEST_GFN, 9), 0, "mapped")
    xen.depopulate(holder, HOLDER_GFN, 9)
    equal(make.tot_pages(holder), 0, "no reference is left")


@case
def a_failed_mapping_leaves_its_neighbours(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(4)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    xen.map_foreign(guest, Gfn(GUEST_GFN + 5), holder, HOLDER_GFN, 1)
    with raises(PartialMap):
        xen.map_foreign(guest, Gfn(GUEST_GFN + 1), holder, Gfn(HOLDER_GFN + 1), 4)
    equal(xen.unmap(guest, GUEST_GFN, 6), 2, "left")


@case
def a_mapping_whose_first_or_last_entry_is_bad(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(4)
    for start, bad in ((HOLDER_GFN - 1, GUEST_GFN), (HOLDER_GFN + 1, GUEST_GFN + 3)):
        with raises(PartialMap, errno.EINVAL) as caught:
            xen.map_foreign(guest, GUEST_GFN, holder, Gfn(start), 4)
        assert caught.error is not None
        equal(caught.error.facts["first_gfn"], bad, "first bad frame")
        equal(xen.unmap(guest, GUEST_GFN, 4), 0, "mapped")


@case
def a_failure_past_the_first_batch_undoes_every_batch(xen: Hypervisor, make: ContractHost) -> None:
    nr = 16384 + 600
    holder, guest = make.pair(nr)
    xen.depopulate(holder, Gfn(HOLDER_GFN + nr - 10), 1)
    with raises(PartialMap, errno.EINVAL) as caught:
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr)
    assert caught.error is not None
    equal(caught.error.facts["first_gfn"], GUEST_GFN + nr - 10, "first bad frame")
    equal(xen.unmap(guest, GUEST_GFN, nr), 0, "mapped")


@case
def more_frames_than_a_16_bit_count(xen: Hypervisor, make: ContractHost) -> None:
    nr = 65536 + 3
    holder, guest = make.pair(nr)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr)
    equal(xen.unmap(guest, GUEST_GFN, nr), nr, "removed")
    equal(make.tot_pages(holder), nr, "tot_pages")


@case
def mapping_no_frames_is_nothing(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 0)
    equal(xen.unmap(guest, GUEST_GFN, 1), 0, "mapped")


@case
def mapping_of_oneself_is_einval(xen: Hypervisor, make: ContractHost) -> None:
    holder = make.holder(1)
    with raises(PartialMap, errno.EINVAL):
        xen.map_foreign(holder, GUEST_GFN, holder, HOLDER_GFN, 1)


@case
def mapping_of_dom0_is_eperm(xen: Hypervisor, make: ContractHost) -> None:
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(make.domain(), GUEST_GFN, DomId(0), HOLDER_GFN, 1)


@case
def mapping_from_nobody_fails(xen: Hypervisor, make: ContractHost) -> None:
    nobody, guest = make.unused_domid(), make.domain()
    with raises(PartialMap, errno.ESRCH):  # the guest is there: not DomainGone
        xen.map_foreign(guest, GUEST_GFN, nobody, HOLDER_GFN, 1)
    equal(xen.unmap(guest, GUEST_GFN, 1), 0, "mapped")


@case
def the_same_page_at_two_frames(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    for offset in (0, 1, 700):
        xen.map_foreign(guest, Gfn(GUEST_GFN + offset), holder, HOLDER_GFN, 1)
    xen.depopulate(holder, HOLDER_GFN, 1)
    equal(make.tot_pages(holder), 1, "tot_pages while mapped")
    equal(xen.unmap(guest, GUEST_GFN, 701), 3, "removed")
    equal(make.tot_pages(holder), 0, "tot_pages afterwards")


@case
def a_foreign_page_cannot_be_mapped_on(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(1)
    third = make.domain()
    xen.set_target(third, guest)
    with raises(PartialMap, errno.EINVAL):
        xen.map_foreign(third, GUEST_GFN, guest, GUEST_GFN, 1)
    expect(make.info(holder).tot_pages == 1, "tot_pages")


@case
def another_page_over_a_foreign_one(xen: Hypervisor, make: ContractHost) -> None:
    """x86 refuses (ENXIO) and leaves it; Arm replaces, and drops the old page's reference."""
    holder, guest = make.pair(2)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    if make.arch is Arch.X86_64:
        with raises(PartialMap, errno.ENXIO):
            xen.map_foreign(guest, GUEST_GFN, holder, Gfn(HOLDER_GFN + 1), 1)
        still_mapped = HOLDER_GFN
    else:
        xen.map_foreign(guest, GUEST_GFN, holder, Gfn(HOLDER_GFN + 1), 1)
        still_mapped = Gfn(HOLDER_GFN + 1)
    xen.depopulate(holder, HOLDER_GFN, 2)
    equal(make.tot_pages(holder), 1, "one of the two is still referred to")
    equal(xen.populated_frames(holder, [still_mapped]), (), "though the holder has it no more")
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "removed")
    equal(make.tot_pages(holder), 0, "tot_pages")


@case
def remove_then_add_is_safe_everywhere(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(3)
    for _ in range(3):
        equal(xen.unmap(guest, GUEST_GFN, 3), 3, "removed")
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 3)
    xen.unmap(guest, GUEST_GFN, 3)
    xen.depopulate(holder, HOLDER_GFN, 3)
    equal(make.tot_pages(holder), 0, "no reference is left")


@case
def mapping_over_a_guests_ram(xen: Hypervisor, make: ContractHost) -> None:
    """x86 frees the page; Arm keeps it for the guest's life, out of reach."""
    holder, guest = make.pair(1)
    xen.set_max_pages(guest, 2)
    xen.populate(guest, GUEST_GFN, 2)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    equal(make.tot_pages(guest), 1 if make.arch is Arch.X86_64 else 2, "the guest's tot_pages")
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "removed")


@case
def unmapping_ram_does_not_free_it(xen: Hypervisor, make: ContractHost) -> None:
    holder = make.holder(3)
    equal(xen.unmap(holder, HOLDER_GFN, 2), 2, "removed")
    equal(make.tot_pages(holder), 3, "tot_pages")
    left = xen.populated_frames(holder, [Gfn(HOLDER_GFN + i) for i in range(3)])
    equal(left, (Gfn(HOLDER_GFN + 2),), "left")


@case
def dom0_sees_a_guests_foreign_frames_on_x86_only(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    make.write(holder, HOLDER_GFN + 1, b"shared")
    asked = [GUEST_GFN, Gfn(GUEST_GFN + 1), Gfn(GUEST_GFN + 2)]
    if make.arch is Arch.X86_64:
        equal(xen.populated_frames(guest, asked), (asked[0], asked[1]), "present")
        equal(make.read(guest, GUEST_GFN + 1, 6), b"shared", "through the guest's frame")
        make.write(guest, GUEST_GFN, b"back")
        equal(make.read(holder, HOLDER_GFN, 4), b"back", "through the holder's frame")
    else:
        equal(xen.populated_frames(guest, asked), (), "present")
        with raises(HypercallFailed, errno.EINVAL):
            make.read(guest, GUEST_GFN, 1)


@case
def zero_before_the_map_is_what_the_guest_sees(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    make.write(holder, HOLDER_GFN, b"old" * 100)
    xen.zero(holder, HOLDER_GFN, 1)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    at = guest if make.arch is Arch.X86_64 else holder
    gfn = GUEST_GFN if make.arch is Arch.X86_64 else HOLDER_GFN
    equal(make.read(at, gfn, PAGE_SIZE), bytes(PAGE_SIZE), "contents")


@case
def a_mapping_across_a_gib(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(8)
    first = Gfn(GUEST_GFN + (1 << 18) - 4)
    xen.map_foreign(guest, first, holder, HOLDER_GFN, 8)
    equal(xen.unmap(guest, first, 8), 8, "removed")


@case
def a_mapping_at_frame_0(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(2)
    xen.map_foreign(guest, Gfn(0), holder, HOLDER_GFN, 2)
    equal(xen.unmap(guest, Gfn(0), 3), 2, "removed")


@case
def a_part_of_a_holders_pages(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(8)
    xen.map_foreign(guest, GUEST_GFN, holder, Gfn(HOLDER_GFN + 3), 2)
    xen.depopulate(holder, HOLDER_GFN, 8)
    equal(make.tot_pages(holder), 2, "the two that are mapped")
    xen.unmap(guest, GUEST_GFN, 1)
    equal(make.tot_pages(holder), 1, "and one of them")


@case
def each_guest_has_a_reference_of_its_own(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(1)
    other = make.domain()
    xen.set_target(other, holder)
    xen.map_foreign(other, HOLDER_GFN, holder, HOLDER_GFN, 1)
    xen.depopulate(holder, HOLDER_GFN, 1)
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "removed from one")
    equal(make.tot_pages(holder), 1, "the other has it yet")
    equal(xen.unmap(other, HOLDER_GFN, 1), 1, "removed from the other")
    equal(make.tot_pages(holder), 0, "tot_pages")


@case
def an_overlap_that_fails_leaves_what_was_there(xen: Hypervisor, make: ContractHost) -> None:
    """x86 refuses the first frame that is taken; on Arm pages would be replaced."""
    if make.arch is Arch.ARM64:
        return
    holder, guest = make.pair(8)
    xen.map_foreign(guest, Gfn(GUEST_GFN + 2), holder, HOLDER_GFN, 2)
    with raises(PartialMap, errno.ENXIO) as caught:
        xen.map_foreign(guest, GUEST_GFN, holder, Gfn(HOLDER_GFN + 4), 4)
    assert caught.error is not None
    equal(caught.error.facts["first_gfn"], GUEST_GFN + 2, "first bad frame")
    equal(xen.unmap(guest, GUEST_GFN, 8), 2, "left")


@case
def pages_put_in_order_are_read_in_order(xen: Hypervisor, make: ContractHost) -> None:
    """Seen from the holder after each was moved to a frame of its own in the guest and back."""
    holder, guest = make.pair(3)
    for index in range(3):
        make.write(holder, HOLDER_GFN + index, bytes([0x41 + index]) * 8)
        xen.map_foreign(guest, Gfn(GUEST_GFN + 2 - index), holder, Gfn(HOLDER_GFN + index), 1)
    found = [make.read(holder, HOLDER_GFN + index, 2) for index in range(3)]
    equal(found, [b"AA", b"BB", b"CC"], "contents")
    equal(xen.unmap(guest, GUEST_GFN, 3), 3, "removed")
