# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory maps: what is where, and that free and taken never meet."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.machine import Arch
from xshmd.model import GuestConfig, GuestType
from xshmd.policy import layout

GIB = 1 << 30


def guest(memory: int = 64, maxmem: int = 0, guest_type: GuestType = GuestType.PVH) -> GuestConfig:
    return GuestConfig(name="g", memory_mib=memory, maxmem_mib=maxmem, guest_type=guest_type)


def spans(windows: Iterable[layout.Window]) -> list[tuple[int, int]]:
    return [(window.first_gfn << 12, window.end_gfn << 12) for window in windows]


@pytest.mark.parametrize(
    ("arch", "config", "expected"),
    [
        (Arch.X86_64, guest(), [(0, 64 << 20)]),
        (Arch.X86_64, guest(0), [(0, 32 << 20)]),
        (Arch.X86_64, guest(64, 128), [(0, 128 << 20)]),
        (Arch.X86_64, guest(0xFC0), [(0, 0xFC000000)]),
        (Arch.X86_64, guest(8192), [(0, 0xFC000000), (4 * GIB, 8 * GIB + 0x4000000)]),
        (
            Arch.X86_64,
            guest(8192, guest_type=GuestType.HVM),
            [(0, 0xF0000000), (4 * GIB, 8 * GIB + 0x10000000)],
        ),
        (Arch.ARM64, guest(), [(0x40000000, 0x44000000)]),
        (Arch.ARM64, guest(3072), [(0x40000000, 0x100000000)]),
        (Arch.ARM64, guest(4096), [(0x40000000, 0x100000000), (8 * GIB, 9 * GIB)]),
    ],
)
def test_where_ram_is(arch: Arch, config: GuestConfig, expected: object) -> None:
    assert spans(layout.ram(arch, config)) == expected


@pytest.mark.parametrize(
    ("arch", "guest_type", "address", "name"),
    [
        (Arch.X86_64, GuestType.PVH, 0xFC000000, "ACPI"),
        (Arch.X86_64, GuestType.PVH, 0xFDFFF000, "ACPI"),
        (Arch.X86_64, GuestType.PVH, 0xFEE00000, "local APIC"),
        (Arch.X86_64, GuestType.PVH, 0xFEFF8000, "special pages"),
        (Arch.X86_64, GuestType.PVH, 0xFEFFF000, "special pages"),
        (Arch.X86_64, GuestType.PVH, 0xFE000000, "MMIO hole"),
        (Arch.X86_64, GuestType.PVH, 0xFFFFF000, "MMIO hole"),
        (Arch.X86_64, GuestType.PVH, 0xA0000, "first MiB"),
        (Arch.X86_64, GuestType.HVM, 0x80000000, "PCI window"),
        (Arch.X86_64, GuestType.HVM, 0xF0000000, "PCI window"),
        (Arch.X86_64, GuestType.HVM, 0xFC000000, "hvmloader"),
        (Arch.X86_64, GuestType.HVM, 0xFEC00000, "I/O APIC"),
        (Arch.X86_64, GuestType.HVM, 0xFED00000, "HPET"),
        (Arch.X86_64, GuestType.HVM, 0xFED40000, "TPM"),
        (Arch.X86_64, GuestType.HVM, 0xFEE00000, "local APIC"),
        (Arch.X86_64, GuestType.HVM, 0xFEFF0000, "ioreq and special"),
        (Arch.X86_64, GuestType.HVM, 0xFFFFF000, "firmware"),
        (Arch.X86_64, GuestType.HVM, 0x100000000, "64-bit PCI BARs"),
        (Arch.X86_64, GuestType.HVM, 0x1FFFFF000, "64-bit PCI BARs"),
        (Arch.ARM64, GuestType.PVH, 0x0, "devices"),
        (Arch.ARM64, GuestType.PVH, 0x02000000, "virtio-mmio"),
        (Arch.ARM64, GuestType.PVH, 0x03001000, "interrupt controller"),
        (Arch.ARM64, GuestType.PVH, 0x0401F000, "interrupt controller"),
        (Arch.ARM64, GuestType.PVH, 0x041FF000, "devices"),
        (Arch.ARM64, GuestType.PVH, 0x10000000, "PCI configuration"),
        (Arch.ARM64, GuestType.PVH, 0x20000000, "ACPI"),
        (Arch.ARM64, GuestType.PVH, 0x22000000, "pl011"),
        (Arch.ARM64, GuestType.PVH, 0x22001000, "devices"),
        (Arch.ARM64, GuestType.PVH, 0x32FFF000, "virtual PCI memory"),
        (Arch.ARM64, GuestType.PVH, 0x38000000, "grant table"),
        (Arch.ARM64, GuestType.PVH, 0x39FFF000, "magic pages"),
        (Arch.ARM64, GuestType.PVH, 0xFFFFF000, "RAM bank 0"),
        (Arch.ARM64, GuestType.PVH, 0x200000000, "RAM bank 1"),
        (Arch.ARM64, GuestType.PVH, 0xFFFFFFF000, "RAM bank 1"),
    ],
)
def test_what_is_reserved(arch: Arch, guest_type: GuestType, address: int, name: str) -> None:
    windows = layout.reserved(arch, guest(guest_type=guest_type))
    first = next(one for one in windows if one.overlaps(address >> 12, (address >> 12) + 1))
    assert name in first.name


@pytest.mark.parametrize(
    ("arch", "config", "bits", "expected"),
    [
        (
            Arch.X86_64,
            guest(),
            39,
            [(64 * GIB, 512 * GIB), (64 << 20, 0xFC000000), (4 * GIB, 64 * GIB)],
        ),
        (
            Arch.X86_64,
            guest(guest_type=GuestType.HVM),
            39,
            [(64 * GIB, 512 * GIB), (64 << 20, 0x80000000), (8 * GIB, 64 * GIB)],
        ),
        (Arch.X86_64, guest(), 32, [(64 << 20, 0xFC000000)]),
        (
            Arch.ARM64,
            guest(),
            40,
            [
                (0x3A000000, 0x40000000),
                (0x04200000, 0x10000000),
                (0x33000000, 0x38000000),
                (0x100000000, 0x200000000),
            ],
        ),
    ],
)
def test_what_is_free_the_best_first(
    arch: Arch, config: GuestConfig, bits: int, expected: object
) -> None:
    found = spans(layout.free(arch, config, bits))
    assert [one for one in found if one[1] - one[0] > 32 << 20] == expected


def test_default_window_of_x86_is_above_all_ram() -> None:
    assert spans([layout.default_window(Arch.X86_64, guest(), 40)]) == [(64 * GIB, 1024 * GIB)]
    (window,) = spans([layout.default_window(Arch.X86_64, guest(70 * 1024), 40)])
    assert window == (75 * GIB, 1024 * GIB)


def test_default_window_of_arm() -> None:
    window = layout.default_window(Arch.ARM64, guest())
    assert str(window) == "0x3a000000-0x3fffffff"


def test_address_limit() -> None:
    assert layout.address_limit_gfn(Arch.X86_64) == 1 << 36
    assert layout.address_limit_gfn(Arch.ARM64, 40) == 1 << 28
    assert layout.address_limit_gfn(Arch.X86_64, 64) == 1 << 40


def test_free_ranges_in_words() -> None:
    assert layout.free_text(Arch.X86_64, guest(), 37).startswith(
        "best is 0x1000000000-0x1fffffffff on x86_64, free is 0x4000000-0xfbffffff"
    )
    assert layout.free_text(Arch.X86_64, guest(4096), 24) == "this guest has no free range"


@given(
    arch=st.sampled_from(Arch),
    config=st.builds(
        guest,
        memory=st.integers(0, 1 << 22),
        maxmem=st.integers(0, 1 << 22),
        guest_type=st.sampled_from(GuestType),
    ),
    bits=st.sampled_from([0, 32, 36, 40, 44, 48, 52]),
)
def test_nothing_free_is_taken_and_nothing_is_said_twice(
    arch: Arch, config: GuestConfig, bits: int
) -> None:
    free = layout.free(arch, config, bits)
    limit = layout.address_limit_gfn(arch, bits)
    for index, window in enumerate(free):
        assert window.first_gfn < window.end_gfn <= limit
        others = (*layout.ram(arch, config), *layout.reserved(arch, config), *free[index + 1 :])
        assert not any(window.overlaps(one.first_gfn, one.end_gfn) for one in others)
    default = layout.default_window(arch, config, bits)
    assert default.first_gfn == default.end_gfn or free[0] == default
