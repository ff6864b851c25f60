# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chosen frames: safe, the same every time, and not moved by what is added later."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from flat import LINEAR, growth
from hypothesis import assume, given
from hypothesis import strategies as st

from xshmd.errors import ConfigError
from xshmd.machine import Arch
from xshmd.model import (
    DOMAIN_0,
    UNPLACED,
    WHOLE_REGION,
    GuestConfig,
    GuestType,
    Place,
    RegionRequest,
    Role,
)
from xshmd.policy import layout
from xshmd.policy.placement import placed
from xshmd.policy.rules import check_config
from xshmd.units import Gfn, gfn_of

MIB = 256
"""Frames in one."""


def entry(index: int, nr_frames: int = 1, first_gfn: int = UNPLACED, **more: Any) -> RegionRequest:
    values: dict[str, Any] = {"role": Role.OWNER, "place": Place(file="f", key=f"s[{index}]")}
    return RegionRequest(
        region_id=f"r{index}", first_gfn=Gfn(first_gfn), nr_frames=nr_frames, **(values | more)
    )


def guest(*requests: RegionRequest, memory: int = 64, **more: Any) -> GuestConfig:
    return GuestConfig(name="g", memory_mib=memory, requests=requests, **more)


def addresses(config: GuestConfig, arch: Arch, **sizes: int) -> list[int]:
    return [one.first_gfn << 12 for one in placed(config, arch, sizes=sizes).requests]


def test_what_is_said_is_left() -> None:
    config = guest(entry(0, 4, 0x123), entry(1, 4, 0x3A000))
    assert placed(config, Arch.ARM64, sizes={}) == config


def test_from_the_start_of_the_default_window() -> None:
    config = guest(entry(0, 1), entry(1, 3), entry(2, 1))
    assert addresses(config, Arch.X86_64) == [0x1000000000, 0x1000001000, 0x1000004000]
    assert addresses(config, Arch.ARM64) == [0x3A000000, 0x3A001000, 0x3A004000]


def test_of_2_mib_or_more_is_aligned_to_that_and_the_gap_is_used() -> None:
    config = guest(entry(0, 1), entry(1, 512), entry(2, 511), entry(3, 513), entry(4, 1))
    assert addresses(config, Arch.X86_64) == [
        0x1000000000, 0x1000200000, 0x1000001000, 0x1000400000, 0x1000601000,
    ]  # fmt: skip


def test_around_what_is_said_before_and_after() -> None:
    config = guest(
        entry(0, 2, 0x3A001), entry(1, 2), entry(2, 1), entry(3, 1), entry(4, 1, 0x3A005)
    )
    assert addresses(config, Arch.ARM64) == [
        0x3A001000, 0x3A003000, 0x3A000000, 0x3A006000, 0x3A005000,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mib", "address"),
    [
        (96, 0x3A000000),
        (97, 0x04200000),
        (190, 0x04200000),
        (191, 0x100000000),
        (4096, 0x100000000),
    ],
)
def test_arms_windows_in_turn(mib: int, address: int) -> None:
    assert addresses(guest(entry(0, mib * MIB)), Arch.ARM64) == [address]


def test_arms_windows_fill_up_one_after_the_other() -> None:
    config = guest(*(entry(index, 80 * MIB) for index in range(6)))
    assert addresses(config, Arch.ARM64) == [
        0x3A000000, 0x04200000, 0x09200000, 0x33000000, 0x100000000, 0x105000000,
    ]  # fmt: skip


def test_no_room() -> None:
    config = guest(entry(0, 4096 * MIB), entry(1, 4096 * MIB), entry(2, 1), entry(3, 200 * MIB))
    with pytest.raises(ConfigError) as caught:
        placed(config, Arch.ARM64, sizes={})
    first, second = caught.value.parts
    assert first.message == (
        "f: s[1]: region 'r1' needs 4 GiB, for which the guest has no free range left: the largest"
        " has 190 MiB"
    )
    assert first.facts["rule"] == second.facts["rule"] == "no-room"
    assert "say 'begin'" in first.hint
    assert second.facts["place"] == "s[3]"


def test_x86_is_above_a_large_guest() -> None:
    assert addresses(guest(entry(0), memory=70 * 1024), Arch.X86_64) == [75 << 30]
    assert addresses(guest(entry(0), memory=0), Arch.X86_64) == [64 << 30]


def borrower(index: int, first_gfn: int = UNPLACED, offset_frames: int = 0) -> RegionRequest:
    return entry(index, WHOLE_REGION, first_gfn, role=Role.BORROWER, offset_frames=offset_frames)


def test_the_whole_of_a_region_or_its_rest() -> None:
    config = guest(borrower(0, offset_frames=2), borrower(1, 0x3A000))
    first, second = placed(config, Arch.ARM64, sizes={"r0": 6, "r1": 7}).requests
    assert (first.first_gfn, first.nr_frames) == (0x3A007, 4)
    assert (second.first_gfn, second.nr_frames) == (0x3A000, 7)


@pytest.mark.parametrize("sizes", [{}, {"r1": 2}, {"r1": 1}])
def test_a_region_of_unknown_size_holds_up_those_after_it(sizes: dict[str, int]) -> None:
    config = guest(entry(0), borrower(1, offset_frames=2), entry(2), entry(3, 1, 0x3A009))
    found = placed(config, Arch.ARM64, sizes=sizes).requests
    assert [one.first_gfn for one in found] == [0x3A000, UNPLACED, UNPLACED, 0x3A009]
    assert found[1].nr_frames == WHOLE_REGION
    later = placed(guest(*found), Arch.ARM64, sizes={"r1": 5})
    assert later == placed(config, Arch.ARM64, sizes={"r1": 5})
    assert [one.first_gfn for one in later.requests] == [0x3A000, 0x3A001, 0x3A004, 0x3A009]


def test_what_is_said_but_of_unknown_size_holds_up_all() -> None:
    config = guest(entry(0), borrower(1, 0x3A000), entry(2))
    assert placed(config, Arch.ARM64, sizes={}) == config
    found = placed(config, Arch.ARM64, sizes={"r1": 5}).requests
    assert [one.first_gfn for one in found] == [0x3A005, 0x3A000, 0x3A006]


def test_domain_0_is_left_alone() -> None:
    config = dataclasses.replace(guest(entry(0)), name=DOMAIN_0)
    assert placed(config, Arch.ARM64, sizes={}) == config


def test_ten_thousand_are_placed_at_once() -> None:
    requests = [
        entry(index, 512 if index % 2 else 1, UNPLACED if index % 3 else 0x1000000 + index * 1027)
        for index in range(10_000)
    ]
    few, many = guest(*requests[:1_000]), guest(*requests)
    assert check_config(placed(many, Arch.X86_64, sizes={}), Arch.X86_64) == ()
    times = growth(
        lambda: placed(few, Arch.X86_64, sizes={}), lambda: placed(many, Arch.X86_64, sizes={})
    )
    assert times < LINEAR


sizes_in_frames = st.one_of(
    st.integers(1, 8), st.integers(500, 530), st.integers(1, 100 * MIB), st.just(512)
)


@st.composite
def entries(draw: st.DrawFn, index: int, arch: Arch) -> RegionRequest:
    start = (0x1000000, 0x3A000)[arch is Arch.ARM64]
    places = st.just(int(UNPLACED)) | st.integers(start, start + 2000).map(int)
    return entry(index, draw(sizes_in_frames), draw(places))


@st.composite
def guests(draw: st.DrawFn) -> tuple[GuestConfig, Arch]:
    arch = draw(st.sampled_from(Arch))
    count = draw(st.integers(1, 8))
    requests = [draw(entries(index, arch)) for index in range(count)]
    memory = draw(st.integers(0, 1 << 18))
    kind = draw(st.sampled_from([GuestType.PVH, GuestType.HVM]))
    return guest(*requests, memory=memory, guest_type=kind), arch


def chosen(config: GuestConfig, arch: Arch) -> GuestConfig:
    """Place all, or give the example up: there is no room for it."""
    try:
        return placed(config, arch, sizes={})
    except ConfigError as err:
        assume("no free range left" not in err.message)
        raise


def meet(one: RegionRequest, other: RegionRequest) -> bool:
    return one.first_gfn < other.end_gfn and other.first_gfn < one.end_gfn


@given(guests())
def test_what_is_chosen_is_free_aligned_and_apart(made: tuple[GuestConfig, Arch]) -> None:
    config, arch = made
    found = chosen(config, arch).requests
    taken = (*layout.ram(arch, config), *layout.reserved(arch, config))
    for index, (asked, given_) in enumerate(zip(config.requests, found, strict=True)):
        if asked.first_gfn != UNPLACED:
            assert given_ == asked
            continue
        assert given_ == dataclasses.replace(asked, first_gfn=given_.first_gfn)
        assert not any(window.overlaps(given_.first_gfn, given_.end_gfn) for window in taken)
        assert not any(meet(given_, other) for other in found[:index] + found[index + 1 :])
        assert given_.nr_frames < 512 or given_.first_gfn % 512 == 0
        assert given_.end_gfn <= gfn_of(1 << 40) or arch is Arch.X86_64


@given(guests(), st.data())
def test_what_is_added_at_the_end_moves_nothing(
    made: tuple[GuestConfig, Arch], data: st.DataObject
) -> None:
    config, arch = made
    found = chosen(config, arch).requests
    added = data.draw(entries(len(found), arch))
    # What says the very frames that were chosen for another has them.
    assume(added.first_gfn == UNPLACED or not any(meet(added, one) for one in found))
    longer = dataclasses.replace(config, requests=(*config.requests, added))
    assert chosen(longer, arch).requests[:-1] == found


@given(guests())
def test_it_is_the_same_every_time(made: tuple[GuestConfig, Arch]) -> None:
    config, arch = made
    once = chosen(config, arch)
    assert placed(config, arch, sizes={"other": 5}) == once
    assert placed(once, arch, sizes={}) == once
