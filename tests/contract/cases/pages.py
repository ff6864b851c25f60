# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's own pages: what may be had, what is counted, what comes back."""

from __future__ import annotations

from xshmd.errors import OutOfMemory
from xshmd.ports import Hypervisor
from xshmd.units import SUPERPAGE_FRAMES, Gfn

from ..host import HOLDER_GFN, ContractHost, equal, raises
from ..registry import case


@case
def populate_counts_exactly(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    xen.set_max_pages(domid, 7)
    xen.populate(domid, HOLDER_GFN, 7)
    equal(make.tot_pages(domid), 7, "tot_pages")
    equal(make.info(domid).max_pages, 7, "max_pages")


@case
def populate_one_too_many_does_nothing(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    xen.set_max_pages(domid, 7)
    with raises(OutOfMemory):
        xen.populate(domid, HOLDER_GFN, 8)
    equal(make.tot_pages(domid), 0, "tot_pages")
    equal(xen.populated_frames(domid, [Gfn(HOLDER_GFN + i) for i in range(8)]), (), "frames")


@case
def populate_with_max_pages_0_does_nothing(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    with raises(OutOfMemory):
        xen.populate(domid, HOLDER_GFN, 1)
    equal(make.tot_pages(domid), 0, "tot_pages")


@case
def max_pages_may_be_set_below_what_is_there(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(4)
    equal(make.info(domid).max_pages, 0, "max_pages")
    equal(make.tot_pages(domid), 4, "tot_pages")
    with raises(OutOfMemory):
        xen.populate(domid, Gfn(HOLDER_GFN + 100), 1)
    equal(make.tot_pages(domid), 4, "tot_pages after the refusal")


@case
def populate_superpages_and_frames(xen: Hypervisor, make: ContractHost) -> None:
    domid, nr = make.domain(), 2 * SUPERPAGE_FRAMES + 3
    first = Gfn(HOLDER_GFN + SUPERPAGE_FRAMES - 1)
    xen.set_max_pages(domid, nr)
    xen.populate(domid, first, nr)
    equal(make.tot_pages(domid), nr, "tot_pages")
    ends = [Gfn(first - 1), first, Gfn(first + nr - 1), Gfn(first + nr)]
    equal(xen.populated_frames(domid, ends), (first, Gfn(first + nr - 1)), "ends")


@case
def populate_takes_from_free_memory_exactly(xen: Hypervisor, make: ContractHost) -> None:
    make.settle()
    domid, nr = make.domain(), SUPERPAGE_FRAMES + 1
    before = make.free_pages()
    xen.set_max_pages(domid, nr)
    xen.populate(domid, HOLDER_GFN, nr)
    make.wait_free(before - nr, "free pages")


@case
def populate_more_than_the_host_has_gives_it_all_back(xen: Hypervisor, make: ContractHost) -> None:
    make.settle()
    domid = make.domain()
    make.hog(4 * SUPERPAGE_FRAMES)
    before = make.free_pages()
    xen.set_max_pages(domid, 2 * before)
    with raises(OutOfMemory):
        xen.populate(domid, HOLDER_GFN, before + SUPERPAGE_FRAMES)
    equal(make.tot_pages(domid), 0, "tot_pages")
    make.wait_free(before, "free pages")


@case
def populate_without_a_pool_fails_and_destroy_gives_all_back(
    xen: Hypervisor, make: ContractHost
) -> None:
    with make.page_exact():
        domid = make.bare()
        make.starve(domid)
        xen.set_max_pages(domid, 2)
        with raises(OutOfMemory):
            xen.populate(domid, Gfn(HOLDER_GFN + 1), 2)
        make.destroy(domid)
        make.gone(domid)


@case
def depopulate_frees_exactly(xen: Hypervisor, make: ContractHost) -> None:
    make.settle()
    domid = make.holder(6)
    before = make.free_pages()
    equal(xen.depopulate(domid, Gfn(HOLDER_GFN + 1), 3), 3, "freed")
    equal(make.tot_pages(domid), 3, "tot_pages")
    make.wait_free(before + 3, "free pages")
    left = xen.populated_frames(domid, [Gfn(HOLDER_GFN + i) for i in range(6)])
    equal(left, (HOLDER_GFN, Gfn(HOLDER_GFN + 4), Gfn(HOLDER_GFN + 5)), "left")


@case
def depopulate_steps_over_holes(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(6)
    xen.depopulate(domid, Gfn(HOLDER_GFN + 2), 1)
    xen.depopulate(domid, Gfn(HOLDER_GFN + 4), 1)
    equal(xen.depopulate(domid, Gfn(HOLDER_GFN - 2), 10), 4, "freed")
    equal(make.tot_pages(domid), 0, "tot_pages")


@case
def depopulate_of_nothing_is_nothing(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    equal(xen.depopulate(domid, HOLDER_GFN, 3), 0, "freed")


@case
def depopulate_inside_a_superpage(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2 * SUPERPAGE_FRAMES)
    middle = Gfn(HOLDER_GFN + SUPERPAGE_FRAMES - 1)
    equal(xen.depopulate(domid, middle, 2), 2, "freed")
    equal(make.tot_pages(domid), 2 * SUPERPAGE_FRAMES - 2, "tot_pages")
    equal(xen.populated_frames(domid, [middle, Gfn(middle + 1)]), (), "frames")


@case
def a_frame_can_be_populated_again(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    xen.depopulate(domid, HOLDER_GFN, 2)
    xen.set_max_pages(domid, 2)
    xen.populate(domid, HOLDER_GFN, 2)
    equal(make.tot_pages(domid), 2, "tot_pages")


@case
def a_page_that_dom0_maps_is_freed_when_it_lets_go(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    mapping = xen.map_pages(domid, HOLDER_GFN, 1, writable=False)
    xen.depopulate(domid, HOLDER_GFN, 2)
    equal(make.tot_pages(domid), 1, "tot_pages while mapped")
    mapping.close()
    make.wait(lambda: make.tot_pages(domid) == 0, "the page to be freed")
