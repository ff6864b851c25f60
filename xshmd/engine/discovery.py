# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has a guest's own memory map say where its regions are, before the guest's first instruction.

Nothing here is a reason to refuse a guest: where it cannot be done, the guest's xenstore node and
the journal say so, and its kernel can be told by a ``memmap=`` argument.  An Arm guest has no such
map: its device tree is xl's (``device_tree=``).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

import structlog

from xshmd.engine import identity
from xshmd.errors import XshmError
from xshmd.machine import MemoryKind, MemoryRange
from xshmd.model import Guest
from xshmd.policy.memory_map import (
    ENTRY_BYTES,
    NR_ENTRIES_AT,
    START_INFO_BYTES,
    CannotReserve,
    MapTable,
    missing_entries,
    read_entries,
    read_start_info,
    write_entries,
)
from xshmd.ports import Hypervisor, PageMap
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, Gfn, address_of

log = structlog.get_logger()


def reserve_in_memory_map(xen: Hypervisor, guest: Guest) -> Guest:
    """Make a guest's regions reserved ranges of its memory map.

    May be done again: what is reserved already stays so.

    Args:
        xen: The hypervisor.
        guest: The guest; the toolstack has built it, and it has not run.

    Returns:
        The guest with ``reserved`` set: all of its regions, or none, and its map as it was.
    """
    try:
        register = xen.entry_register(guest.domid)
        if register is None:
            return guest
        _reserve(xen, guest, register)
    except (CannotReserve, XshmError) as reason:
        log.warning("memory map unchanged", guest=guest.name, domid=guest.domid, reason=str(reason))
        return guest
    reserved = tuple((request.first_gfn, request.nr_frames) for request in guest.requests)
    return dataclasses.replace(guest, reserved=reserved)


def _reserve(xen: Hypervisor, guest: Guest, start_info_at: int) -> None:
    if not 0 < start_info_at < 1 << 32 or start_info_at % PAGE_SIZE:
        raise CannotReserve(f"its first register says {start_info_at:#x}")
    regions = [
        MemoryRange(address_of(request.first_gfn), request.size_bytes, MemoryKind.RESERVED)
        for request in guest.requests
    ]
    start_info = _pages(xen, guest, start_info_at, START_INFO_BYTES)
    try:
        identity.verify(xen, guest)  # for as long as its page is mapped, its number is its own
        table = read_start_info(start_info.read(0, START_INFO_BYTES))
        entries = _extend(xen, guest, table, regions)
        xen.set_memory_map(guest.domid, entries)
        # Last, so that a guest that is let go in the middle has the map that libxl gave it.
        start_info.write(NR_ENTRIES_AT, struct.pack("<I", len(entries)))
    finally:
        start_info.close()


def _extend(
    xen: Hypervisor, guest: Guest, table: MapTable, regions: Sequence[MemoryRange]
) -> tuple[MemoryRange, ...]:
    """Write what is missing behind the map, which does not count yet; return the whole map."""
    size_bytes = (table.nr_entries + table.room) * ENTRY_BYTES
    pages = _pages(xen, guest, table.address, size_bytes)
    try:
        inside = table.address % PAGE_SIZE
        entries = read_entries(pages.read(inside, table.nr_entries * ENTRY_BYTES))
        added = missing_entries(entries, regions)
        if len(added) > table.room:
            raise CannotReserve(f"there is room for {table.room} more entries, not {len(added)}")
        at, data = inside + table.nr_entries * ENTRY_BYTES, write_entries(added)
        # libxl clears these pages: anything else there is something we know nothing of, unless it
        # is what an attempt that was cut off wrote.
        if pages.read(at, len(data)) not in (bytes(len(data)), data):
            raise CannotReserve("something follows its memory map")
        pages.write(at, data)
        return (*entries, *added)
    finally:
        pages.close()


def _pages(xen: Hypervisor, guest: Guest, address: int, size_bytes: int) -> PageMap:
    first, last = address >> PAGE_SHIFT, (address + size_bytes - 1) >> PAGE_SHIFT
    return xen.map_pages(guest.domid, Gfn(first), last - first + 1, writable=True)
