# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in a domain's pages, as the control domain sees it."""

from __future__ import annotations

import errno

from xshmd.errors import HypercallFailed
from xshmd.ports import Hypervisor
from xshmd.units import PAGE_SIZE, SUPERPAGE_FRAMES, Gfn, bytes_of

from ..host import GUEST_GFN, HOLDER_GFN, ContractHost, equal, expect, raises
from ..registry import case


@case
def zero_really_zeroes(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    xen.set_max_pages(domid, 3)
    xen.populate(domid, HOLDER_GFN, 3)
    for index in range(3):
        make.write(domid, HOLDER_GFN + index, b"\xee" * PAGE_SIZE)
    xen.zero(domid, HOLDER_GFN, 3)
    for index in range(3):
        equal(make.read(domid, HOLDER_GFN + index, PAGE_SIZE), bytes(PAGE_SIZE), "contents")


@case
def zero_touches_nothing_else(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(3)
    for index in range(3):
        make.write(domid, HOLDER_GFN + index, b"keep")
    xen.zero(domid, Gfn(HOLDER_GFN + 1), 1)
    found = [make.read(domid, HOLDER_GFN + index, 4) for index in range(3)]
    equal(found, [b"keep", bytes(4), b"keep"], "contents")


@case
def zero_of_many_windows(xen: Hypervisor, make: ContractHost) -> None:
    nr = 8200
    domid = make.holder(nr)
    for index in (0, 4095, 4096, 8191, 8192, nr - 1):
        make.write(domid, HOLDER_GFN + index, b"x")
    xen.zero(domid, HOLDER_GFN, nr)
    for index in (0, 4095, 4096, 8191, 8192, nr - 1):
        equal(make.read(domid, HOLDER_GFN + index, 1), b"\0", f"frame {index}")


@case
def zero_of_a_hole_fails(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    with raises(HypercallFailed):
        xen.zero(domid, HOLDER_GFN, 3)


@case
def what_is_written_is_read_across_pages(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    mapping = xen.map_pages(domid, HOLDER_GFN, 2, writable=True)
    mapping.write(PAGE_SIZE - 3, b"abcdef")
    equal(mapping.read(PAGE_SIZE - 3, 6), b"abcdef", "through the mapping")
    mapping.close()
    equal(make.read(domid, HOLDER_GFN + 1, 3), b"def", "second page")


@case
def two_mappings_are_the_same_memory(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(1)
    one = xen.map_pages(domid, HOLDER_GFN, 1, writable=True)
    other = xen.map_pages(domid, HOLDER_GFN, 1, writable=False)
    one.write(8, b"seen")
    equal(other.read(8, 4), b"seen", "contents")
    one.close()
    equal(other.read(8, 4), b"seen", "contents after the other was closed")
    other.close()
    other.close()


@case
def a_mapping_has_bounds(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(1)
    mapping = xen.map_pages(domid, HOLDER_GFN, 1, writable=True)
    for offset, count in ((PAGE_SIZE, 1), (-1, 1), (PAGE_SIZE - 1, 2)):
        try:
            mapping.read(offset, count)
        except ValueError:
            continue
        expect(False, f"{count} bytes at {offset} were read")
    mapping.close()
    try:
        mapping.read(0, 1)
    except ValueError:
        return
    expect(False, "a closed mapping was read")


@case
def map_pages_over_a_hole_fails(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(4)
    xen.depopulate(domid, Gfn(HOLDER_GFN + 2), 1)
    with raises(HypercallFailed, errno.EINVAL):
        xen.map_pages(domid, HOLDER_GFN, 4, writable=False)
    # and what was mapped of it is let go
    xen.depopulate(domid, HOLDER_GFN, 4)
    make.wait(lambda: make.tot_pages(domid) == 0, "the pages to be freed")


@case
def populated_frames_tells_which(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(3)
    xen.depopulate(domid, Gfn(HOLDER_GFN + 1), 1)
    asked = [Gfn(HOLDER_GFN + i) for i in (2, 1, 0, 3)]
    equal(xen.populated_frames(domid, asked), (asked[0], asked[2]), "present")


@case
def populated_frames_of_an_empty_domain(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.populated_frames(make.bare(), [HOLDER_GFN, Gfn(0)]), (), "present")


@case
def a_mapping_of_more_than_one_window(xen: Hypervisor, make: ContractHost) -> None:
    nr = 5000
    domid = make.holder(nr)
    mapping = xen.map_pages(domid, HOLDER_GFN, nr, writable=True)
    mapping.write(bytes_of(nr) - 4, b"last")
    mapping.close()
    equal(make.read(domid, HOLDER_GFN + nr - 1, 4, PAGE_SIZE - 4), b"last", "contents")


@case
def contents_outlive_their_frame(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(1)
    mapping = xen.map_pages(domid, HOLDER_GFN, 1, writable=True)
    mapping.write(0, b"kept")
    xen.depopulate(domid, HOLDER_GFN, 1)
    equal(mapping.read(0, 4), b"kept", "contents")
    mapping.close()


@case
def a_page_removed_from_the_p2m_keeps_its_contents(xen: Hypervisor, make: ContractHost) -> None:
    """It is found through whoever has it mapped, and nowhere else."""
    holder, guest = make.mapped(1)
    mapping = xen.map_pages(holder, HOLDER_GFN, 1, writable=True)
    xen.unmap(holder, HOLDER_GFN, 1)
    mapping.write(4, b"here")
    equal(mapping.read(4, 4), b"here", "contents")
    mapping.close()
    equal(make.tot_pages(holder), 1, "still the holder's")
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "still the guest's")


@case
def zeroing_reaches_the_end_of_a_superpage(xen: Hypervisor, make: ContractHost) -> None:
    domid, last = make.holder(SUPERPAGE_FRAMES), HOLDER_GFN + SUPERPAGE_FRAMES - 1
    make.write(domid, last, b"x", PAGE_SIZE - 1)
    xen.zero(domid, Gfn(last), 1)
    equal(make.read(domid, last, 1, PAGE_SIZE - 1), bytes(1), "last byte")
