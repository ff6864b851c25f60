# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is added to a guest's memory map, and when it is better left alone."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.machine import MemoryKind, MemoryRange
from xshmd.policy.memory_map import (
    ENTRY_BYTES,
    MAX_ENTRIES,
    NR_ENTRIES_AT,
    START_INFO_BYTES,
    CannotReserve,
    MapTable,
    missing_entries,
    read_entries,
    read_start_info,
    write_entries,
)

RAM = MemoryRange(0, 0x8000000, MemoryKind.RAM)
SPECIAL = MemoryRange(0xFEFF8000, 0x8000, MemoryKind.RESERVED)
AT = 0x10_0000_0000
REGION = MemoryRange(AT, 0x100000, MemoryKind.RESERVED)
RANGES = st.builds(
    MemoryRange, st.integers(0, 1 << 48), st.integers(1, 1 << 40), st.integers(0, 1 << 31)
)


def start_info(
    magic: int = 0x336EC578, version: int = 1, address: int = 0x5878, nr_entries: int = 3
) -> bytes:
    return struct.pack("<IIIIQQQQII", magic, version, 0, 0, 0, 0, 0, address, nr_entries, 0)


def test_the_layout_is_that_of_xens_header() -> None:
    assert len(start_info()) == START_INFO_BYTES
    assert start_info(nr_entries=7)[NR_ENTRIES_AT : NR_ENTRIES_AT + 4] == b"\x07\0\0\0"
    assert len(write_entries([RAM])) == ENTRY_BYTES
    assert read_start_info(start_info() + b"whatever follows") == MapTable(0x5878, 3)


@given(st.lists(RANGES, max_size=5), st.binary(max_size=ENTRY_BYTES - 1))
def test_entries_there_and_back(entries: list[MemoryRange], rest: bytes) -> None:
    assert read_entries(write_entries(entries) + rest) == tuple(entries)


@pytest.mark.parametrize(
    "data",
    [
        start_info(magic=0),
        start_info(version=0),
        start_info(address=0),
        start_info(nr_entries=0),
        start_info(nr_entries=MAX_ENTRIES + 1),
        start_info(address=1 << 32),
    ],
)
def test_what_is_no_start_info_with_a_map(data: bytes) -> None:
    with pytest.raises(CannotReserve):
        read_start_info(data)


@pytest.mark.parametrize(
    ("address", "nr_entries", "room"),
    [(0x1000, 1, 169), (0x1FE8, 1, 0), (0x1FD0, 1, 1), (0x1FE8, 2, 169), (0x1FE0, 1, 0)],
)
def test_room_is_in_the_page_it_ends_in(address: int, nr_entries: int, room: int) -> None:
    assert MapTable(address, nr_entries).room == room


def test_only_what_is_missing_is_added() -> None:
    beside = MemoryRange(AT + 0x100000, 0x1000, MemoryKind.RESERVED)
    assert missing_entries([RAM, SPECIAL], [REGION, beside]) == (REGION, beside)
    assert missing_entries([RAM, SPECIAL, REGION], [REGION, beside]) == (beside,)
    wide = MemoryRange(AT - 0x1000, 0x200000, MemoryKind.RESERVED)
    assert missing_entries([RAM, wide], [REGION, beside]) == ()


@pytest.mark.parametrize("kind", [MemoryKind.RAM, MemoryKind.ACPI, MemoryKind.NVS, 99])
def test_a_region_where_the_map_has_something_else(kind: int) -> None:
    there = MemoryRange(AT + 0xFF000, 0x1000, kind)
    with pytest.raises(CannotReserve, match="something else"):
        missing_entries([RAM, there], [REGION])


def test_a_part_that_is_reserved_does_not_do() -> None:
    part = MemoryRange(AT, 0x1000, MemoryKind.RESERVED)
    assert missing_entries([RAM, part], [REGION]) == (REGION,)


@pytest.mark.parametrize("address", [0xFC000000, 0xFBFFF000, 0xFFF00000])
def test_where_hvmloader_would_stop(address: int) -> None:
    with pytest.raises(CannotReserve, match="hvmloader"):
        missing_entries([RAM], [MemoryRange(address, 0x100000, MemoryKind.RESERVED)])


def test_no_more_than_firmware_can_hold() -> None:
    regions = [
        MemoryRange(AT + number * 0x2000, 0x1000, MemoryKind.RESERVED)
        for number in range(MAX_ENTRIES)
    ]
    assert missing_entries([RAM], regions[1:]) == tuple(regions[1:])
    with pytest.raises(CannotReserve, match="firmware"):
        missing_entries([RAM], regions)
