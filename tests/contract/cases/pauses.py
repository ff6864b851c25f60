# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pauses and shutdowns, which are counted and not undone."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed
from xshmd.machine import SHUTDOWN_CRASH, SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_WATCHDOG
from xshmd.ports import Hypervisor
from xshmd.units import DomId

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, expect, raises
from ..registry import case


@case
def pauses_nest(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    xen.pause(domid)
    xen.unpause(domid)
    expect(make.info(domid).paused, "still paused by its creation")


@case
def there_are_255_pauses_and_no_more(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    for _ in range(254):
        xen.pause(domid)
    with raises(HypercallFailed, errno.EOVERFLOW):
        xen.pause(domid)
    for _ in range(254):
        xen.unpause(domid)
    expect(make.info(domid).paused, "still paused by its creation")


@case
def dom0_cannot_pause_or_destroy_itself(xen: Hypervisor, make: ContractHost) -> None:
    with raises(HypercallFailed, errno.EINVAL):
        xen.pause(DomId(0))
    with raises(HypercallFailed, errno.EINVAL):
        xen.destroy(DomId(0))


@case
def a_domain_that_has_shut_down_may_be_unpaused(xen: Hypervisor, make: ContractHost) -> None:
    # It has no vCPU that is up, so this runs nothing; the count is what is looked at.
    domid = make.bare()
    xen.shut_down(domid, SHUTDOWN_POWEROFF)
    xen.unpause(domid)
    expect(not make.info(domid).paused, "not paused")
    with raises(HypercallFailed, errno.EINVAL):
        xen.unpause(domid)
    xen.pause(domid)
    expect(make.info(domid).paused, "paused")


@case
def the_first_shutdown_reason_counts(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    xen.shut_down(domid, SHUTDOWN_REBOOT)
    info = make.info(domid)
    expect(info.shut_down and not info.dying, "shut down and alive")
    equal(info.shutdown_reason, SHUTDOWN_REBOOT, "reason")
    xen.shut_down(domid, SHUTDOWN_CRASH)
    equal(make.info(domid).shutdown_reason, SHUTDOWN_REBOOT, "reason afterwards")


@case
def shutting_down_keeps_the_pages(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(4)
    xen.shut_down(holder, SHUTDOWN_POWEROFF)
    xen.shut_down(guest, SHUTDOWN_POWEROFF)
    equal(make.tot_pages(holder), 4, "tot_pages")
    equal(xen.unmap(guest, GUEST_GFN, 4), 4, "still mapped")


def _shut_down_for(reason: int) -> None:
    def run(xen: Hypervisor, make: ContractHost) -> None:
        domid = make.bare()
        xen.shut_down(domid, reason)
        info = make.info(domid)
        expect(info.shut_down and info.paused, "shut down, and paused as before")
        equal(info.shutdown_reason, reason, "reason")

    run.__name__ = f"a_domain_shuts_down_for_reason_{reason}"
    case(run)


for _reason in (SHUTDOWN_POWEROFF, SHUTDOWN_CRASH, SHUTDOWN_WATCHDOG):
    _shut_down_for(_reason)


@case
def pauses_are_each_domains_own(xen: Hypervisor, make: ContractHost) -> None:
    one, other = make.bare(), make.bare()
    xen.shut_down(one, SHUTDOWN_POWEROFF)
    xen.unpause(one)
    expect(not make.info(one).paused and make.info(other).paused, "one is, the other is not")


@case
def pausing_does_not_move_memory(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    xen.pause(guest)
    xen.pause(holder)
    equal(xen.unmap(guest, GUEST_GFN, 2), 2, "removed")
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 2)
    equal(make.tot_pages(holder), 2, "tot_pages")
