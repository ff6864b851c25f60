# SPDX-License-Identifier: LGPL-2.1-or-later
"""A holder whose pages are out of its own p2m, and in its members' only."""

from __future__ import annotations

import errno

from xshmd.errors import OutOfMemory, PartialMap
from xshmd.ports import Hypervisor
from xshmd.units import Gfn

from ..host import (
    GUEST_GFN,
    HOLDER_GFN,
    ContractHost,
    equal,
    raises,
)
from ..registry import case


@case
def a_sealed_holder_can_be_mapped_by_nobody(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    late = make.domain()
    xen.set_target(late, holder)
    equal(xen.depopulate(holder, HOLDER_GFN, 2), 2, "taken out of the holder")
    with raises(PartialMap, errno.EINVAL):
        xen.map_foreign(late, GUEST_GFN, holder, HOLDER_GFN, 2)
    equal(make.tot_pages(holder), 2, "the guest keeps them")
    equal(xen.unmap(guest, GUEST_GFN, 2), 2, "removed")
    equal(make.tot_pages(holder), 0, "tot_pages")


@case
def pages_kept_by_a_member_count_against_the_limit(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    xen.depopulate(holder, HOLDER_GFN, 2)
    xen.set_max_pages(holder, 2)
    with raises(OutOfMemory):
        xen.populate(holder, Gfn(HOLDER_GFN + 8), 2)
    xen.set_max_pages(holder, 4)
    xen.populate(holder, Gfn(HOLDER_GFN + 8), 2)
    equal(make.tot_pages(holder), 4, "tot_pages")
    xen.unmap(guest, GUEST_GFN, 2)
    equal(make.tot_pages(holder), 2, "tot_pages")
