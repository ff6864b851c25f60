# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libxl leaves in an x86 guest's memory before it runs: its start info, with a memory map.

As ``bootlate_hvm()`` in tools/libs/guest/xg_dom_x86.c does it, for PVH and HVM.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from fakes.hypervisor import SimulatedXen
from xshmd.machine import MemoryRange
from xshmd.policy.memory_map import write_entries
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn

START_INFO = 0x5000


def put(xen: SimulatedXen, domid: DomId, address: int, data: bytes) -> None:
    """Write into a domain's memory."""
    first, last = address >> PAGE_SHIFT, (address + len(data) - 1) >> PAGE_SHIFT
    pages = xen.map_pages(domid, Gfn(first), last - first + 1, writable=True)
    try:
        pages.write(address % PAGE_SIZE, data)
    finally:
        pages.close()


def write_start_info(
    xen: SimulatedXen, domid: DomId, ranges: Sequence[MemoryRange], *, map_at: int = 0x5878
) -> None:
    """Tell the guest and Xen that this is the guest's memory.

    Args:
        xen: The model.
        domid: The guest; it has pages where the start info and the map go.
        ranges: Its memory map.
        map_at: Where in its memory that goes.
    """
    for gfn in {START_INFO >> PAGE_SHIFT, map_at >> PAGE_SHIFT}:
        put(xen, domid, gfn << PAGE_SHIFT, bytes(PAGE_SIZE))  # xc_dom_alloc_segment() clears them
    header = (0x336EC578, 1, 0, 0, 0, 0, 0, map_at, len(ranges), 0)
    put(xen, domid, START_INFO, struct.pack("<IIIIQQQQII", *header))
    put(xen, domid, map_at, write_entries(ranges))
    xen.set_memory_map(domid, ranges)
    xen.by_domid[domid].entry_register = START_INFO


def memory_map_by_start_info(xen: SimulatedXen, domid: DomId) -> tuple[MemoryRange, ...]:
    """Return the map that a PVH guest would read."""
    pages = xen.map_pages(domid, Gfn(0), 8, writable=False)
    try:
        address, nr_entries = struct.unpack("<QI", pages.read(START_INFO + 40, 12))
        entries = struct.iter_unpack("<QQII", pages.read(address, nr_entries * 24))
        return tuple(MemoryRange(start, size, kind) for start, size, kind, _ in entries)
    finally:
        pages.close()
