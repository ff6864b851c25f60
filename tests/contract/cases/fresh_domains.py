# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host, and what a domain is like as the holder's recipe makes it."""

from __future__ import annotations

import errno
from contextlib import suppress

from xshmd.errors import HypercallFailed
from xshmd.ports import Hypervisor
from xshmd.units import DomId, bytes_of

from ..host import GUEST_GFN, ContractHost, equal, expect, raises
from ..registry import case


@case
def host_info_adds_up(xen: Hypervisor, make: ContractHost) -> None:
    host = xen.host_info()
    expect(host.xen_version >= (4, 17), f"Xen {host.xen_version}")
    expect(0 < host.free_pages < host.total_pages, "free and total pages")
    expect(host.has_hvm and host.has_hap, "HVM and HAP")


@case
def dom0_is_listed_first(xen: Hypervisor, make: ContractHost) -> None:
    domains = xen.domains()
    equal(domains[0].domid, 0, "first domid")
    expect(not domains[0].paused and domains[0].cpu_time_ns > 0, "dom0 runs")
    equal([d.domid for d in domains], sorted(d.domid for d in domains), "order")


@case
def recipe_is_paused_and_has_vcpu_0(xen: Hypervisor, make: ContractHost) -> None:
    info = make.info(make.bare())
    expect(info.paused, "paused")
    equal(info.max_vcpu_id, 0, "max_vcpu_id")
    equal(info.cpu_time_ns, 0, "cpu time")
    expect(not info.shut_down and not info.dying, "alive")


@case
def recipe_is_hvm_and_hap(xen: Hypervisor, make: ContractHost) -> None:
    info = make.info(make.bare())
    expect(info.hvm and info.hap, "hvm and hap")
    expect(36 <= info.gpaddr_bits <= 52, f"gpaddr_bits {info.gpaddr_bits}")


@case
def recipe_owns_no_page_and_may_own_none(xen: Hypervisor, make: ContractHost) -> None:
    info = make.info(make.bare())
    equal(info.tot_pages, 0, "tot_pages")
    equal(info.max_pages, 0, "max_pages")


@case
def recipe_has_the_uuid_it_was_given(xen: Hypervisor, make: ContractHost) -> None:
    uuid = make.fresh_uuid()
    equal(make.info(make.bare(uuid)).uuid, uuid, "uuid")


@case
def two_domains_may_have_the_same_uuid(xen: Hypervisor, make: ContractHost) -> None:
    uuid = make.fresh_uuid()
    one, other = make.bare(uuid), make.bare(uuid)
    expect(one != other, "two domids")
    equal(make.info(one).uuid, make.info(other).uuid, "uuid")


@case
def domids_are_not_given_again_at_once(xen: Hypervisor, make: ContractHost) -> None:
    first = make.bare()
    make.destroy(first)
    make.gone(first)
    expect(make.bare() != first, "the same domid again")


@case
def domain_info_of_nobody_is_none(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.domain_info(make.unused_domid()), None, "info")


@case
def domain_info_is_exact_where_a_later_domain_exists(xen: Hypervisor, make: ContractHost) -> None:
    first, second = make.bare(), make.bare()
    make.destroy(first)
    make.gone(first)
    equal(xen.domain_info(first), None, "info of the hole")
    equal(make.info(second).domid, second, "domid after the hole")


@case
def domains_lists_each_scratch_domain_once(xen: Hypervisor, make: ContractHost) -> None:
    made = {make.bare() for _ in range(5)}
    listed = [info.domid for info in xen.domains() if info.domid in made]
    equal(sorted(listed), sorted(made), "listed")


@case
def more_domains_than_one_call_lists(xen: Hypervisor, make: ContractHost) -> None:
    made = [make.bare() for _ in range(66)]
    listed = [info.domid for info in xen.domains()]
    equal([domid for domid in listed if domid in made], made, "listed")


@case
def creation_and_destruction_are_page_exact(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        domid = make.bare()
        make.destroy(domid)
        make.gone(domid)


@case
def reserved_domids_never_reach_xen(xen: Hypervisor, make: ContractHost) -> None:
    for domid in (0x7FF0, 0x7FF2, 0x7FF4, -1):
        for call in (xen.pause, xen.domain_info, xen.destroy, xen.paging_pool_bytes):
            try:
                call(DomId(domid))
            except ValueError:
                continue
            expect(False, f"domid {domid:#x} was let through")


@case
def domids_go_up(xen: Hypervisor, make: ContractHost) -> None:
    """The next free one after the last that was given, also where one in between is in use."""
    made = [make.bare() for _ in range(4)]
    equal(made, sorted(made), "domids")
    make.destroy(made[1])
    make.gone(made[1])
    expect(make.bare() > made[3], "the next")


@case
def no_memory_for_a_domain(xen: Hypervisor, make: ContractHost) -> None:
    before = make.settle()
    rest = make.domain(64)
    make.hog(0)
    with suppress(HypercallFailed):
        xen.set_paging_pool_bytes(rest, bytes_of(before))  # all there is
    left = make.free_pages()
    with raises(HypercallFailed, errno.ENOMEM):
        make.bare()
    make.wait_free(left, "free pages")


@case
def dom0_has_vcpus(xen: Hypervisor, make: ContractHost) -> None:
    expect(xen.domains()[0].nr_online_vcpus >= 1, "dom0's vCPUs")
    equal(make.info(make.bare()).nr_online_vcpus, 0, "a holder's vCPUs that are up")


@case
def a_fresh_domain_is_no_ones_and_has_no_reason(xen: Hypervisor, make: ContractHost) -> None:
    info = make.info(make.bare())
    equal(info.shutdown_reason, 0xFF, "reason")
    equal(xen.unmap(info.domid, GUEST_GFN, 8), 0, "mapped")
