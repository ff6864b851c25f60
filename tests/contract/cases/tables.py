# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many pages of its pool a domain needs for its own p2m: what the daemon's sums rest on."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed, OutOfMemory, PartialMap
from xshmd.machine import Arch
from xshmd.ports import Hypervisor
from xshmd.units import SUPERPAGE_FRAMES, DomId, Gfn, bytes_of

from ..host import GUEST_GFN, HOLDER_GFN, POOL_EXHAUSTED, ContractHost, equal, raises
from ..registry import case

GIB_FRAMES = 1 << 18


def _taken(xen: Hypervisor, make: ContractHost, *gfns: int, nr_frames: int = 1) -> int:
    """Return how many tables it takes to have pages at all of these frames."""
    domid = make.domain()
    xen.set_max_pages(domid, nr_frames * len(gfns))
    for gfn in gfns:
        xen.populate(domid, Gfn(gfn), nr_frames)
    return make.tables(domid) - make.tables(make.bare())


def _with_tables_left(make: ContractHost, domid: DomId, nr_left: int) -> None:
    make.xen.set_paging_pool_bytes(domid, bytes_of(make.tables(domid) + nr_left))


@case
def a_frame_takes_a_table_a_level(xen: Hypervisor, make: ContractHost) -> None:
    equal(_taken(xen, make, HOLDER_GFN), make.levels, "tables")


@case
def neighbours_share_their_tables(xen: Hypervisor, make: ContractHost) -> None:
    last = HOLDER_GFN + SUPERPAGE_FRAMES - 1
    equal(_taken(xen, make, HOLDER_GFN, last), make.levels, "tables")


@case
def the_next_2_mib_take_a_table(xen: Hypervisor, make: ContractHost) -> None:
    further = HOLDER_GFN + SUPERPAGE_FRAMES
    equal(_taken(xen, make, HOLDER_GFN, further), make.levels + 1, "tables")


@case
def the_next_gib_takes_two(xen: Hypervisor, make: ContractHost) -> None:
    further = HOLDER_GFN + GIB_FRAMES
    equal(_taken(xen, make, HOLDER_GFN, further), make.levels + 2, "tables")


@case
def a_superpage_has_no_table_of_its_own(xen: Hypervisor, make: ContractHost) -> None:
    nr_frames = SUPERPAGE_FRAMES
    equal(_taken(xen, make, HOLDER_GFN, nr_frames=nr_frames), make.levels - 1, "tables")


@case
def a_superpage_less_a_frame_has_one(xen: Hypervisor, make: ContractHost) -> None:
    nr_frames = SUPERPAGE_FRAMES - 1
    equal(_taken(xen, make, HOLDER_GFN, nr_frames=nr_frames), make.levels, "tables")


@case
def superpages_that_are_not_aligned_are_none(xen: Hypervisor, make: ContractHost) -> None:
    first, nr_frames = HOLDER_GFN + 1, SUPERPAGE_FRAMES
    equal(_taken(xen, make, first, nr_frames=nr_frames), make.levels + 1, "tables")


@case
def a_superpage_and_a_frame(xen: Hypervisor, make: ContractHost) -> None:
    nr_frames = SUPERPAGE_FRAMES + 1
    equal(_taken(xen, make, HOLDER_GFN, nr_frames=nr_frames), make.levels, "tables")


@case
def splitting_a_superpage_takes_a_table(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(SUPERPAGE_FRAMES)
    before = make.tables(domid)
    xen.set_paging_pool_bytes(domid, bytes_of(before + 8))
    xen.depopulate(domid, Gfn(HOLDER_GFN + 5), 1)
    equal(make.tables(domid), before + 1, "tables")


@case
def a_superpage_that_cannot_be_split_stays(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(SUPERPAGE_FRAMES)
    make.starve(domid)
    with raises(HypercallFailed, (errno.ENOMEM, errno.EBUSY)):
        xen.depopulate(domid, Gfn(HOLDER_GFN + 5), 1)
    equal(make.tot_pages(domid), SUPERPAGE_FRAMES, "tot_pages")
    equal(xen.populated_frames(domid, [Gfn(HOLDER_GFN + 5)]), (HOLDER_GFN + 5,), "the frame")


@case
def emptied_tables_are_kept(xen: Hypervisor, make: ContractHost) -> None:
    _, guest = make.mapped(3)
    before = make.tables(guest)
    xen.unmap(guest, GUEST_GFN, 3)
    equal(make.tables(guest), before, "tables")


@case
def emptied_tables_are_used_again(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(3)
    xen.unmap(guest, GUEST_GFN, 3)
    make.starve(guest)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 3)
    equal(xen.unmap(guest, GUEST_GFN, 3), 3, "mapped")


@case
def others_pages_take_the_same_tables(xen: Hypervisor, make: ContractHost) -> None:
    _, guest = make.mapped(SUPERPAGE_FRAMES)
    tables = make.tables(guest) - make.tables(make.bare())
    equal(tables, make.levels, "tables of a mapped superpage")


@case
def a_pool_that_is_just_enough(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    _with_tables_left(make, guest, make.levels)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "mapped")


@case
def a_pool_that_is_one_too_small(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    _with_tables_left(make, guest, make.levels - 1)
    with raises(PartialMap, POOL_EXHAUSTED):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    equal(xen.unmap(guest, GUEST_GFN, 1), 0, "mapped")


@case
def a_pool_for_a_superpage_only(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    _with_tables_left(make, domid, make.levels - 1)
    xen.set_max_pages(domid, SUPERPAGE_FRAMES)
    xen.populate(domid, HOLDER_GFN, SUPERPAGE_FRAMES)
    equal(make.tot_pages(domid), SUPERPAGE_FRAMES, "tot_pages")


@case
def a_pool_too_small_for_a_frame(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    _with_tables_left(make, domid, make.levels - 1)
    xen.set_max_pages(domid, 1)
    with raises(OutOfMemory):
        xen.populate(domid, HOLDER_GFN, 1)
    equal(xen.populated_frames(domid, [HOLDER_GFN]), (), "frames")


@case
def host_memory_in_superpages(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(2 * SUPERPAGE_FRAMES)
    empty = make.tables(make.bare())
    xen.map_host_range(guest, GUEST_GFN, mfn, 2 * SUPERPAGE_FRAMES)
    # Arm takes 64 frames a call: xen/common/domctl.c, XEN_DOMCTL_memory_mapping.
    leaves = 0 if make.arch is Arch.X86_64 else 2
    equal(make.tables(guest) - empty, make.levels - 1 + leaves, "tables")


@case
def host_memory_not_aligned(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(2 * SUPERPAGE_FRAMES)
    empty = make.tables(make.bare())
    xen.map_host_range(guest, Gfn(GUEST_GFN + 1), mfn, SUPERPAGE_FRAMES)
    equal(make.tables(guest) - empty, make.levels + 1, "tables")


@case
def host_memory_with_a_tail(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(2 * SUPERPAGE_FRAMES)
    empty = make.tables(make.bare())
    xen.map_host_range(guest, GUEST_GFN, mfn, SUPERPAGE_FRAMES + 3)
    leaves = 1 if make.arch is Arch.X86_64 else 2
    equal(make.tables(guest) - empty, make.levels - 1 + leaves, "tables")
