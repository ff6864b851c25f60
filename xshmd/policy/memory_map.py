# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory map that an x86 guest is started with, and how regions become reserved ranges of it.

An operating system that does not know of a region would take its place for free.  Linux is one to
put grant pages at the lowest free address, and it heeds reserved ranges there only where it finds
PCI (``e820__reserve_resources_late()`` is called by ``pcibios_resource_survey()``): for a PVH guest
a place that is high enough matters as much, see :mod:`xshmd.policy.layout`.

libxl writes the map twice, into the guest's start info (which PVH guests read) and into Xen for
XENMEM_memory_map (which hvmloader reads), and both are the same for PVH and HVM
(``bootlate_hvm()`` in tools/libs/guest/xg_dom_x86.c, ``domain_construct_memmap()`` in
tools/libs/light/libxl_x86.c).  So the one in the start info is read, and both are replaced.

The start info's layout is xen/include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from xshmd.machine import MemoryKind, MemoryRange
from xshmd.units import PAGE_SIZE

START_INFO_BYTES: Final = 56
ENTRY_BYTES: Final = 24
MAX_ENTRIES: Final = 24
"""hvmloader adds up to seven of its own, and SeaBIOS keeps 32 (BUILD_MAX_E820)."""
NR_ENTRIES_AT: Final = 48
"""Where in the start info the number of entries is: 32 bits."""

_MAGIC: Final = 0x336EC578
_START_INFO: Final = struct.Struct("<IIIIQQQQII")
_ENTRY: Final = struct.Struct("<QQII")
_HVMLOADERS: Final = MemoryRange(0xFC000000, 0x4000000, MemoryKind.RESERVED)
"""hvmloader stops at a reserved range of somebody else's in here (its memory_map_setup())."""


class CannotReserve(Exception):
    """Why a guest's memory map is left as it is; no reason to refuse the guest."""


@dataclasses.dataclass(frozen=True, slots=True)
class MapTable:
    """Where a guest's memory map is in its memory."""

    address: int
    nr_entries: int

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.address + self.nr_entries * ENTRY_BYTES

    @property
    def room(self) -> int:
        """How many entries can follow in the page it ends in; the page belongs to it alone."""
        return -self.end % PAGE_SIZE // ENTRY_BYTES if self.nr_entries else 0


def read_start_info(data: bytes) -> MapTable:
    """Find the map by the start info, of which ``data`` is the beginning.

    Raises:
        CannotReserve: it is not a start info, or has no map.
    """
    magic, version, *_, address, nr_entries, _ = _START_INFO.unpack(data[:START_INFO_BYTES])
    if magic != _MAGIC:
        raise CannotReserve(f"its start info begins with {magic:#x} instead of {_MAGIC:#x}")
    if version < 1 or not address or not nr_entries:
        raise CannotReserve(f"its start info, of version {version}, has no memory map")
    if nr_entries > MAX_ENTRIES or address >= 1 << 32:
        raise CannotReserve(f"its start info says {nr_entries} entries at {address:#x}")
    return MapTable(address, nr_entries)


def read_entries(data: bytes) -> tuple[MemoryRange, ...]:
    """Read as many entries as there are in ``data``."""
    whole = len(data) // ENTRY_BYTES * ENTRY_BYTES
    return tuple(
        MemoryRange(address, size_bytes, kind)
        for address, size_bytes, kind, _ in _ENTRY.iter_unpack(data[:whole])
    )


def write_entries(entries: Iterable[MemoryRange]) -> bytes:
    """Return entries as they stand in a guest's memory."""
    return b"".join(
        _ENTRY.pack(entry.address, entry.size_bytes, entry.kind, 0) for entry in entries
    )


def missing_entries(
    entries: Sequence[MemoryRange], regions: Iterable[MemoryRange]
) -> tuple[MemoryRange, ...]:
    """Return what has to be added to a map for all of these ranges to be reserved.

    Raises:
        CannotReserve: the map says otherwise of such a range, or gets too long.
    """
    added: list[MemoryRange] = []
    for region in regions:
        if _overlap(region, _HVMLOADERS):
            raise CannotReserve(f"{region.address:#x} lies where hvmloader keeps its own")
        there = [entry for entry in entries if _overlap(entry, region)]
        if any(entry.kind != MemoryKind.RESERVED for entry in there):
            raise CannotReserve(f"its map has something else at {region.address:#x} already")
        if not any(entry.address <= region.address and region.end <= entry.end for entry in there):
            added.append(region)
    if len(entries) + len(added) > MAX_ENTRIES:
        raise CannotReserve(
            f"a map of {len(entries) + len(added)} entries is more than firmware can hold"
        )
    return tuple(added)


def _overlap(one: MemoryRange, other: MemoryRange) -> bool:
    return one.address < other.end and other.address < one.end
