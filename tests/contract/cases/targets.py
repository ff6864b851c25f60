# SPDX-License-Identifier: LGPL-2.1-or-later
"""The target: who may map whose pages, and for how long."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed, PartialMap
from xshmd.machine import Arch
from xshmd.ports import Hypervisor
from xshmd.units import DomId, Gfn

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, expect, raises
from ..registry import case


@case
def mapping_without_a_target_is_eperm(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.holder(2), make.domain()
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 2)
    equal(xen.unmap(guest, GUEST_GFN, 2), 0, "mapped")


@case
def mapping_with_another_target_is_eperm(xen: Hypervisor, make: ContractHost) -> None:
    holder, other, guest = make.holder(2), make.holder(2), make.domain()
    xen.set_target(guest, other)
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 2)


@case
def the_target_is_not_mutual(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(2)
    xen.set_max_pages(guest, 1)
    xen.populate(guest, Gfn(16), 1)
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(holder, Gfn(HOLDER_GFN + 64), guest, Gfn(16), 1)


@case
def the_target_is_set_once(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair()
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_target(guest, holder)
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_target(guest, make.bare())
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 4)


@case
def nobody_is_his_own_target(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_target(domid, domid)


@case
def many_guests_have_one_target(xen: Hypervisor, make: ContractHost) -> None:
    holder = make.holder(1)
    guests = [make.domain(64) for _ in range(4)]
    for guest in guests:
        xen.set_target(guest, holder)
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    equal(make.tot_pages(holder), 1, "tot_pages")
    equal([xen.unmap(guest, GUEST_GFN, 1) for guest in guests], [1] * 4, "mapped")


@case
def a_targeted_holder_stays_until_its_guest_is_gone(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder, guest = make.pair(2)
        make.destroy(holder)
        info = make.info(holder)
        expect(info.dying, "dying")
        equal(info.tot_pages, 0, "tot_pages")
        make.destroy(guest)
        make.gone(guest)
        make.gone(holder)


@case
def a_target_of_a_target_is_none(xen: Hypervisor, make: ContractHost) -> None:
    holder, middle = make.pair(1)
    guest = make.domain()
    xen.set_target(guest, middle)
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)


@case
def a_chain_of_targets_goes_away(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder, middle = make.mapped(2)
        guest = make.domain()
        xen.set_target(guest, middle)
        for domid in (holder, middle, guest):
            make.destroy(domid)
        make.gone(holder)
        make.gone(middle)


@case
def a_target_may_be_set_while_neither_has_memory(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.bare(), make.bare()
    xen.set_target(guest, holder)
    expect(make.info(guest).paused and make.info(holder).paused, "both as they were")


@case
def dom0_of_x86_is_no_target(xen: Hypervisor, make: ContractHost) -> None:
    """A PV domain cannot be one; on Arm it could, so that is not tried."""
    if make.arch is Arch.X86_64:
        with raises(HypercallFailed, errno.EOPNOTSUPP):
            xen.set_target(make.bare(), DomId(0))
