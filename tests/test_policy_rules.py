# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each rule of a guest by itself: what breaks it, what only just does not, what is said."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_words import ARM, ARM_FREE, X86, X86_FREE, guest, host, one, request

from xshmd.errors import ConfigError, Refused
from xshmd.machine import Arch, HostInfo
from xshmd.model import UNPLACED, WHOLE_REGION, CachePolicy, GuestConfig, GuestType, Role
from xshmd.policy import layout
from xshmd.policy.rules import check_config, check_guest


def test_a_good_guest_breaks_no_rule() -> None:
    assert check_guest(guest(request()), X86) == ()
    assert check_guest(guest(request(ARM_FREE)), ARM) == ()
    assert check_guest(guest(request(), guest_type=GuestType.HVM), X86) == ()


def test_a_guest_without_regions_is_never_refused() -> None:
    bad = guest(guest_type=GuestType.PV, hap=False, altp2m=True, nestedhvm=True)
    assert check_guest(bad, host(version=(4, 17), has_hap=False)) == ()
    assert check_config(bad, Arch.X86_64) == ()


# --- the guest and the host -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "version", "address", "floor"),
    [
        (Arch.X86_64, (4, 18), X86_FREE, "4.19"),
        (Arch.X86_64, (3, 99), X86_FREE, "4.19"),
        (Arch.ARM64, (4, 17), ARM_FREE, "4.18"),
    ],
)
def test_xen_that_is_too_old(
    arch: Arch, version: tuple[int, int], address: int, floor: str
) -> None:
    errors = check_guest(guest(request(address)), host(arch, version))
    text = f"Xen {version[0]}.{version[1]}.1 cannot share"
    one(errors, Refused, text, f"run Xen {floor} or later")


@pytest.mark.parametrize(
    ("arch", "version", "address"),
    [(Arch.X86_64, (4, 19), X86_FREE), (Arch.X86_64, (5, 0), X86_FREE),
     (Arch.ARM64, (4, 18), ARM_FREE)],
)  # fmt: skip
def test_xen_that_is_just_new_enough(arch: Arch, version: tuple[int, int], address: int) -> None:
    assert check_guest(guest(request(address)), host(arch, version)) == ()


@pytest.mark.parametrize("machine", [host(has_hvm=False), host(has_hap=False)])
def test_a_machine_without_hap(machine: HostInfo) -> None:
    errors = check_guest(guest(request()), machine)
    one(errors, Refused, "hardware-assisted paging", "firmware")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (guest(request(), guest_type=GuestType.PV), ["guest 'vm' is a PV guest", 'type="pvh"']),
        (guest(request(), hap=False), ["hap=0", "remove hap=0"]),
        (guest(request(), altp2m=True), ["has altp2m", "remove altp2m"]),
        (guest(request(), nestedhvm=True), ["nestedhvm=1", "remove nestedhvm"]),
    ],
)
def test_guests_that_can_have_no_region(config: GuestConfig, words: list[str]) -> None:
    one(check_guest(config, X86), Refused, *words)
    one(check_config(config, Arch.X86_64), Refused, *words)


# --- frames -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "address", "frames", "memory", "words"),
    [
        (Arch.X86_64, 0x3FFF000, 1, 64, ["RAM at 0x0-0x3ffffff (64 MiB)", "0x1000000000-"]),
        (Arch.X86_64, 0x0, 1, 64, ["region 'r' at 0x0-0xfff"]),
        (Arch.X86_64, 0x1FFF000, 1, 0, ["xl's default of 32 MiB"]),
        (Arch.X86_64, 0xFBFFF000, 1, 8192, ["RAM at 0x0-0xfbffffff (8192 MiB)"]),
        (Arch.X86_64, 0x100000000, 1, 8192, ["RAM at 0x100000000-0x203ffffff"]),
        (Arch.X86_64, 0xFBFFF000, 0x10000, 4032, ["RAM at 0x0-0xfbffffff"]),
        (Arch.ARM64, 0x3FFFF000, 2, 64, ["RAM at 0x40000000-0x43ffffff", "0x3a000000-0x3fffffff"]),
    ],
)
def test_a_region_inside_ram(
    arch: Arch, address: int, frames: int, memory: int, words: list[str]
) -> None:
    config = guest(request(address, frames), memory_mib=memory)
    one(check_config(config, arch), ConfigError, "is inside the guest's RAM", *words)


def test_the_first_frame_after_ram_is_not_in_it() -> None:
    assert check_config(guest(request(0x4000000)), Arch.X86_64) == ()
    one(check_config(guest(request(0x4000000), maxmem_mib=65), Arch.X86_64), ConfigError, "65 MiB")


@pytest.mark.parametrize(
    ("arch", "guest_type", "address", "name"),
    [
        (Arch.X86_64, GuestType.PVH, 0xFEE00000, "the local APIC, at 0xfee00000-0xfee00fff"),
        (Arch.X86_64, GuestType.PVH, 0xFBFFF000, "the ACPI tables, at 0xfc000000-0xfdffffff"),
        (Arch.X86_64, GuestType.HVM, 0xE0000000, "the PCI window, at 0x80000000-0xfbffffff"),
        (Arch.ARM64, GuestType.PVH, 0x38000000, "the grant table, at 0x38000000-0x38ffffff"),
        (Arch.ARM64, GuestType.PVH, 0x37FFF000, "the grant table, at 0x38000000-0x38ffffff"),
        (Arch.ARM64, GuestType.PVH, 0x50000000, "RAM bank 0"),
    ],
)
def test_a_region_on_a_reserved_range(
    arch: Arch, guest_type: GuestType, address: int, name: str
) -> None:
    config = guest(request(address, 2), guest_type=guest_type)
    best = "best is 0x3a000000" if arch is Arch.ARM64 else "best is 0x1000000000"
    one(check_config(config, arch), ConfigError, f"is on {name}", best)


@pytest.mark.parametrize(
    ("arch", "bits", "limit", "words"),
    [
        (Arch.X86_64, 39, 1 << 39, "this guest's addresses have 39 bits"),
        (Arch.X86_64, 0, 1 << 48, "addresses on x86_64 have at most 48 bits"),
        (Arch.ARM64, 0, 1 << 48, "addresses on arm64 have at most 48 bits"),
    ],
)
def test_a_region_beyond_the_address_space(arch: Arch, bits: int, limit: int, words: str) -> None:
    fits = guest(request(limit - 0x1000))
    assert check_config(fits, arch, gpaddr_bits=bits) == ()
    errors = check_config(guest(request(limit - 0x1000, 2)), arch, gpaddr_bits=bits)
    one(errors, Refused, words, "put it elsewhere")


def test_the_width_that_xen_reports_reaches_the_rule() -> None:
    config = guest(request(1 << 39))
    assert check_guest(config, X86) == ()
    one(check_guest(config, X86, gpaddr_bits=39), Refused, "39 bits")


def test_regions_that_overlap() -> None:
    config = guest(
        request(X86_FREE + 0x2000, 2, 0, region_id="b"), request(X86_FREE, 3, 1, region_id="a")
    )
    error = one(check_config(config, Arch.X86_64), ConfigError, "begin at 0x1000003000 or later")
    assert error.message == (
        "vm.cfg:5: static_shm[0]: region 'b' at 0x1000002000-0x1000003fff overlaps"
        " region 'a' at 0x1000000000-0x1000002fff of vm.cfg:6: static_shm[1]"
    )


def test_what_has_no_frame_yet_is_nowhere() -> None:
    unplaced = [
        dataclasses.replace(request(0, 1 << 20, index, region_id=f"r{index}"), first_gfn=UNPLACED)
        for index in range(2)
    ]
    assert check_config(guest(*unplaced), Arch.X86_64) == ()


def test_what_has_no_size_yet_has_a_frame() -> None:
    unsized = request(0, WHOLE_REGION, role=Role.BORROWER)
    one(check_config(guest(unsized), Arch.X86_64), ConfigError, "region 'r' from 0x0 is inside")


def test_regions_that_touch_do_not_overlap() -> None:
    config = guest(request(X86_FREE, 2), request(X86_FREE + 0x2000, 2, 1, region_id="b"))
    assert check_config(config, Arch.X86_64) == ()


def test_a_region_within_a_larger_one_that_is_not_its_neighbour() -> None:
    config = guest(
        request(X86_FREE, 9, 0, region_id="a"),
        request(X86_FREE + 0x1000, 1, 1, region_id="b"),
        request(X86_FREE + 0x3000, 1, 2, region_id="c"),
    )
    errors = check_config(config, Arch.X86_64)
    assert [error.facts["place"] for error in errors] == ["static_shm[1]", "static_shm[2]"]
    assert all("overlaps region 'a'" in error.message for error in errors)


spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=8)


@given(spans)
def test_overlaps_are_found_exactly_where_there_are_some(chosen: list[tuple[int, int]]) -> None:
    requests = [
        request(X86_FREE + first * 0x1000, frames, index, region_id=f"r{index}")
        for index, (first, frames) in enumerate(chosen)
    ]
    overlapping = any(
        a.first_gfn < b.end_gfn and b.first_gfn < a.end_gfn
        for index, a in enumerate(requests)
        for b in requests[:index]
    )
    assert bool(check_config(guest(*requests), Arch.X86_64)) == overlapping


@settings(max_examples=50)
@given(
    arch=st.sampled_from(Arch),
    guest_type=st.sampled_from([GuestType.PVH, GuestType.HVM]),
    memory=st.integers(0, 1 << 19),
    data=st.data(),
)
def test_every_window_a_hint_calls_free_is_accepted(
    arch: Arch, guest_type: GuestType, memory: int, data: st.DataObject
) -> None:
    config = guest(guest_type=guest_type, memory_mib=memory)
    window = data.draw(st.sampled_from(layout.free(arch, config, 40)))
    for frames in (1, window.end_gfn - window.first_gfn):
        entry = request(window.first_gfn << 12, frames)
        full = dataclasses.replace(config, requests=(entry,))
        assert check_config(full, arch, gpaddr_bits=40) == ()


# --- how --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "address", "right", "wrong"),
    [
        (Arch.X86_64, X86_FREE, CachePolicy.X86_NORMAL, CachePolicy.ARM_NORMAL),
        (Arch.ARM64, ARM_FREE, CachePolicy.ARM_NORMAL, CachePolicy.X86_NORMAL),
    ],
)
def test_the_cache_policy_of_the_other_architecture(
    arch: Arch, address: int, right: CachePolicy, wrong: CachePolicy
) -> None:
    assert check_config(guest(request(address, cache_policy=right)), arch) == ()
    errors = check_config(guest(request(address, cache_policy=wrong)), arch)
    one(errors, ConfigError, f"cache_policy={wrong}", f"not for {arch}", f"cache_policy={right}")


def test_all_that_is_wrong_is_returned() -> None:
    config = guest(
        request(0x0, offset_frames=1),
        request(0xFEE00000, 1, 1, region_id="s", cache_policy=CachePolicy.ARM_NORMAL),
        hap=False,
    )
    assert len(check_guest(config, host(version=(4, 17)))) == 6
