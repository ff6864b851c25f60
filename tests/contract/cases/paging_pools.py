# SPDX-License-Identifier: LGPL-2.1-or-later
"""The paging pool: where it comes from, and what fails without it."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed, PartialMap
from xshmd.machine import Arch
from xshmd.ports import Hypervisor
from xshmd.units import SUPERPAGE_FRAMES, bytes_of

from ..host import GUEST_GFN, HOLDER_GFN, POOL_EXHAUSTED, ContractHost, equal, expect, raises
from ..registry import case


@case
def the_pool_is_what_was_set(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    for nr_frames in (300, 301, 64):
        xen.set_paging_pool_bytes(domid, bytes_of(nr_frames))
        equal(xen.paging_pool_bytes(domid), bytes_of(nr_frames), "pool")


@case
def the_first_pool_is_the_architectures(xen: Hypervisor, make: ContractHost) -> None:
    first = xen.paging_pool_bytes(make.bare())
    if make.arch is Arch.X86_64:
        equal(first, bytes_of(256), "pool")
    elif make.version >= (4, 18):
        equal(first, 0, "pool")


@case
def the_pool_comes_from_free_memory(xen: Hypervisor, make: ContractHost) -> None:
    make.settle()
    domid = make.domain(100)
    before = make.free_pages()
    xen.set_paging_pool_bytes(domid, bytes_of(150))
    make.wait_free(before - 50, "free pages with a larger pool")
    xen.set_paging_pool_bytes(domid, bytes_of(100))
    make.wait_free(before, "free pages with the old one")


@case
def the_pool_is_whole_frames(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain(100)
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_paging_pool_bytes(domid, bytes_of(100) + 1)
    equal(xen.paging_pool_bytes(domid), bytes_of(100), "pool")


@case
def a_pool_larger_than_the_host_is_refused(xen: Hypervisor, make: ContractHost) -> None:
    make.settle()
    domid = make.domain(100)
    make.hog(4 * SUPERPAGE_FRAMES)
    before = make.free_pages()
    with raises(HypercallFailed, errno.ENOMEM):
        xen.set_paging_pool_bytes(domid, bytes_of(before + 20000))
    xen.set_paging_pool_bytes(domid, bytes_of(100))
    make.wait_free(before, "free pages with the old one")


@case
def a_pool_cannot_be_less_than_what_is_in_use(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    with raises(HypercallFailed, errno.ENOMEM):
        xen.set_paging_pool_bytes(domid, 0)
    expect(0 < xen.paging_pool_bytes(domid) < bytes_of(64), "what is in use stays")
    equal(xen.populated_frames(domid, [HOLDER_GFN]), (HOLDER_GFN,), "and so do the frames")


@case
def mapping_without_a_pool_fails_and_undoes(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.holder(2), make.bare()
    xen.set_target(guest, holder)
    make.starve(guest)
    with raises(PartialMap, POOL_EXHAUSTED):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 2)
    equal(xen.unmap(guest, GUEST_GFN, 2), 0, "mapped")


@case
def a_pool_that_ends_in_the_middle_undoes_all(xen: Hypervisor, make: ContractHost) -> None:
    nr = 24 * SUPERPAGE_FRAMES
    holder, guest = make.holder(nr), make.bare()
    xen.set_target(guest, holder)
    make.starve(guest)
    xen.set_paging_pool_bytes(guest, xen.paging_pool_bytes(guest) + bytes_of(10))
    with raises(PartialMap, POOL_EXHAUSTED) as caught:
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr)
    assert caught.error is not None
    first_bad = caught.error.facts["first_gfn"]
    assert isinstance(first_bad, int)
    expect(GUEST_GFN < first_bad < GUEST_GFN + nr, f"first bad frame {first_bad:#x}")
    equal(first_bad % SUPERPAGE_FRAMES, 0, "it fails where a table is needed")
    equal(xen.unmap(guest, GUEST_GFN, nr), 0, "mapped")
    xen.set_paging_pool_bytes(guest, bytes_of(64))
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr)
    equal(xen.unmap(guest, GUEST_GFN, nr), nr, "mapped with a larger pool")
