# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory tables: which can be meant, what of them can be reached, and that nothing is left."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
from descriptors import open_fds
from fakes.xen_devices import XenDevices

from xshmd.units import DOMID_FIRST_RESERVED, DomId, Gfn
from xshmd.vhost_user import table
from xshmd.vhost_user.memory import MAX_PLAIN_BYTES, CannotMap, Memory, OutsideMemory
from xshmd.vhost_user.payloads import MemoryRegion, XenFlag
from xshmd.vhost_user.wire import ProtocolViolation
from xshmd.xen import device_maps
from xshmd.xen.windows import Window

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

PAGE = 4096
AT = 0x3A000000
HOLDER = DomId(5)
PLAIN = MemoryRegion(guest_address=AT, size_bytes=4 * PAGE, user_address=0x7F0000000000)
FOREIGN = dataclasses.replace(PLAIN, xen_flags=XenFlag.FOREIGN, domid=HOLDER)
GRANTED = dataclasses.replace(
    PLAIN, guest_address=(1 << 63) | 8 * PAGE, xen_flags=XenFlag.GRANT, domid=HOLDER
)


@pytest.fixture
def devices() -> Iterator[XenDevices]:
    found = XenDevices()
    yield found
    found.close()


def memfd(size_bytes: int = 8 * PAGE) -> int:
    fd = os.memfd_create("plain")
    os.ftruncate(fd, size_bytes)
    return fd


# -- descriptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (PLAIN, {"size_bytes": 0}, "is empty"),
        (PLAIN, {"guest_address": (1 << 64) - PAGE}, "ends past"),
        (PLAIN, {"user_address": (1 << 64) - PAGE}, "ends past"),
        (PLAIN, {"mmap_offset": (1 << 63) - PAGE}, "ends past"),
        (FOREIGN, {"xen_flags": XenFlag.FOREIGN | XenFlag.GRANT}, "Xen flags 0x3"),
        (FOREIGN, {"xen_flags": XenFlag(0x11)}, "Xen flags 0x11"),
        (FOREIGN, {"xen_flags": XenFlag.NO_ADVANCE_MAP}, "plain memory"),
        (FOREIGN, {"xen_flags": XenFlag(0x8)}, "plain memory"),
        (FOREIGN, {"domid": DOMID_FIRST_RESERVED}, "which is none"),
        (FOREIGN, {"domid": 0xFFFFFFFF}, "which is none"),
        (FOREIGN, {"guest_address": AT + 1}, "whole frames"),
        (FOREIGN, {"size_bytes": PAGE + 1}, "whole frames"),
        (FOREIGN, {"mmap_offset": 1}, "whole frames"),
        (FOREIGN, {"guest_address": 1 << 52}, "no domain has memory"),
        (FOREIGN, {"mmap_offset": 1 << 52}, "no domain has memory"),
        (GRANTED, {"mmap_offset": PAGE}, "cannot be"),
        (GRANTED, {"guest_address": (1 << 63) | ((1 << 44) - PAGE)}, "cannot be"),
    ],
)
def test_a_description_that_cannot_be_meant(
    base: MemoryRegion, change: dict[str, Any], says: str
) -> None:
    table.check(base)
    with pytest.raises(ProtocolViolation, match=says):
        table.check(dataclasses.replace(base, **change))


def test_what_is_said_of_xen_counts_with_xen_alone() -> None:
    table.check(dataclasses.replace(PLAIN, guest_address=AT + 1, mmap_offset=3), xen=False)


@pytest.mark.parametrize("flag", [0x100, 0x8, 0x108])
@pytest.mark.parametrize("base", [FOREIGN, GRANTED])
def test_both_ways_to_say_not_in_advance(base: MemoryRegion, flag: int) -> None:
    region = dataclasses.replace(base, xen_flags=base.xen_flags | XenFlag(flag))
    table.check(region)
    assert base.in_advance
    assert not region.in_advance


@pytest.mark.parametrize(
    ("guest_address", "user_address", "overlaps"),
    [
        (AT + 4 * PAGE, PLAIN.user_address + 4 * PAGE, False),
        (AT - 4 * PAGE, PLAIN.user_address - 4 * PAGE, False),
        (AT + 3 * PAGE, 0, True),
        (AT - 3 * PAGE, 0, True),
        (0, PLAIN.user_address + 4 * PAGE - 1, True),
        (0, PLAIN.user_address, True),
    ],
)
def test_overlaps(guest_address: int, user_address: int, overlaps: bool) -> None:
    other = dataclasses.replace(PLAIN, guest_address=guest_address, user_address=user_address)
    if overlaps:
        with pytest.raises(ProtocolViolation, match="overlaps"):
            table.check_table([PLAIN, other])
    else:
        table.check_table([PLAIN, other])


# -- mapping ------------------------------------------------------------------------------------


def test_plain_memory_is_the_files() -> None:
    fd = memfd()
    os.pwrite(fd, b"from the front-end", 3 * PAGE + 5)
    memory = Memory()
    region = dataclasses.replace(PLAIN, mmap_offset=PAGE)
    before = open_fds()
    memory.replace([region], [os.dup(fd)], xen=False)
    assert open_fds() == before, "what is mapped needs its descriptor no more"
    assert bytes(memory.view(AT + 2 * PAGE + 5, 18)) == b"from the front-end"
    assert bytes(memory.view_user(PLAIN.user_address + 2 * PAGE + 5, 4)) == b"from"
    with memory.access(AT, 4) as view:
        view[:] = b"back"
    assert os.pread(fd, 4, PAGE) == b"back"
    memory.close()
    memory.close()
    os.close(fd)


def test_an_offset_need_not_be_aligned() -> None:
    fd = memfd()
    os.pwrite(fd, b"here", PAGE + 100)
    memory = Memory()
    memory.add(dataclasses.replace(PLAIN, mmap_offset=PAGE + 100), [fd], xen=False)
    assert bytes(memory.view(AT, 4)) == b"here"
    memory.close()


def test_foreign_memory_is_the_domains(devices: XenDevices) -> None:
    frames = devices.put(HOLDER, Gfn(AT >> 12), 16)
    os.pwrite(frames, b"the guest's", 2 * PAGE)
    memory = Memory(devices=devices)
    memory.replace([FOREIGN], [devices.open(HOLDER)], xen=True)
    assert bytes(memory.view(AT + 2 * PAGE, 11)) == b"the guest's"
    memory.view(AT, 2)[:] = b"ok"
    assert os.pread(frames, 2, 0) == b"ok"
    memory.close()


def test_an_offset_is_where_in_the_domain(devices: XenDevices) -> None:
    """The guest's address is one thing, the address in the domain that has the page another."""
    os.pwrite(devices.put(HOLDER, Gfn(0x40200), 8), b"here", PAGE)
    memory = Memory(devices=devices)
    region = dataclasses.replace(FOREIGN, mmap_offset=0x40201000)
    memory.add(region, [devices.open()], xen=True)
    assert bytes(memory.view(AT, 4)) == b"here"
    memory.close()


def test_a_device_that_is_restricted_to_another_domain(devices: XenDevices) -> None:
    devices.put(HOLDER, Gfn(AT >> 12), 16)
    memory = Memory(devices=devices)
    with pytest.raises(CannotMap, match="domain 5"):
        memory.replace([FOREIGN], [devices.open(DomId(6))], xen=True)
    assert memory.regions == ()


@pytest.mark.parametrize("flag", [XenFlag.NO_ADVANCE_MAP, XenFlag.NO_ADVANCE_MAP_RUST_VMM])
def test_not_in_advance_means_only_while_it_is_used(devices: XenDevices, flag: XenFlag) -> None:
    references = devices.put(HOLDER, Gfn(8), 4)
    os.pwrite(references, b"across a border", PAGE - 4)
    memory = Memory(devices=devices)
    region = dataclasses.replace(GRANTED, xen_flags=XenFlag.GRANT | flag)
    memory.add(region, [devices.open()], xen=True)
    with pytest.raises(CannotMap, match="not to be mapped in advance"):
        memory.view(GRANTED.guest_address, 4)
    with memory.access(GRANTED.guest_address + PAGE - 4, 15) as view:
        assert bytes(view) == b"across a border"
        view[:6] = b"ACROSS"
    assert bytes(view) == bytes(15), "it is unmapped once it is not used"
    assert os.pread(references, 15, PAGE - 4) == b"ACROSS a border"
    devices.take(HOLDER)
    with (
        pytest.raises(CannotMap, match="domain 5"),
        memory.access(GRANTED.guest_address, 4) as view,
    ):
        pass
    memory.close()


def test_an_empty_access_of_what_is_not_mapped(devices: XenDevices) -> None:
    devices.put(HOLDER, Gfn(8), 4)
    memory = Memory(devices=devices)
    flags = XenFlag.GRANT | XenFlag.NO_ADVANCE_MAP
    memory.add(dataclasses.replace(GRANTED, xen_flags=flags), [devices.open()], xen=True)
    with memory.access(GRANTED.guest_address, 0) as view:
        assert bytes(view) == b""
    memory.close()


@pytest.mark.parametrize(
    ("address", "size_bytes"),
    [(AT - 1, 2), (AT + 4 * PAGE - 1, 2), (AT, 4 * PAGE + 1), (0, 1), (1 << 64, 1), (AT, -1)],
)
def test_nothing_outside_the_table_is_reached(address: int, size_bytes: int) -> None:
    memory = Memory()
    memory.replace([PLAIN], [memfd()], xen=False)
    for reach in (memory.view, memory.view_user):
        with pytest.raises(OutsideMemory):
            reach(address, size_bytes)
    with pytest.raises(OutsideMemory), memory.access(address, size_bytes):
        pass
    memory.close()


def test_pieces_of_neighbours() -> None:
    after = dataclasses.replace(PLAIN, guest_address=AT + 4 * PAGE, user_address=0)
    memory = Memory()
    memory.replace([PLAIN, after], [memfd(), memfd()], xen=False)
    assert memory.pieces(AT + 4 * PAGE - 8, 16) == [(AT + 4 * PAGE - 8, 8), (AT + 4 * PAGE, 8)]
    assert memory.pieces(AT, 0) == []
    with pytest.raises(OutsideMemory):
        memory.pieces(AT + 8 * PAGE - 1, 2)
    memory.close()


def test_views_outlive_the_memory_and_show_nothing() -> None:
    fd = memfd()
    memory = Memory()
    memory.add(PLAIN, [os.dup(fd)], xen=False)
    view = memory.view(AT, 4)
    view[:] = b"data"
    memory.remove(PLAIN)
    assert bytes(view) == bytes(4)
    view[:] = b"lost"
    assert os.pread(fd, 4, 0) == b"data"
    os.close(fd)


def test_a_file_that_is_too_short() -> None:
    memory = Memory()
    with pytest.raises(CannotMap, match="ends at byte 16384 of a file of 16383"):
        memory.add(PLAIN, [memfd(4 * PAGE - 1)], xen=False)
    assert memory.regions == ()


def test_a_descriptor_that_cannot_be_mapped() -> None:
    read, write = os.pipe()
    os.close(write)
    memory = Memory()
    with pytest.raises(CannotMap, match="cannot be mapped"):
        memory.add(PLAIN, [read], xen=False)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_descriptors(count: int) -> None:
    other = dataclasses.replace(PLAIN, guest_address=0, user_address=0)
    memory = Memory()
    with pytest.raises(ProtocolViolation, match=f"{count} file descriptors"):
        memory.replace([PLAIN, other], [memfd() for _ in range(count)], xen=False)
    if count != 1:
        with pytest.raises(ProtocolViolation, match=f"{count} file descriptors"):
            memory.add(PLAIN, [memfd() for _ in range(count)], xen=False)


def test_a_table_that_cannot_be_mapped_as_a_whole_is_not_at_all() -> None:
    short = dataclasses.replace(PLAIN, guest_address=0, user_address=0)
    memory = Memory()
    memory.replace([PLAIN], [memfd()], xen=False)
    with pytest.raises(CannotMap):
        memory.replace([PLAIN, short], [memfd(), memfd(PAGE)], xen=False)
    assert memory.regions == ()


def test_a_wrong_table_changes_nothing() -> None:
    memory = Memory()
    memory.replace([PLAIN], [memfd()], xen=False)
    with pytest.raises(ProtocolViolation):
        memory.replace([PLAIN, PLAIN], [memfd(), memfd()], xen=False)
    assert list(memory.regions) == [PLAIN]
    with pytest.raises(ProtocolViolation, match="no region at"):
        memory.remove(dataclasses.replace(PLAIN, user_address=0))
    memory.remove(dataclasses.replace(PLAIN, mmap_offset=7))
    assert not memory.regions


def test_there_is_a_limit_to_domains_memory(devices: XenDevices) -> None:
    devices.put(HOLDER, Gfn(AT >> 12), 16)
    memory = Memory(max_xen_bytes=6 * PAGE, devices=devices)
    memory.add(FOREIGN, [devices.open()], xen=True)
    more = dataclasses.replace(FOREIGN, guest_address=AT + 4 * PAGE, user_address=0)
    with pytest.raises(ProtocolViolation, match="32768 bytes of domains' memory"):
        memory.add(more, [devices.open()], xen=True)
    memory.close()


def test_there_is_a_limit_to_plain_memory() -> None:
    """A file with nothing in it costs a front-end nothing, and us addresses that others need."""
    half = dataclasses.replace(PLAIN, size_bytes=MAX_PLAIN_BYTES // 2, user_address=0)
    other = dataclasses.replace(half, guest_address=1 << 50, user_address=1 << 50)
    more = dataclasses.replace(PLAIN, guest_address=1 << 60, user_address=1 << 60)
    memory = Memory()
    memory.replace([half, other], [memfd(half.size_bytes) for _ in range(2)], xen=False)
    for xen in (False, True):
        with pytest.raises(ProtocolViolation, match="bytes of plain memory"):
            memory.add(more, [memfd()], xen=xen)
    memory.close()


# -- the real devices, as far as they need no Xen -----------------------------------------------


def test_only_the_device_itself_will_do() -> None:
    """A descriptor is looked at before any ioctl: the same number means other things elsewhere."""
    region = dataclasses.replace(FOREIGN, size_bytes=PAGE)
    memory = Memory()
    for asked in (region, dataclasses.replace(GRANTED, size_bytes=PAGE)):
        with pytest.raises(CannotMap):
            memory.add(asked, [memfd()], xen=True)


def test_the_numbers_of_the_ioctls() -> None:
    """As the kernel's headers give them on 64-bit machines."""
    assert device_maps._MMAPBATCH_V2 == 0x205004
    assert device_maps._RESTRICT == 0x025006
    assert device_maps._MAP_GRANT_REF == 0x184700
    assert device_maps._UNMAP_GRANT_REF == 0x104701


def test_a_window_is_never_left_with_half_of_something() -> None:
    with Window(2 * PAGE) as window:
        window.view()[:4] = b"here"
        with pytest.raises(OSError, match="Bad file"):
            window.place(-1 & 0xFFFF)
        assert bytes(window.view(0, 4)) == bytes(4)
        with pytest.raises(ValueError, match="outside"):
            window.view(PAGE, PAGE + 1)
