# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies of lists of bytes within a domain: those bytes, in that order, and not one besides."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from xshmd.errors import DomainGone, HypercallFailed
from xshmd.ports import Hypervisor
from xshmd.ranges import ByteRange
from xshmd.units import DOMID_0, PAGE_SIZE, DomId, Gfn, bytes_of

from ..host import HOLDER_GFN, ContractHost, equal, raises
from ..registry import case

FRAMES = 12
FIRST_REF = 8
"""GNTTAB_NR_RESERVED_ENTRIES"""
START = bytes_of(HOLDER_GFN)


class Copy(Protocol):
    """:meth:`Hypervisor.copy_ranges`, and :meth:`Hypervisor.copy_granted` with free references."""

    def __call__(
        self,
        domid: DomId,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        /,
        *,
        count_at: int | None = None,
    ) -> int: ...


def both_ways(function: Callable[[Hypervisor, ContractHost, Copy], None]) -> None:
    """Add a case for the copy by dom0's mappings, and the same for Xen's copy by grants."""

    def by_maps(xen: Hypervisor, make: ContractHost) -> None:
        function(xen, make, xen.copy_ranges)

    def by_grants(xen: Hypervisor, make: ContractHost) -> None:
        def copy(
            domid: DomId,
            source: Sequence[ByteRange],
            target: Sequence[ByteRange],
            /,
            *,
            count_at: int | None = None,
        ) -> int:
            return xen.copy_granted(domid, FIRST_REF, source, target, count_at=count_at)

        function(xen, make, copy)

    for way in (by_maps, by_grants):
        way.__name__ = f"{function.__name__}_{way.__name__}"
        case(way)


def at(offset: int, count: int) -> ByteRange:
    """Bytes of the holder, by where they are in its pages."""
    return ByteRange(START + offset, count)


def filled(xen: Hypervisor, make: ContractHost, seed: int = 1) -> tuple[DomId, bytearray]:
    """A holder full of bytes that are known, and those bytes."""
    holder = make.holder(FRAMES, nr_grant_frames=2)
    data = random.Random(seed).randbytes(bytes_of(FRAMES))
    pages = xen.map_pages(holder, HOLDER_GFN, FRAMES, writable=True)
    pages.write(0, data)
    pages.close()
    return holder, bytearray(data)


def content(xen: Hypervisor, holder: DomId) -> bytes:
    pages = xen.map_pages(holder, HOLDER_GFN, FRAMES, writable=False)
    try:
        return pages.read(0, bytes_of(FRAMES))
    finally:
        pages.close()


@both_ways
def a_copy_is_exact_and_may_span_pages(xen: Hypervisor, make: ContractHost, copy: Copy) -> None:
    holder, wanted = filled(xen, make)
    copied = copy(holder, [at(4090, 20)], [at(5 * PAGE_SIZE - 7, 20)])
    equal(copied, 20, "bytes copied")
    wanted[5 * PAGE_SIZE - 7 : 5 * PAGE_SIZE + 13] = wanted[4090:4110]
    equal(content(xen, holder), bytes(wanted), "all bytes afterwards")


@both_ways
def lists_are_taken_one_after_the_other(xen: Hypervisor, make: ContractHost, copy: Copy) -> None:
    holder, wanted = filled(xen, make)
    source = [at(100, 3), at(4, 1), at(2 * PAGE_SIZE - 1, 5000), at(50, 7)]
    target = [at(9 * PAGE_SIZE, 2), at(6 * PAGE_SIZE + 1, 4001), at(8 * PAGE_SIZE - 4, 1008)]
    gathered = b"".join(
        bytes(wanted[each.offset_bytes - START :][: each.nr_bytes]) for each in source
    )
    equal(copy(holder, source, target), 5011, "bytes copied")
    for each in target:
        start = each.offset_bytes - START
        wanted[start : start + each.nr_bytes] = gathered[: each.nr_bytes]
        gathered = gathered[each.nr_bytes :]
    equal(content(xen, holder), bytes(wanted), "all bytes afterwards")


@both_ways
def the_shorter_list_decides(xen: Hypervisor, make: ContractHost, copy: Copy) -> None:
    holder, wanted = filled(xen, make)
    equal(copy(holder, [at(0, 10)], [at(PAGE_SIZE, 4)]), 4, "short room")
    wanted[PAGE_SIZE : PAGE_SIZE + 4] = wanted[:4]
    equal(copy(holder, [at(0, 3)], [at(2 * PAGE_SIZE, 400)]), 3, "short source")
    wanted[2 * PAGE_SIZE : 2 * PAGE_SIZE + 3] = wanted[:3]
    equal(content(xen, holder), bytes(wanted), "all bytes afterwards")


@both_ways
def ranges_in_one_frame(xen: Hypervisor, make: ContractHost, copy: Copy) -> None:
    holder, wanted = filled(xen, make)
    source = [at(10, 10), at(30, 10), at(20, 10)]
    equal(copy(holder, source, [at(200, 15), at(100, 15)]), 30, "bytes copied")
    gathered = bytes(wanted[10:20] + wanted[30:40] + wanted[20:30])
    wanted[200:215], wanted[100:115] = gathered[:15], gathered[15:]
    equal(content(xen, holder), bytes(wanted), "all bytes afterwards")


@both_ways
def the_count_is_written_when_it_is_wanted(xen: Hypervisor, make: ContractHost, copy: Copy) -> None:
    holder, wanted = filled(xen, make)
    place = 3 * PAGE_SIZE - 8
    copy(holder, [at(0, 300)], [at(512, 300)], count_at=START + place)
    wanted[512:812] = wanted[:300]
    wanted[place : place + 8] = (300).to_bytes(8, "little")
    equal(content(xen, holder), bytes(wanted), "all bytes afterwards")


@both_ways
def nothing_is_copied_if_a_frame_is_not_there(
    xen: Hypervisor, make: ContractHost, copy: Copy
) -> None:
    holder, wanted = filled(xen, make)
    hole = bytes_of(FRAMES)
    for source, target, count_at in (
        ([at(0, 8), at(hole, 8)], [at(64, 16)], None),
        ([at(0, 16)], [at(64, 8), at(hole - 4, 8)], None),
        ([at(0, 16)], [at(64, 16)], START + hole),
    ):
        with raises(HypercallFailed):
            copy(holder, source, target, count_at=count_at)
    equal(content(xen, holder), bytes(wanted), "all bytes afterwards")


@both_ways
def a_copy_leaves_no_mapping_behind(xen: Hypervisor, make: ContractHost, copy: Copy) -> None:
    with make.page_exact():
        holder, _ = filled(xen, make)
        copy(holder, [at(0, 9000)], [at(PAGE_SIZE * 6, 9000)], count_at=START + 9008)
        with raises(HypercallFailed):
            copy(holder, [at(0, 9)], [at(bytes_of(FRAMES), 9)])
        make.destroy(holder)
        make.gone(holder)


@both_ways
def copies_of_nobody_fail(xen: Hypervisor, make: ContractHost, copy: Copy) -> None:
    with raises(DomainGone):
        copy(make.unused_domid(), [at(0, 8)], [at(64, 8)])


@both_ways
def a_guest_sees_what_is_copied(xen: Hypervisor, make: ContractHost, copy: Copy) -> None:
    holder, guest = make.mapped(4, nr_grant_frames=2)
    make.write(holder, HOLDER_GFN, b"from here to there")
    copy(holder, [at(5, 4)], [at(2 * PAGE_SIZE, 4)])
    equal(make.read(holder, Gfn(HOLDER_GFN + 2), 6), b"here\0\0", "the holder's bytes")
    xen.unmap(guest, Gfn(0x80000), 4)


@case
def references_of_a_copy_are_free_again(xen: Hypervisor, make: ContractHost) -> None:
    holder, _ = filled(xen, make)
    xen.copy_granted(holder, FIRST_REF, [at(0, 9000)], [at(PAGE_SIZE * 6, 9000)])
    with raises(HypercallFailed):
        xen.copy_granted(holder, FIRST_REF, [at(0, 9)], [at(bytes_of(FRAMES), 9)])
    equal(xen.grants_in_use(holder, FIRST_REF, 6), 0, "in use")
    for ref in range(FIRST_REF, FIRST_REF + 6):
        with raises(HypercallFailed, errno.EINVAL):
            xen.map_grants(holder, ref, 1, writable=False)


@case
def references_of_others_are_not_used_for_a_copy(xen: Hypervisor, make: ContractHost) -> None:
    """Nor are they harmed, whether they are mapped or not."""
    holder, wanted = filled(xen, make)
    xen.write_grants(holder, FIRST_REF + 1, 1, HOLDER_GFN, DOMID_0, readonly=False)
    mapped = xen.map_grants(holder, FIRST_REF + 1, 1, writable=True)
    with raises(HypercallFailed, errno.EBUSY):
        xen.copy_granted(holder, FIRST_REF, [at(0, 8)], [at(64, 8)])
    equal(mapped.read(0, 8), bytes(wanted[:8]), "what is mapped")
    xen.map_grants(holder, FIRST_REF + 1, 1, writable=True).close()
    mapped.close()
    xen.end_grants(holder, FIRST_REF + 1, 1)
    xen.write_grants(holder, FIRST_REF + 1, 1, HOLDER_GFN, make.bare(), readonly=False)
    with raises(HypercallFailed, errno.EBUSY):
        xen.copy_granted(holder, FIRST_REF, [at(0, 8)], [at(64, 8)])
    equal(content(xen, holder), bytes(wanted), "all bytes afterwards")
    equal(xen.copy_granted(holder, FIRST_REF + 2, [at(0, 8)], [at(64, 8)]), 8, "bytes copied")


@case
def references_of_a_copy_are_in_the_table(xen: Hypervisor, make: ContractHost) -> None:
    holder, wanted = filled(xen, make)
    end = 2 * 512
    with raises(HypercallFailed, errno.EINVAL):
        xen.copy_granted(holder, end - 1, [at(0, 8)], [at(64, 8)])
    equal(xen.copy_granted(holder, end - 2, [at(0, 8)], [at(64, 8)]), 8, "bytes copied")
    wanted[64:72] = wanted[:8]
    equal(content(xen, holder), bytes(wanted), "all bytes afterwards")
