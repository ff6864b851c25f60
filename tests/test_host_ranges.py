# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which of a machine's memory may be given to guests: found in sysfs, decided range by range."""

from __future__ import annotations

from pathlib import Path

import pytest

from xshmd.errors import Refused
from xshmd.machine import HostRange, MemoryKind, MemoryRange
from xshmd.model import Place
from xshmd.policy.host_ranges import check_shareable, why_not_shareable
from xshmd.units import Mfn
from xshmd.xen.host_ranges import find_host_ranges

PREFETCHABLE, PLAIN = 0x14220C, 0x40200
BAR = 0xC000000000
NOTHING = "0x0000000000000000 0x0000000000000000 0x0000000000000000"
MACHINE = (
    MemoryRange(0, 0x9FC00, MemoryKind.RAM),
    MemoryRange(0x9FC00, 0x400, MemoryKind.RESERVED),
    MemoryRange(0x100000, 0x7FF00000, MemoryKind.RAM),
    MemoryRange(0x80000000, 0x800000, MemoryKind.RESERVED),
    MemoryRange(0x80800000, 0x1800, MemoryKind.NVS),
    MemoryRange(0x90000000, 0x1000000, MemoryKind.PERSISTENT),
    MemoryRange(0xB0000000, 0x10000000, MemoryKind.RESERVED),
    MemoryRange(0xFED00000, 0x1000, MemoryKind.RESERVED),
    MemoryRange(0x200000000, 0x10000000, 42),
)


class Sysfs:
    """A dom0's sysfs, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def pci(
        self, *lines: str, name: str = "0000:00:04.0", command: int = 2, driver: str = ""
    ) -> Path:
        device = self.root / "bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "resource").write_text("\n".join((*lines, "")))
        (device / "config").write_bytes(bytes([0xF4, 0x1A, 0x10, 0x11, command, 0, 0, 0]))
        if driver:
            folder = self.root / "bus/pci/drivers" / driver
            folder.mkdir(parents=True)
            (device / "driver").symlink_to(folder)
        return device

    def pnp(self, text: str) -> None:
        device = self.root / "bus/pnp/devices/00:04"
        device.mkdir(parents=True)
        (device / "resources").write_text(text)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def line(start: int, size_bytes: int, flags: int = PREFETCHABLE) -> str:
    return f"{start:#018x} {start + size_bytes - 1:#018x} {flags:#018x}"


def why_not(sysfs: Sysfs, start: int, nr_frames: int = 1, *, x86: bool = True) -> str:
    ranges = find_host_ranges(MACHINE if x86 else (), sysfs.root)
    assert list(ranges) == sorted(ranges, key=lambda one: one.first_mfn)
    return why_not_shareable(ranges, Mfn(start >> 12), nr_frames)[0]


@pytest.mark.parametrize("x86", [True, False])
def test_a_devices_memory(sysfs: Sysfs, x86: bool) -> None:
    sysfs.pci(line(0xFEBFE000, 0x100, PLAIN), NOTHING, line(BAR, 0x400000))
    assert why_not(sysfs, BAR, 1024, x86=x86) == ""
    assert why_not(sysfs, BAR + 0x3FF000, x86=x86) == ""
    assert "nothing there is known" in why_not(sysfs, BAR + 0x3FF000, 2, x86=x86)
    assert "nothing there is known" in why_not(sysfs, BAR - 0x1000, 2, x86=x86)


def test_a_devices_registers(sysfs: Sysfs) -> None:
    sysfs.pci(line(0xE0000000, 0x100, PLAIN))
    assert "not prefetchable" in why_not(sysfs, 0xE0000000)


def test_a_device_that_is_in_use(sysfs: Sysfs) -> None:
    device = sysfs.pci(line(BAR, 0x400000), driver="nvme")
    ranges = find_host_ranges((), sysfs.root)
    reason, hint = why_not_shareable(ranges, Mfn(BAR >> 12), 1)
    assert "dom0's driver nvme uses it" in reason
    assert f"echo 0000:00:04.0 >{device}/driver/unbind" in hint


def test_a_device_that_is_off(sysfs: Sysfs) -> None:
    device = sysfs.pci(line(BAR, 0x400000), command=5)
    reason, hint = why_not_shareable(find_host_ranges((), sysfs.root), Mfn(BAR >> 12), 1)
    assert "switched off" in reason
    assert f"echo 1 >{device}/enable" in hint


def test_a_device_that_has_just_gone(sysfs: Sysfs) -> None:
    device = sysfs.pci(line(BAR, 0x400000))
    (device / "config").unlink()
    assert "switched off" in why_not(sysfs, BAR)
    (device / "resource").unlink()
    assert "nothing there is known" in why_not(sysfs, BAR)


def test_a_bridges_window_is_no_device(sysfs: Sysfs) -> None:
    """Its lines come behind the six BARs, and what is in the window is another device's."""
    sysfs.pci(*[NOTHING] * 8, line(BAR, 0x1000000), name="0000:00:01.0", driver="pcieport")
    sysfs.pci(line(BAR, 0x400000))
    assert why_not(sysfs, BAR) == ""
    assert "nothing there is known" in why_not(sysfs, BAR + 0x400000)


def test_ports_are_no_memory(sysfs: Sysfs) -> None:
    sysfs.pci("0xc000 0xc0ff 0x2101", line(BAR, 0x400000))
    assert "nothing there is known" in why_not(sysfs, 0xC000, x86=False)


@pytest.mark.parametrize(
    ("start", "nr_frames", "reason"),
    [
        (0x80000000, 0x800, ""),
        (0x90000000, 0x1000, ""),
        (0x80000000, 0x801, "ACPI NVS"),
        (0x7FFFF000, 2, "RAM that Xen"),
        (0x100000, 1, "RAM that Xen"),
        (0x9F000, 1, "RAM that Xen"),
        (0xA0000, 1, "firmware and interrupt controllers"),
        (0xFED00000, 1, "firmware and interrupt controllers"),
        (0xFEE00000, 1, "firmware and interrupt controllers"),
        (0x200000000, 1, "the unknown type 42"),
        (0x80801000, 1, "ACPI NVS"),
        (0x300000000, 1, "nothing there is known"),
        (0xB0000000, 1, ""),
    ],
)
def test_by_the_machines_map(sysfs: Sysfs, start: int, nr_frames: int, reason: str) -> None:
    found = why_not(sysfs, start, nr_frames)
    assert (reason in found) if reason else (found == "")


def test_reserved_and_a_device_of_the_board(sysfs: Sysfs) -> None:
    sysfs.pnp("state = active\nio disabled\nmem 0xb0000000-0xbfffffff window\nmem disabled\n")
    assert "a device of dom0's" in why_not(sysfs, 0xBFFFF000)
    assert why_not(sysfs, 0x80000000) == ""


def test_the_refusal_names_the_region_and_the_place() -> None:
    ranges = [HostRange(first_mfn=Mfn(16), nr_frames=4, name="RAM", refusal="it is used", hint="h")]
    place = Place(file="a.toml", key="region.r.host", line=3)
    with pytest.raises(Refused) as caught:
        check_shareable(ranges, "r", Mfn(18), 4, place)
    assert str(caught.value).startswith(f"{place}: the host memory 0x12000-0x15fff of region r ")
    assert caught.value.hint == "h"
    check_shareable([HostRange(first_mfn=Mfn(16), nr_frames=8, name="BAR")], "r", Mfn(18), 4, place)
