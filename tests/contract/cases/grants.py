# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cases that are about grants, with dom0 in the part of the guest that maps them."""

from __future__ import annotations

import errno

from xshmd.errors import DomainGone, HypercallFailed
from xshmd.ports import Hypervisor
from xshmd.units import DOMID_0, DomId, Gfn

from ..host import HOLDER_GFN, ContractHost, equal, expect, raises
from ..registry import case

FIRST_REF = 8
"""GNTTAB_NR_RESERVED_ENTRIES"""
PER_FRAME = 512


def _granter(
    make: ContractHost, nr_frames: int = 4, *, readonly: bool = False, to: DomId = DOMID_0
) -> DomId:
    """Return a holder all of whose pages have been granted, from ``FIRST_REF`` on."""
    holder = make.holder(nr_frames, nr_grant_frames=2)
    make.xen.write_grants(holder, FIRST_REF, nr_frames, HOLDER_GFN, to, readonly=readonly)
    return holder


def _not_mapped(
    xen: Hypervisor, holder: DomId, first_ref: int, nr_frames: int, *, writable: bool
) -> None:
    with raises(HypercallFailed, errno.EINVAL):
        xen.map_grants(holder, first_ref, nr_frames, writable=writable)


@case
def a_grant_leads_to_the_holders_page(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make)
    make.write(holder, HOLDER_GFN + 2, b"of the holder")
    mapping = xen.map_grants(holder, FIRST_REF + 1, 2, writable=True)
    equal(mapping.read(4096, 13), b"of the holder", "what is read")
    mapping.write(4, b"of dom0")
    mapping.close()
    equal(make.read(holder, HOLDER_GFN + 1, 7, 4), b"of dom0", "what was written")


@case
def grants_are_in_use_while_they_are_mapped(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make)
    equal(xen.grants_in_use(holder, FIRST_REF, 4), 0, "in use before")
    one = xen.map_grants(holder, FIRST_REF, 3, writable=True)
    other = xen.map_grants(holder, FIRST_REF, 1, writable=False)
    equal(xen.grants_in_use(holder, FIRST_REF, 4), 3, "in use")
    equal(xen.grants_in_use(holder, FIRST_REF + 3, 1), 0, "the last")
    one.close()
    equal(xen.grants_in_use(holder, FIRST_REF, 4), 1, "in use by the other")
    other.close()
    equal(xen.grants_in_use(holder, FIRST_REF, 4), 0, "in use afterwards")


@case
def a_readonly_grant_is_not_mapped_writable(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make, readonly=True)
    _not_mapped(xen, holder, FIRST_REF, 1, writable=True)
    make.write(holder, HOLDER_GFN, b"to be read")
    mapping = xen.map_grants(holder, FIRST_REF, 4, writable=False)
    equal(mapping.read(0, 10), b"to be read", "what is read")
    _not_mapped(xen, holder, FIRST_REF, 1, writable=True)
    mapping.close()


@case
def a_grant_is_for_one_domain(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make, to=make.bare())
    for writable in (False, True):
        _not_mapped(xen, holder, FIRST_REF, 1, writable=writable)
    equal(xen.grants_in_use(holder, FIRST_REF, 4), 0, "in use")


@case
def what_was_never_granted_is_not_mapped(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make)
    for first_ref in (0, FIRST_REF - 1, FIRST_REF + 1, FIRST_REF + 4, 2 * PER_FRAME):
        for writable in (False, True):
            _not_mapped(xen, holder, first_ref, 4, writable=writable)
    equal(xen.grants_in_use(holder, FIRST_REF, 4), 0, "in use")


@case
def a_frame_that_is_not_there_is_not_mapped(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make)
    xen.write_grants(holder, FIRST_REF, 1, Gfn(HOLDER_GFN + 9), DOMID_0, readonly=False)
    _not_mapped(xen, holder, FIRST_REF, 1, writable=False)
    equal(xen.grants_in_use(holder, FIRST_REF, 1), 0, "in use")


@case
def grants_that_were_ended_are_not_mapped(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make)
    equal(xen.end_grants(holder, FIRST_REF + 1, 2), 0, "in use")
    for ref in (FIRST_REF + 1, FIRST_REF + 2):
        _not_mapped(xen, holder, ref, 1, writable=False)
    xen.map_grants(holder, FIRST_REF, 1, writable=True).close()
    xen.map_grants(holder, FIRST_REF + 3, 1, writable=True).close()


@case
def mappings_outlive_their_grants(xen: Hypervisor, make: ContractHost) -> None:
    """And who has one may have another: nothing of the entry is looked at while it is pinned."""
    holder = _granter(make, 2)
    first = xen.map_grants(holder, FIRST_REF, 1, writable=True)
    equal(xen.end_grants(holder, FIRST_REF, 2), 1, "in use")
    first.write(0, b"still")
    equal(make.read(holder, HOLDER_GFN, 5), b"still", "what was written")
    second = xen.map_grants(holder, FIRST_REF, 1, writable=True)
    first.close()
    equal(xen.end_grants(holder, FIRST_REF, 2), 1, "in use by the second")
    second.close()
    equal(xen.end_grants(holder, FIRST_REF, 2), 0, "in use by nobody")
    _not_mapped(xen, holder, FIRST_REF, 1, writable=False)


@case
def whoever_reads_an_ended_grant_does_not_come_to_write(
    xen: Hypervisor, make: ContractHost
) -> None:
    holder = _granter(make, 1)
    reading = xen.map_grants(holder, FIRST_REF, 1, writable=False)
    equal(xen.end_grants(holder, FIRST_REF, 1), 1, "in use")
    _not_mapped(xen, holder, FIRST_REF, 1, writable=True)
    reading.close()


@case
def a_reference_in_use_is_not_given_to_another(xen: Hypervisor, make: ContractHost) -> None:
    holder, other = _granter(make), make.bare()
    mapping = xen.map_grants(holder, FIRST_REF + 1, 1, writable=True)
    xen.end_grants(holder, FIRST_REF, 4)
    with raises(HypercallFailed, errno.EBUSY):
        xen.write_grants(holder, FIRST_REF, 4, HOLDER_GFN, other, readonly=False)
    mapping.close()
    xen.write_grants(holder, FIRST_REF, 4, HOLDER_GFN, other, readonly=False)
    equal(xen.end_grants(holder, FIRST_REF, 4), 0, "in use")


@case
def writing_grants_again_changes_nothing(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make)
    mapping = xen.map_grants(holder, FIRST_REF, 2, writable=True)
    xen.write_grants(holder, FIRST_REF, 4, HOLDER_GFN, DOMID_0, readonly=False)
    equal(xen.grants_in_use(holder, FIRST_REF, 4), 2, "in use")
    mapping.close()
    equal(xen.grants_in_use(holder, FIRST_REF, 4), 0, "in use afterwards")


@case
def a_table_grows_to_its_limit(xen: Hypervisor, make: ContractHost) -> None:
    holder = make.holder(600, nr_grant_frames=2)
    last = 2 * PER_FRAME - 600
    xen.write_grants(holder, last, 600, HOLDER_GFN, DOMID_0, readonly=True)
    make.write(holder, HOLDER_GFN + 599, b"the last")
    mapping = xen.map_grants(holder, last, 600, writable=False)
    equal(mapping.read(599 * 4096, 8), b"the last", "what is read")
    mapping.close()
    with raises(HypercallFailed, errno.EINVAL):
        xen.write_grants(holder, last + 1, 600, HOLDER_GFN, DOMID_0, readonly=True)


@case
def a_holder_that_serves_no_grants_has_one_frame_of_them(
    xen: Hypervisor, make: ContractHost
) -> None:
    holder = make.holder(1)
    xen.write_grants(holder, PER_FRAME - 1, 1, HOLDER_GFN, DOMID_0, readonly=True)
    with raises(HypercallFailed, errno.EINVAL):
        xen.write_grants(holder, PER_FRAME, 1, HOLDER_GFN, DOMID_0, readonly=True)


@case
def a_table_has_a_frame_at_least(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact(), raises(HypercallFailed, errno.EINVAL):
        make.bare(nr_grant_frames=0)


@case
def grants_of_an_unknown_domain(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.unused_domid()
    with raises(DomainGone, errno.ESRCH):
        xen.write_grants(domid, FIRST_REF, 1, HOLDER_GFN, DOMID_0, readonly=True)
    with raises(DomainGone, errno.ESRCH):
        xen.end_grants(domid, FIRST_REF, 1)
    _not_mapped(xen, domid, FIRST_REF, 1, writable=False)


@case
def a_page_that_is_mapped_by_a_grant_outlives_its_frame(
    xen: Hypervisor, make: ContractHost
) -> None:
    holder = _granter(make, 2)
    mapping = xen.map_grants(holder, FIRST_REF, 1, writable=True)
    make.xen.zero(holder, HOLDER_GFN, 2)
    equal(xen.depopulate(holder, HOLDER_GFN, 2), 2, "frames given up")
    equal(make.tot_pages(holder), 1, "the page that is mapped")
    mapping.write(0, bytes(16))
    mapping.close()
    equal(make.tot_pages(holder), 0, "none is")


@case
def who_has_a_page_mapped_maps_it_again_whatever_its_frame_is(
    xen: Hypervisor, make: ContractHost
) -> None:
    holder = _granter(make, 2)
    first = xen.map_grants(holder, FIRST_REF, 1, writable=True)
    first.write(0, b"the page")
    equal(xen.depopulate(holder, HOLDER_GFN, 1), 1, "frames given up")
    second = xen.map_grants(holder, FIRST_REF, 1, writable=True)
    equal(second.read(0, 8), b"the page", "what is read")
    second.write(0, bytes(8))
    second.close()
    first.close()
    _not_mapped(xen, holder, FIRST_REF, 1, writable=True)


@case
def a_dying_holder_grants_nothing_more(xen: Hypervisor, make: ContractHost) -> None:
    holder = _granter(make, 2)
    mapping = xen.map_grants(holder, FIRST_REF, 1, writable=True)
    make.destroy(holder)
    _not_mapped(xen, holder, FIRST_REF + 1, 1, writable=True)
    mapping.close()
    make.gone(holder)


@case
def a_holder_with_a_mapped_grant_lingers(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder = _granter(make, 2)
        mapping = xen.map_grants(holder, FIRST_REF, 1, writable=True)
        make.destroy(holder)
        expect(make.info(holder).dying, "dying")
        mapping.write(0, b"x")
        mapping.close()
        make.gone(holder)


@case
def a_table_that_has_grown_is_given_back(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder = make.holder(2, nr_grant_frames=64)
        xen.write_grants(holder, 64 * PER_FRAME - 2, 2, HOLDER_GFN, DOMID_0, readonly=True)
        make.destroy(holder)
        make.gone(holder)
