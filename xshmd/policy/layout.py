# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where things are in a guest's physical address space, so that regions are put elsewhere.

x86: ``tools/libs/light/libxl_dom.c`` (libxl__build_hvm), ``libxl_x86.c`` (domain_construct_memmap),
``tools/firmware/hvmloader/{config.h,pci.c}``.  Arm: ``xen/include/public/arch-arm.h``, the same in
Xen 4.17 to 4.22.  Addresses here are bytes, as in those files; the public names speak of frames.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from xshmd.machine import Arch
from xshmd.model import GuestConfig, GuestType
from xshmd.units import MAX_GUEST_ADDRESS_BITS, Gfn, address_of, gfn_of

MIB: Final = 1 << 20
GIB: Final = 1 << 30

DEFAULT_MEMORY_MIB: Final = 32
"""What a guest gets that says no ``memory``: max_memkb's default in libxl_create.c."""
USUAL_ADDRESS_BITS: Final = {Arch.X86_64: 48, Arch.ARM64: 48}
"""The widest that Xen maps for a guest anywhere; a given machine may have less."""
HIGHMEM_SLACK: Final = 4 * GIB
"""Above a guest's RAM: more than ``mmio_hole`` can move up, and room for 64-bit PCI BARs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A range of guest frames with what it is, in words that go into a message."""

    name: str
    first_gfn: Gfn
    end_gfn: Gfn
    """The first frame after it."""

    def overlaps(self, first_gfn: int, end_gfn: int) -> bool:
        return first_gfn < self.end_gfn and self.first_gfn < end_gfn

    def __str__(self) -> str:
        return span_text(self.first_gfn, self.end_gfn)


def span_text(first_gfn: Gfn, end_gfn: Gfn) -> str:
    """Say a range of frames as the addresses of its first and last byte."""
    return f"{address_of(first_gfn):#x}-{address_of(end_gfn) - 1:#x}"


def address_text(gfn: Gfn) -> str:
    """Say a frame as the address of its first byte."""
    return f"{address_of(gfn):#x}"


def _window(name: str, start: int, end: int) -> Window:
    return Window(name, gfn_of(start), gfn_of(end))


_X86_PVH: Final = (
    _window("the first MiB", 0, 0x100000),
    _window("the ACPI tables", 0xFC000000, 0xFE000000),
    _window("the local APIC", 0xFEE00000, 0xFEE01000),
    _window("Xen's special pages", 0xFEFF8000, 0xFF000000),
    _window("the MMIO hole below 4 GiB", 0xFC000000, 0x100000000),
)
_X86_HVM: Final = (
    _window("the first MiB", 0, 0x100000),
    # From 0xf0000000, but hvmloader may let it grow downwards to here.
    _window("the PCI window", 0x80000000, 0xFC000000),
    _window("hvmloader's reserved memory and ACPI tables", 0xFC000000, 0xFEC00000),
    _window("the I/O APIC", 0xFEC00000, 0xFEC01000),
    _window("the HPET", 0xFED00000, 0xFED01000),
    _window("the TPM", 0xFED40000, 0xFED45000),
    _window("the local APIC", 0xFEE00000, 0xFEE01000),
    _window("Xen's ioreq and special pages", 0xFEFF0000, 0xFF000000),
    _window("the firmware and chipset", 0xFEC00000, 0x100000000),
)
_ARM_BANKS: Final = ((0x40000000, 0x100000000), (0x200000000, 0x10000000000))
_ARM: Final = (
    _window("virtio-mmio", 0x02000000, 0x02100000),
    _window("the interrupt controller", 0x03001000, 0x04020000),
    _window("the devices of Xen's memory map", 0, 0x04200000),
    _window("the virtual PCI configuration space", 0x10000000, 0x20000000),
    _window("the ACPI tables", 0x20000000, 0x22000000),
    _window("the pl011 UART", 0x22000000, 0x22001000),
    _window("the devices of Xen's memory map", 0x22001000, 0x23000000),
    _window("virtual PCI memory", 0x23000000, 0x33000000),
    _window("the grant table", 0x38000000, 0x39000000),
    _window("Xen's magic pages", 0x39000000, 0x3A000000),
)
EXTENDED: Final = (
    _window("RAM bank 0, whose free part Linux uses for grant mappings", *_ARM_BANKS[0]),
    _window("RAM bank 1, whose free part Linux uses for grant mappings", *_ARM_BANKS[1]),
)
"""What libxl advertises where RAM does not fill it (libxl_arm.c, finalize_hypervisor_node())."""

_ARM_DEFAULT: Final = _window("the default window", 0x3A000000, 0x40000000)
_X86_DEFAULT_START: Final = 64 * GIB
_LOW_RAM_LIMIT: Final = {GuestType.HVM: 0xF0000000, GuestType.PVH: 0xFC000000}
_SMALLEST_WINDOW: Final = 16 * MIB
"""Free ranges below this are not worth naming in a hint."""


def address_limit_gfn(arch: Arch, gpaddr_bits: int = 0) -> Gfn:
    """Return the first frame that no guest of this machine can have.

    Args:
        arch: The machine's.
        gpaddr_bits: What Xen reports for the domain; 0 where not known, then the widest possible.
    """
    bits = min(gpaddr_bits or USUAL_ADDRESS_BITS[arch], MAX_GUEST_ADDRESS_BITS)
    return gfn_of(1 << bits)


def ram(arch: Arch, config: GuestConfig) -> tuple[Window, ...]:
    """Return where the guest's RAM is: all that it may get, so by ``maxmem``."""
    size = max(config.memory_mib, config.maxmem_mib) * MIB or DEFAULT_MEMORY_MIB * MIB
    if arch is Arch.ARM64:
        banks = _ARM_BANKS
    else:
        low = _LOW_RAM_LIMIT.get(config.guest_type, _LOW_RAM_LIMIT[GuestType.PVH])
        banks = ((0, low), (4 * GIB, 1 << MAX_GUEST_ADDRESS_BITS))
    found = []
    for start, end in banks:
        taken = min(size, end - start)
        if taken:
            found.append(_window("the guest's RAM", start, start + taken))
        size -= taken
    return tuple(found)


def reserved(arch: Arch, config: GuestConfig) -> tuple[Window, ...]:
    """Return the ranges with something else than RAM in them, the narrower ones first."""
    if arch is Arch.ARM64:
        return (*_ARM, *EXTENDED) if config.extended_regions else _ARM
    if config.guest_type is not GuestType.HVM:
        return _X86_PVH
    highmem_end = max(address_of(ram(arch, config)[-1].end_gfn), 4 * GIB)
    above = _window(
        "what follows RAM above 4 GiB: 64-bit PCI BARs and RAM moved up by mmio_hole",
        highmem_end,
        highmem_end + HIGHMEM_SLACK,
    )
    return (*_X86_HVM, above)


def free(arch: Arch, config: GuestConfig, gpaddr_bits: int = 0) -> tuple[Window, ...]:
    """Return the ranges a region may be in, the one to be preferred first."""
    default = default_window(arch, config, gpaddr_bits)
    limit = address_limit_gfn(arch, gpaddr_bits)
    taken = sorted(
        (window.first_gfn, window.end_gfn)
        for window in (*ram(arch, config), *reserved(arch, config), default)
    )
    gaps, at = [], Gfn(0)
    for first, end in (*taken, (limit, limit)):
        if min(first, limit) - at >= gfn_of(_SMALLEST_WINDOW):
            gaps.append(Window("free", at, min(first, limit)))
        at = max(at, end)
    # An address space too narrow for it leaves an empty default window.
    return ((default,) if default.first_gfn < default.end_gfn else ()) + tuple(gaps)


def default_window(arch: Arch, config: GuestConfig, gpaddr_bits: int = 0) -> Window:
    """Return where regions of this guest are best put: nothing else ever looks there.

    On x86 that is high up, as Linux maps grant pages at the lowest free address
    (drivers/xen/unpopulated-alloc.c).  It is empty where the address space ends before it.
    """
    if arch is Arch.ARM64:
        return _ARM_DEFAULT
    highmem_end = address_of(ram(arch, config)[-1].end_gfn)
    start = max(_X86_DEFAULT_START, -(-(highmem_end + HIGHMEM_SLACK) // GIB) * GIB)
    limit = address_limit_gfn(arch, gpaddr_bits)
    return Window("the default window", min(gfn_of(start), limit), limit)


def free_text(arch: Arch, config: GuestConfig, gpaddr_bits: int = 0) -> str:
    """Say the free ranges for a hint."""
    windows = [str(window) for window in free(arch, config, gpaddr_bits)]
    if not windows:
        return "this guest has no free range"
    return ", ".join(
        [f"best is {windows[0]} on {arch}", *(f"free is {text}" for text in windows[1:])]
    )
