# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which machine memory is nobody's RAM: what a host-backed region may lie in, and what never.

Three sources, none of which needs a capability: the machine's memory map as Xen has it (x86), and
the memory of PCI and PnP devices as dom0's kernel has it in sysfs.

Limits.  What firmware calls reserved is taken for a carve-out unless a device is known to be there
or it lies where PCs have their firmware and interrupt controllers: firmware that keeps something of
its own elsewhere cannot be told apart.  On Arm only PCI memory is found: Xen gives dom0 no right to
pass on what is under /reserved-memory (xen/arch/arm/device.c, ``map_range_to_domain()``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from xshmd.machine import HostRange, MemoryKind, MemoryRange
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, Mfn

SYSFS: Final = Path("/sys")

# include/linux/ioport.h
_IORESOURCE_MEM: Final = 0x200
_IORESOURCE_PREFETCH: Final = 0x2000
# include/uapi/linux/pci_regs.h
_PCI_COMMAND: Final = 4
_PCI_COMMAND_MEMORY: Final = 2

_PC_PLACES: Final = (
    MemoryRange(0, 0x100000, MemoryKind.RESERVED),
    MemoryRange(0xFEC00000, 0x1400000, MemoryKind.RESERVED),
)
_KINDS: Final[dict[int, str]] = {
    MemoryKind.RAM: "RAM that Xen and its domains use",
    MemoryKind.ACPI: "the firmware's ACPI tables",
    MemoryKind.NVS: "memory the firmware keeps for itself (ACPI NVS)",
    MemoryKind.UNUSABLE: "memory with errors",
    MemoryKind.DISABLED: "memory that is switched off",
}


def find_host_ranges(
    machine_map: Sequence[MemoryRange], sysfs: Path = SYSFS
) -> tuple[HostRange, ...]:
    """Return every range that something is known of, in order of address.

    Args:
        machine_map: Xen's map of the machine, in bytes; empty on Arm.
        sysfs: Where dom0's sysfs is.
    """
    found = [*_of_machine(machine_map), *_of_pci(sysfs), *_of_pnp(sysfs)]
    if machine_map:
        reason = "it is where a PC has its firmware and interrupt controllers"
        found += [_range(at.address, at.end, "the firmware", reason) for at in _PC_PLACES]
    ranges = (one for one in found if one.nr_frames > 0)
    return tuple(sorted(ranges, key=lambda one: (one.first_mfn, one.nr_frames, one.name)))


def _range(start: int, end: int, name: str, refusal: str = "", hint: str = "") -> HostRange:
    # What may be given away counts in whole frames, what must not in every frame it touches.
    first = start >> PAGE_SHIFT if refusal else -(-start // PAGE_SIZE)
    last = -(-end // PAGE_SIZE) if refusal else end >> PAGE_SHIFT
    return HostRange(
        first_mfn=Mfn(first), nr_frames=last - first, name=name, refusal=refusal, hint=hint
    )


def _of_machine(machine_map: Sequence[MemoryRange]) -> Iterator[HostRange]:
    for entry in machine_map:
        if entry.kind in (MemoryKind.RESERVED, MemoryKind.PERSISTENT):
            yield _range(entry.address, entry.end, "reserved memory of the machine")
        else:
            what = _KINDS.get(entry.kind, f"of the unknown type {entry.kind}")
            yield _range(entry.address, entry.end, "the machine's memory", f"it is {what}")


def _of_pci(sysfs: Path) -> Iterator[HostRange]:
    for device in sorted((sysfs / "bus/pci/devices").glob("*")):
        # What follows the six BARs is the ROM, and windows in which others' BARs lie.
        for index, line in enumerate(_text(device / "resource").splitlines()[:6]):
            start, end, flags = (int(word, 16) for word in line.split())
            if not flags & _IORESOURCE_MEM or not end:
                continue
            refusal, hint = _pci_refusal(device, flags)
            yield _range(
                start, end + 1, f"memory {index} of PCI device {device.name}", refusal, hint
            )


def _pci_refusal(device: Path, flags: int) -> tuple[str, str]:
    if not flags & _IORESOURCE_PREFETCH:
        return "it is registers and not memory: it is not prefetchable", ""
    driver = device / "driver"
    if driver.exists():
        name = driver.resolve().name
        unbind = f"`echo {device.name} >{driver}/unbind`"
        return f"dom0's driver {name} uses it", f"if nothing needs the device: {unbind}"
    command = _bytes(device / "config")[_PCI_COMMAND : _PCI_COMMAND + 1]
    if not command or not command[0] & _PCI_COMMAND_MEMORY:
        return "the device is switched off", f"`echo 1 >{device}/enable` switches it on"
    return "", ""


def _of_pnp(sysfs: Path) -> Iterator[HostRange]:
    for device in sorted((sysfs / "bus/pnp/devices").glob("*")):
        for match in re.finditer(
            r"^mem 0x([0-9a-f]+)-0x([0-9a-f]+)", _text(device / "resources"), re.M
        ):
            start, end = int(match[1], 16), int(match[2], 16)
            yield _range(start, end + 1, f"PnP device {device.name}", "it is a device of dom0's")


def _text(path: Path) -> str:
    return _bytes(path).decode("ascii", "replace")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the device has just gone, or has no such attribute
        return b""
