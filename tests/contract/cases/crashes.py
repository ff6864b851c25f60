# SPDX-License-Identifier: LGPL-2.1-or-later
"""What lies at a frame already: x86 crashes a guest for some of it, Arm replaces it."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed, PartialMap
from xshmd.machine import SHUTDOWN_CRASH, Arch
from xshmd.ports import Hypervisor
from xshmd.units import DomId, Gfn, Mfn

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, expect, raises
from ..registry import case


def _crashed(make: ContractHost, domid: DomId) -> bool:
    info = make.info(domid)
    return info.shut_down and info.shutdown_reason == SHUTDOWN_CRASH


@case
def a_page_of_a_holder_over_host_memory(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    xen.map_host_range(guest, GUEST_GFN, make.host_memory(), 1)
    if make.arch is Arch.X86_64:
        with raises(PartialMap):
            xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
        expect(_crashed(make, guest), "the guest is crashed")
        return
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    expect(not _crashed(make, guest), "the guest lives")
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "pages there now")


@case
def host_memory_over_a_page_of_a_holder(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(1)
    mfn = make.host_memory()
    if make.arch is Arch.X86_64:
        with raises(HypercallFailed):
            xen.map_host_range(guest, GUEST_GFN, mfn, 1)
        expect(_crashed(make, guest), "the guest is crashed")
        return
    xen.map_host_range(guest, GUEST_GFN, mfn, 1)
    expect(not _crashed(make, guest), "the guest lives")
    xen.depopulate(holder, HOLDER_GFN, 1)
    equal(make.tot_pages(holder), 0, "the holder's page is let go")
    equal(xen.unmap(guest, GUEST_GFN, 1), 0, "pages there now")


@case
def other_host_memory_over_host_memory(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(2)
    xen.map_host_range(guest, GUEST_GFN, mfn, 1)
    if make.arch is Arch.X86_64:
        with raises(HypercallFailed):
            xen.map_host_range(guest, GUEST_GFN, Mfn(mfn + 1), 1)
    else:
        xen.map_host_range(guest, GUEST_GFN, Mfn(mfn + 1), 1)
    equal(_crashed(make, guest), make.arch is Arch.X86_64, "the guest is crashed")


@case
def host_memory_over_ram(xen: Hypervisor, make: ContractHost) -> None:
    guest = make.domain()
    xen.set_max_pages(guest, 1)
    xen.populate(guest, GUEST_GFN, 1)
    xen.map_host_range(guest, GUEST_GFN, make.host_memory(), 1)
    expect(not _crashed(make, guest), "the guest lives")
    equal(make.tot_pages(guest), 1, "tot_pages: the page is nowhere, and stays the guest's")
    equal(xen.populated_frames(guest, [GUEST_GFN]), (), "frames dom0 can map")


@case
def ram_over_a_page_of_a_holder(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(1)
    xen.set_max_pages(guest, 1)
    if make.arch is Arch.X86_64:
        with raises(HypercallFailed, errno.EBUSY):  # what is there cannot be freed either
            xen.populate(guest, GUEST_GFN, 1)
        expect(_crashed(make, guest), "the guest is crashed")
        equal(xen.unmap(guest, GUEST_GFN, 1), 1, "the holder's page is there yet")
    else:
        xen.populate(guest, GUEST_GFN, 1)
        expect(not _crashed(make, guest), "the guest lives")
    xen.depopulate(holder, HOLDER_GFN, 1)
    equal(make.tot_pages(holder), 0, "the holder's page is let go")


@case
def what_comes_before_a_crash_is_undone(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(4)
    xen.map_host_range(guest, Gfn(GUEST_GFN + 2), make.host_memory(), 1)
    if make.arch is Arch.ARM64:
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 4)
        equal(xen.unmap(guest, GUEST_GFN, 4), 4, "mapped")
        return
    with raises(PartialMap) as caught:
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 4)
    assert caught.error is not None
    equal(caught.error.facts["first_gfn"], GUEST_GFN + 2, "first bad frame")
    equal(xen.unmap(guest, GUEST_GFN, 4), 0, "mapped")


@case
def a_crashed_guest_still_gives_all_back(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder, guest = make.mapped(3)
        xen.shut_down(guest, SHUTDOWN_CRASH)
        expect(_crashed(make, guest), "the guest is crashed")
        equal(xen.unmap(guest, GUEST_GFN, 1), 1, "removed")
        make.destroy(guest)
        make.destroy(holder)
        make.gone(holder)
