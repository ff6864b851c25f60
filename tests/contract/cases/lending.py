# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cases that are about dom0's own memory, with dom0 in the part of the guest as well."""

from __future__ import annotations

import errno
import time

from xshmd.errors import HypercallFailed
from xshmd.ports import Hypervisor, LentPages
from xshmd.units import DOMID_0, PAGE_SIZE

from ..host import ContractHost, equal, expect, raises
from ..registry import case

NR = 5
LATER_S = 15.0
"""When dom0's kernel has looked again at what it could not take back: it does each second."""


def _is_gone(xen: Hypervisor, pages: LentPages) -> bool:
    try:
        xen.map_grants(DOMID_0, pages.refs[0], 1, writable=False).close()
    except HypercallFailed as error:
        return error.errno == errno.EINVAL
    return False


def _await_gone(xen: Hypervisor, pages: LentPages) -> None:
    deadline = time.monotonic() + LATER_S
    while not _is_gone(xen, pages):
        expect(time.monotonic() < deadline, "it can be mapped for ever")
        time.sleep(0.1)


@case
def both_sides_of_lent_pages_are_the_same_memory(xen: Hypervisor, make: ContractHost) -> None:
    pages = xen.lend_pages(DOMID_0, NR, readonly=False)
    expect(list(pages.refs) == sorted(set(pages.refs)), f"references do not rise: {pages.refs}")
    equal(len(pages.refs), NR, "references")
    equal(pages.read(0, NR * PAGE_SIZE), bytes(NR * PAGE_SIZE), "fresh pages")
    pages.write(PAGE_SIZE - 3, b"across")
    for frame, ref in enumerate(pages.refs):
        other = xen.map_grants(DOMID_0, ref, 1, writable=True)
        if frame < 2:
            found = other.read(PAGE_SIZE - 3, 3) if frame == 0 else other.read(0, 3)
            equal(found, b"acr" if frame == 0 else b"oss", f"frame {frame}")
        other.write(8, bytes([frame]))
        other.close()
        equal(pages.read(frame * PAGE_SIZE + 8, 1), bytes([frame]), f"what is written to {frame}")
    pages.wipe()
    equal(pages.read(0, NR * PAGE_SIZE), bytes(NR * PAGE_SIZE), "wiped pages")
    pages.close()
    pages.close()
    _await_gone(xen, pages)


@case
def pages_lent_for_reading_are_not_mapped_writable(xen: Hypervisor, make: ContractHost) -> None:
    pages = xen.lend_pages(DOMID_0, 1, readonly=True)
    with raises(HypercallFailed, errno.EINVAL):
        xen.map_grants(DOMID_0, pages.refs[0], 1, writable=True)
    pages.write(0, b"to be read")
    other = xen.map_grants(DOMID_0, pages.refs[0], 1, writable=False)
    equal(other.read(0, 10), b"to be read", "what is read")
    other.close()
    pages.close()
    _await_gone(xen, pages)


@case
def pages_are_lent_to_one_domain(xen: Hypervisor, make: ContractHost) -> None:
    pages = xen.lend_pages(make.bare(), 1, readonly=False)
    with raises(HypercallFailed, errno.EINVAL):
        xen.map_grants(DOMID_0, pages.refs[0], 1, writable=False)
    pages.close()


@case
def what_is_mapped_stays_when_it_is_lent_no_more(xen: Hypervisor, make: ContractHost) -> None:
    """And may be mapped again, by that domain, until it has unmapped it."""
    pages = xen.lend_pages(DOMID_0, 1, readonly=False)
    pages.write(0, b"kept")
    other = xen.map_grants(DOMID_0, pages.refs[0], 1, writable=True)
    pages.close()
    equal(other.read(0, 4), b"kept", "what stays")
    xen.map_grants(DOMID_0, pages.refs[0], 1, writable=True).close()
    equal(other.read(0, 4), b"kept", "what stays afterwards")
    other.write(0, bytes(4))
    other.close()
    _await_gone(xen, pages)


@case
def no_more_is_lent_than_may_be(xen: Hypervisor, make: ContractHost) -> None:
    limit = xen.lendable_frames()
    expect(limit > NR, f"dom0's kernel lends {limit} pages")
    with raises(HypercallFailed, errno.ENOSPC):
        xen.lend_pages(DOMID_0, limit + 1, readonly=False)
    first = xen.lend_pages(DOMID_0, limit - 1, readonly=False)
    with raises(HypercallFailed, errno.ENOSPC):
        xen.lend_pages(DOMID_0, 2, readonly=False)
    first.close()
    xen.lend_pages(DOMID_0, 2, readonly=False).close()
