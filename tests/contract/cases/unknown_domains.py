# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every call says of a domain that is not there."""

from __future__ import annotations

import errno
from collections.abc import Callable

from xshmd.errors import DomainGone, HypercallFailed, XshmError
from xshmd.machine import SHUTDOWN_POWEROFF
from xshmd.ports import Hypervisor
from xshmd.units import PAGE_SIZE, DomId, Mfn

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, raises
from ..registry import case


def _gone_calls(xen: Hypervisor, domid: DomId, mfn: Mfn) -> dict[str, Callable[[], object]]:
    return {
        "destroy": lambda: xen.destroy(domid),
        "pause": lambda: xen.pause(domid),
        "unpause": lambda: xen.unpause(domid),
        "shut_down": lambda: xen.shut_down(domid, SHUTDOWN_POWEROFF),
        "set_max_pages": lambda: xen.set_max_pages(domid, 1),
        "paging_pool_bytes": lambda: xen.paging_pool_bytes(domid),
        "set_paging_pool_bytes": lambda: xen.set_paging_pool_bytes(domid, PAGE_SIZE),
        "unmap": lambda: xen.unmap(domid, GUEST_GFN, 1),
        "map_foreign": lambda: xen.map_foreign(domid, GUEST_GFN, DomId(1), HOLDER_GFN, 1),
        "map_host_range": lambda: xen.map_host_range(domid, GUEST_GFN, mfn, 1),
        "unmap_host_range": lambda: xen.unmap_host_range(domid, GUEST_GFN, mfn, 1),
    }


def _unknown(name: str) -> None:
    def run(xen: Hypervisor, make: ContractHost) -> None:
        with raises(DomainGone, errno.ESRCH):
            _gone_calls(xen, make.unused_domid(), make.host_memory())[name]()

    run.__name__ = f"{name}_of_nobody_is_domain_gone"
    case(run)


for _name in (
    "destroy", "pause", "unpause", "shut_down", "set_max_pages", "paging_pool_bytes",
    "set_paging_pool_bytes", "unmap", "map_foreign", "map_host_range", "unmap_host_range",
):  # fmt: skip
    _unknown(_name)


@case
def set_target_from_nobody_is_domain_gone(xen: Hypervisor, make: ContractHost) -> None:
    nobody, holder = make.unused_domid(), make.bare()
    with raises(DomainGone, errno.ESRCH):
        xen.set_target(nobody, holder)


@case
def set_target_to_nobody_is_domain_gone(xen: Hypervisor, make: ContractHost) -> None:
    nobody, guest = make.unused_domid(), make.bare()
    with raises(DomainGone, errno.ESRCH):
        xen.set_target(guest, nobody)


@case
def populate_of_nobody_fails(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact(), raises(XshmError):
        xen.populate(make.unused_domid(), HOLDER_GFN, 2)


@case
def map_pages_of_nobody_fails(xen: Hypervisor, make: ContractHost) -> None:
    with raises(HypercallFailed):
        xen.map_pages(make.unused_domid(), HOLDER_GFN, 1, writable=False)


@case
def nobody_has_frames(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.populated_frames(make.unused_domid(), [HOLDER_GFN]), (), "frames")


@case
def nobody_has_pages_to_free(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.depopulate(make.unused_domid(), HOLDER_GFN, 2), 0, "freed")


@case
def nobodys_pages_cannot_be_zeroed(xen: Hypervisor, make: ContractHost) -> None:
    with raises(HypercallFailed):
        xen.zero(make.unused_domid(), HOLDER_GFN, 1)
