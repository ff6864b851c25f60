# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one guest writes, the others read: the whole point."""

from __future__ import annotations

import pytest

from integration.scenarios.guest import FREE_WORD, MIB, PAGE, Entry, tag
from integration.scenarios.host import Host


def test_two_bare_metal_guests_talk_both_ways(host: Host) -> None:
    """Two guests without an OS find the same MiB at the frame their configurations name, from
    their first instruction on, and hear each other."""
    region = host.unique("demo")
    writer = host.guest("writer", Entry(region, host.at), do="fill,ping")
    reader = host.guest(
        "reader", Entry(region, host.at, role="borrower"), do="await-fill,check,pong", slot=1
    )
    host.create(writer)
    host.create(reader)
    host.wait_said(reader, "checked pages=256 bad=0 seed=7")
    host.wait_said(writer, r"ping rounds=100 .*")
    host.wait_said(reader, r"pong rounds=100 .*")
    host.destroy(writer, reader)


def test_linux_and_bare_metal_talk(host: Host) -> None:
    """A Linux guest and a guest without an OS share a region: no driver on either side."""
    region, size = host.unique("demo"), 16 * PAGE
    metal = host.guest("metal", Entry(region, host.at, size), do="fill,pong", seed=9, ticks=5)
    linux = host.guest(
        "linux", Entry(region, host.at, size, role="borrower"), do="await-fill,check,ping",
        slot=1, seed=9, ticks=5, linux=True,
    )  # fmt: skip
    host.create(metal)
    host.create(linux)
    host.wait_said(linux, "checked pages=16 bad=0 seed=9")
    host.wait_said(linux, "ping rounds=5 .*")
    host.wait_said(metal, "pong rounds=5 .*")
    host.destroy(linux, metal)


def test_three_borrowers_one_of_them_sees_a_part(host: Host) -> None:
    """Every borrower sees the owner's memory; one with offset and size sees that part of it and
    not a byte more."""
    region, offset = host.unique("demo"), 16
    owner = host.guest("owner", Entry(region, host.at), do="fill,beat")
    whole = [
        host.guest(
            "whole", Entry(region, host.at, role="borrower"), do="await-fill,check", slot=slot
        )
        for slot in (1, 2)
    ]
    part = host.guest(
        "part", Entry(region, host.at, 4 * PAGE, "borrower", f"offset={offset * PAGE:#x}"),
        do="peek,check", slot=3,
    )  # fmt: skip
    host.create(owner)
    host.wait_said(owner, "filled .*")
    # Its free word belongs to nobody: what dom0 writes there only a guest with that frame can see.
    host.poke(region, offset, FREE_WORD, 0xFEED0010)
    host.create_all(*whole, part)
    for guest in whole:
        host.wait_said(guest, "checked pages=256 bad=0 seed=7")
    host.wait_said(part, f"peek addr={host.at:#x} word=0xfeed0010")
    first = f"{tag(offset, 7):#x}"
    host.wait_said(part, f"bad page=0 first={first} last={first} .*")
    host.wait_said(part, "checked pages=4 bad=4 seed=7")
    members = {member["guest"]: member for member in host.region(region)["members"]}
    assert members[part.name]["offsetFrames"] == offset
    assert members[part.name]["frameCount"] == 4
    assert len(members) == 4
    host.destroy(owner, *whole, part)


@pytest.mark.arch("arm64")
def test_a_part_ends_where_it_ends(host: Host) -> None:
    """A borrower of four frames that touches the fifth faults: nothing of the rest is there."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at), do="fill,beat")
    curious = host.guest(
        "curious", Entry(region, host.at, 4 * PAGE, "borrower"), do="await-fill,check", slot=1,
        shm=f"shm={host.at:#x},{5 * PAGE:#x}", lines=('on_crash = "preserve"',),
    )  # fmt: skip
    host.create(owner)
    host.create(curious)
    fault = host.wait_said(curious, "fault addr=.*")
    assert int(fault.split()[1].partition("=")[2], 16) // PAGE == host.at // PAGE + 4
    host.destroy(curious, owner)


def test_large_region_every_page(host: Host) -> None:
    """256 MiB and a page: more frames than fit the hypercall's 16-bit count, every one right."""
    region, size = host.unique("large"), 256 * MIB + PAGE
    writer = host.guest("writer", Entry(region, host.at_large, size), do="fill")
    reader = host.guest(
        "reader", Entry(region, host.at_large, size, "borrower"), do="await-fill,check", slot=1
    )
    host.create(writer)
    host.create(reader)
    host.wait_said(writer, "filled pages=65537 seed=7")
    host.wait_said(reader, "checked pages=65537 bad=0 seed=7")
    host.destroy(writer, reader)


def test_fresh_region_is_zero(host: Host) -> None:
    """Nobody sees what was in the memory before: a region is zero when its first guest starts."""
    region = host.unique("clean")
    for _ in range(2):  # the second has, most likely, the frames the first left its tags in
        guest = host.guest("first", Entry(region, host.at, 2 * MIB), do="fill")
        host.create(guest, "-p")
        record = host.region(region)
        frames = record["holderDomainId"], record["holderFirstFrame"], 512
        assert host.ask("nonzero_bytes", *frames) == 0
        host.xl("unpause", guest.name)
        host.wait_said(guest, "filled .*")
        assert host.ask("nonzero_bytes", *frames) > 0
        host.destroy(guest)
        host.wait(lambda: not host.regions(), "the region is freed")


def test_region_elsewhere_and_two_regions(host: Host) -> None:
    """A region may be at any free place, and a guest may have several."""
    one, two = host.unique("one"), host.unique("two")
    both = host.guest(
        "both", Entry(one, host.at_elsewhere), Entry(two, host.at, 8 * PAGE), do="fill:0,fill:1"
    )
    first = host.guest("first", Entry(one, host.at, role="borrower"), do="await-fill,check", slot=1)
    second = host.guest(
        "second", Entry(two, host.at_elsewhere, 8 * PAGE, "borrower"), do="await-fill,check", slot=2
    )
    host.create_all(both, first, second)
    host.wait_said(first, "checked pages=256 bad=0 seed=7")
    host.wait_said(second, "checked pages=8 bad=0 seed=7")
    host.destroy(both, first, second)
