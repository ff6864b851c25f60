# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each rule: what breaks it, what only just does not, and what the user is told."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.errors import ConfigError, Conflict, Refused, XshmError
from xshmd.model import (
    Arch,
    CachePolicy,
    Guest,
    GuestConfig,
    GuestState,
    GuestType,
    HostInfo,
    Place,
    Prot,
    Region,
    RegionRequest,
    Role,
)
from xshmd.policy import layout
from xshmd.policy.rules import Claim, check_config, check_guest, check_region, claims
from xshmd.units import DomId, Gfn, gfn_of

X86_FREE, ARM_FREE = 0x1000000000, 0x3A000000


def request(
    address: int = X86_FREE, frames: int = 1, index: int = 0, file: str = "vm.cfg", **more: Any
) -> RegionRequest:
    values: dict[str, Any] = {
        "region_id": "r",
        "first_gfn": gfn_of(address),
        "nr_frames": frames,
        "role": Role.OWNER,
        "place": Place(file=file, key=f"static_shm[{index}]", line=index + 5),
    }
    return RegionRequest(**(values | more))


def guest(*requests: RegionRequest, **more: Any) -> GuestConfig:
    values: dict[str, Any] = {"name": "vm", "memory_mib": 64, "guest_type": GuestType.PVH}
    return GuestConfig(requests=requests, **(values | more))


def host(
    arch: Arch = Arch.X86_64,
    version: tuple[int, int] = (4, 20),
    *,
    has_hvm: bool = True,
    has_hap: bool = True,
) -> HostInfo:
    return HostInfo(
        arch=arch, xen_version=version, xen_extra=".1", xen_command_line="",
        has_hvm=has_hvm, has_hap=has_hap, free_pages=1 << 20, total_pages=1 << 21,
    )  # fmt: skip


X86, ARM = host(), host(Arch.ARM64)


def one(errors: tuple[XshmError, ...], kind: type[XshmError], *words: str) -> XshmError:
    """Check that there is one error of this very class that says all the words, well."""
    (error,) = errors
    assert type(error) is kind
    for word in words:
        assert word in error.one_line()
    assert error.message.startswith("vm.cfg:")
    assert error.facts["file"] == "vm.cfg"
    assert str(error.facts["place"]).startswith("static_shm[")
    assert error.hint
    assert not error.message.endswith(".")
    return error


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
        request(X86_FREE + first * 0x1000, frames, index)
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


def test_read_only() -> None:
    errors = check_config(guest(request(prot=Prot.RO)), Arch.X86_64)
    one(errors, Refused, "prot=ro, which Xen cannot enforce", "say prot=rw, or share it by grants")


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
        request(0x0, prot=Prot.RO),
        request(0xFEE00000, 1, 1, region_id="s", cache_policy=CachePolicy.ARM_NORMAL),
        hap=False,
    )
    assert len(check_guest(config, host(version=(4, 17)))) == 6


# --- the guest among the others ---------------------------------------------------------------


def claim(name: str = "vm", **more: Any) -> Claim:
    return Claim(guest=name, request=request(file=f"{name}.cfg", **more))


def borrower(**more: Any) -> Claim:
    return claim(role=Role.BORROWER, **more)


def region(nr_frames: int = 4, owner: str = "a", region_id: str = "r") -> Region:
    return Region(
        region_id=region_id, nr_frames=nr_frames, holder_uuid="h", holder_first_gfn=Gfn(0),
        owner=owner,
    )  # fmt: skip


def test_a_borrower_of_nothing() -> None:
    errors = check_region(borrower(), region=None, others=[borrower(), claim("a", region_id="s")])
    error = one(
        errors, ConfigError, "guest 'vm' borrows region 'r', which nobody defines",
        "id=r and role=owner", "/etc/xen", "/etc/xshmd/guests.d", "/etc/xshmd/regions.d",
    )  # fmt: skip
    assert error.facts["region"] == "r"


def test_a_borrower_of_its_own_region_borrows_nothing() -> None:
    errors = check_region(borrower(), region=None, others=[claim()])
    one(errors, ConfigError, "which nobody defines")


@pytest.mark.parametrize(
    ("existing", "others"),
    [(region(), []), (None, [claim("a")]), (region(owner=""), []), (region(), [claim("a")])],
)
def test_a_borrower_of_something(existing: Region | None, others: list[Claim]) -> None:
    assert check_region(borrower(), region=existing, others=others) == ()


@pytest.mark.parametrize("offset", [0, 1])
def test_a_borrower_beyond_the_end(offset: int) -> None:
    ask = borrower(offset_frames=offset, frames=5 - offset)
    words = ("ends at offset 0x5000", "only 16 KiB (0x4000)", "at most 0x4000")
    one(check_region(ask, region=region(), others=[]), ConfigError, "region 'r' has", *words)
    owner = claim("a", frames=4)
    said = "its owner guest 'a' (a.cfg:5: static_shm[0]) gives it"
    one(check_region(ask, region=None, others=[owner]), ConfigError, said, *words)
    fits = borrower(offset_frames=offset, frames=4 - offset)
    assert check_region(fits, region=region(), others=[]) == ()
    assert check_region(fits, region=None, others=[owner]) == ()


def test_a_region_that_exists_counts_more_than_a_file() -> None:
    one(check_region(borrower(frames=5), region=region(), others=[claim("a", frames=9)]),
        ConfigError, "region 'r' has only 16 KiB")  # fmt: skip


def test_two_owners() -> None:
    errors = check_region(claim(), region=None, others=[claim("a")])
    one(
        errors, Conflict, "region 'r' has two owners: guest 'a' (a.cfg:5: static_shm[0]) and"
        " guest 'vm' (vm.cfg:5: static_shm[0])", "role=borrower",
    )  # fmt: skip


def test_an_owner_of_what_another_guest_owns() -> None:
    errors = check_region(claim(frames=4), region=region(), others=[])
    one(errors, Conflict, "two owners: guest 'a' and guest 'vm' (vm.cfg:5: static_shm[0])")


def test_a_borrower_between_two_owners() -> None:
    two = [claim("a"), claim("b")]
    one(check_region(borrower(), region=None, others=two), Conflict,
        "two owners: guest 'a' (a.cfg:5: static_shm[0]) and guest 'b' (b.cfg:")  # fmt: skip
    assert check_region(borrower(), region=region(), others=two) == ()
    assert check_region(borrower(), region=None, others=[claim("a"), claim("a")]) == ()


@pytest.mark.parametrize("owner", ["vm", ""])
def test_an_owner_of_its_own_region(owner: str) -> None:
    ask = claim(frames=4)
    assert check_region(ask, region=region(owner=owner), others=[ask]) == ()


def test_an_owner_who_wants_another_size() -> None:
    errors = check_region(claim(frames=3), region=region(owner="vm"), others=[])
    one(errors, Conflict, "is to have 12 KiB, but it exists with 16 KiB", "say size=0x4000")


def test_who_says_what() -> None:
    there = Guest(
        domid=DomId(3), uuid="u3", name="a", generation="g", state=GuestState.ATTACHED,
        requests=(request(region_id="live"),),
    )  # fmt: skip
    configs = [
        guest(request(region_id="stale"), name="a"),
        guest(request(region_id="stale"), name="renamed", uuid="u3"),
        guest(request(region_id="r"), request(region_id="s"), name="b"),
    ]
    doomed = dataclasses.replace(there, name="b", uuid="u4", state=GuestState.DOOMED)
    found = [(one.guest, one.request.region_id) for one in claims([there, doomed], configs)]
    assert found == [("a", "live"), ("b", "r"), ("b", "s")]


def test_a_guest_only_just_seen_counts_by_its_file() -> None:
    """Two guests made at the same moment: the borrower is planned while its owner is but held."""
    held = Guest(domid=DomId(3), uuid="u3", name="a", generation="g", state=GuestState.HELD)
    found = [
        (one.guest, one.request.region_id) for one in claims([held], [guest(request(), name="a")])
    ]
    assert found == [("a", "r")]
