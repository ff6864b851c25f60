# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine's own frames, which are no domain's pages."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed
from xshmd.machine import Arch
from xshmd.ports import Hypervisor
from xshmd.units import SUPERPAGE_FRAMES, Gfn, Mfn, bytes_of

from ..host import GUEST_GFN, HOLDER_GFN, HOST_POOL_EXHAUSTED, ContractHost, equal, expect, raises
from ..registry import case

NOT_DOM0S = {Arch.X86_64: Mfn(0xFEE00), Arch.ARM64: Mfn(0x48000)}
"""The local APIC; RAM."""


@case
def host_ranges_are_in_order_and_some_may_be_shared(xen: Hypervisor, make: ContractHost) -> None:
    ranges = xen.host_ranges()
    expect(all(one.nr_frames > 0 and one.name for one in ranges), "empty or nameless ranges")
    firsts = [one.first_mfn for one in ranges]
    equal(firsts, sorted(firsts), "order")
    expect(any(one.refusal for one in ranges), "something that is refused")
    make.host_memory()


@case
def a_host_range_costs_the_guest_no_memory(xen: Hypervisor, make: ContractHost) -> None:
    make.settle()
    guest, mfn = make.domain(), make.host_memory(16)
    with make.page_exact():
        xen.map_host_range(guest, GUEST_GFN, mfn, 16)
        equal(make.tot_pages(guest), 0, "tot_pages")
        xen.unmap_host_range(guest, GUEST_GFN, mfn, 16)


@case
def a_host_range_is_no_page_that_dom0_maps_or_removes(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(4)
    xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    equal(xen.populated_frames(guest, [GUEST_GFN, Gfn(GUEST_GFN + 3)]), (), "frames dom0 can map")
    equal(xen.unmap(guest, GUEST_GFN, 4), 0, "frames removed as pages")


@case
def a_host_range_may_be_mapped_again(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(4)
    for _ in range(2):
        xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    xen.unmap_host_range(guest, GUEST_GFN, mfn, 4)
    xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def removing_a_host_range_frees_its_place(xen: Hypervisor, make: ContractHost) -> None:
    """x86 crashes a guest for a page put over one: that it lives proves that they were gone."""
    holder, guest = make.pair(4)
    mfn = make.host_memory(2 * SUPERPAGE_FRAMES)
    first = Gfn(GUEST_GFN - 3)
    xen.map_host_range(guest, first, mfn, SUPERPAGE_FRAMES + 7)
    xen.unmap_host_range(guest, first, mfn, SUPERPAGE_FRAMES + 7)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 4)
    make.write(holder, HOLDER_GFN, b"under it")
    equal(xen.unmap(guest, GUEST_GFN, 4), 4, "pages there now")
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def removing_half_of_what_is_there(xen: Hypervisor, make: ContractHost) -> None:
    """What is not there any more does not keep the rest from being removed."""
    holder, guest = make.pair(4)
    mfn = make.host_memory(8)
    xen.map_host_range(guest, GUEST_GFN, mfn, 8)
    for index in (0, 3):
        xen.unmap_host_range(guest, Gfn(GUEST_GFN + index), Mfn(mfn + index), 1)
    for _ in range(2):
        xen.unmap_host_range(guest, GUEST_GFN, mfn, 8)
    xen.map_foreign(guest, Gfn(GUEST_GFN + 1), holder, HOLDER_GFN, 4)
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def superpages_of_host_memory(xen: Hypervisor, make: ContractHost) -> None:
    """They are removed piece by piece and as a whole."""
    holder, guest = make.pair(4)
    mfn = make.host_memory(2 * SUPERPAGE_FRAMES)
    for piece in (1, 2 * SUPERPAGE_FRAMES):
        xen.map_host_range(guest, GUEST_GFN, mfn, 2 * SUPERPAGE_FRAMES)
        xen.unmap_host_range(guest, GUEST_GFN, mfn, piece)
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
        xen.unmap(guest, GUEST_GFN, 1)
        xen.unmap_host_range(guest, GUEST_GFN, mfn, 2 * SUPERPAGE_FRAMES)
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def a_host_range_beside_pages_of_a_holder(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(4)
    xen.map_host_range(guest, Gfn(GUEST_GFN + 4), make.host_memory(4), 4)
    equal(xen.unmap(guest, GUEST_GFN, 8), 4, "pages removed")
    equal(make.tot_pages(holder), 4, "the holder's pages")


@case
def two_guests_may_have_one_host_range(xen: Hypervisor, make: ContractHost) -> None:
    one, other, mfn = make.domain(), make.domain(), make.host_memory(4)
    xen.map_host_range(one, GUEST_GFN, mfn, 4)
    xen.map_host_range(other, Gfn(GUEST_GFN + 9), mfn, 4)
    xen.unmap_host_range(one, GUEST_GFN, mfn, 4)
    xen.unmap_host_range(other, Gfn(GUEST_GFN + 9), mfn, 4)


@case
def what_dom0_may_not_have_it_cannot_give_away(xen: Hypervisor, make: ContractHost) -> None:
    make.settle()
    guest = make.domain()
    for mfn in (NOT_DOM0S[make.arch], Mfn((1 << 40) - 1)):
        with make.page_exact(), raises(HypercallFailed, errno.EPERM):
            xen.map_host_range(guest, GUEST_GFN, mfn, 1)


@case
def a_host_range_without_a_pool_is_not_mapped(xen: Hypervisor, make: ContractHost) -> None:
    make.settle()
    guest, mfn = make.bare(), make.host_memory(4)
    make.starve(guest)
    with make.page_exact(), raises(HypercallFailed, HOST_POOL_EXHAUSTED):
        xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    xen.set_paging_pool_bytes(guest, bytes_of(512))
    xen.map_host_range(guest, GUEST_GFN, mfn, 4)


@case
def destroying_a_guest_with_a_host_range_is_page_exact(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        guest = make.domain()
        xen.map_host_range(guest, GUEST_GFN, make.host_memory(600), 600)
        make.destroy(guest)
        make.gone(guest)


@case
def a_pool_that_ends_in_host_memory(xen: Hypervisor, make: ContractHost) -> None:
    """What was put there before is gone: x86 would crash the guest for a page put over it."""
    holder, guest = make.pair(1)
    mfn = make.host_memory(2 * SUPERPAGE_FRAMES)
    xen.set_paging_pool_bytes(guest, bytes_of(make.tables(guest) + make.levels))
    first = Gfn(GUEST_GFN + SUPERPAGE_FRAMES - 4)
    with raises(HypercallFailed, HOST_POOL_EXHAUSTED):
        xen.map_host_range(guest, first, mfn, 8)
    xen.map_foreign(guest, first, holder, HOLDER_GFN, 1)
    expect(not make.info(guest).shut_down, "the guest was crashed")
    equal(xen.unmap(guest, first, 1), 1, "pages there now")


@case
def removing_host_memory_that_never_was(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(4)
    xen.unmap_host_range(guest, GUEST_GFN, mfn, 4)
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def removing_other_host_memory_than_is_there(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(8)
    xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    xen.unmap_host_range(guest, GUEST_GFN, Mfn(mfn + 4), 4)
    expect(not make.info(guest).shut_down, "the guest was crashed")
    xen.unmap_host_range(guest, GUEST_GFN, mfn, 4)
