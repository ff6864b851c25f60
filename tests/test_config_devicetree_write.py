# SPDX-License-Identifier: LGPL-2.1-or-later
"""Declarations as a device tree: read back they are the same, and what is not is said."""

import dataclasses

import pytest
from dts_trees import DATA, decompiled
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.config.devicetree import DOM0, read_devicetree
from xshmd.config.devicetree_write import render_dts
from xshmd.declarations import Declarations, EventChannel
from xshmd.machine import Arch
from xshmd.model import (
    NOWHERE,
    UNPLACED,
    WHOLE_REGION,
    Backing,
    CachePolicy,
    GuestConfig,
    GuestType,
    Isolation,
    Lifetime,
    Prot,
    ProtEnforcement,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import Gfn

HOST = RegionTerms(backing=Backing.HOST, host_first_mfn=0x8000)


def request(region_id: str = "r", role: Role = Role.BORROWER, **more: object) -> RegionRequest:
    usual = RegionRequest(region_id=region_id, first_gfn=Gfn(0x3A000), nr_frames=16, role=role)
    return dataclasses.replace(usual, **more)  # type: ignore[arg-type]


def guest(*requests: RegionRequest, name: str = "u1", **more: object) -> GuestConfig:
    return dataclasses.replace(GuestConfig(name=name, requests=requests), **more)  # type: ignore[arg-type]


def said(*guests: GuestConfig, regions: tuple[RegionConfig, ...] = ()) -> Declarations:
    return Declarations(guests=guests, regions=regions)


def region(region_id: str = "r", **terms: object) -> RegionConfig:
    return RegionConfig(
        region_id=region_id, nr_frames=16, terms=RegionTerms(**terms)  # type: ignore[arg-type]
    )  # fmt: skip


def placeless(declarations: Declarations) -> Declarations:
    """Return the declarations without their places, regions and channels in a fixed order."""
    return Declarations(
        regions=tuple(
            sorted(
                (dataclasses.replace(one, place=NOWHERE) for one in declarations.regions),
                key=lambda one: one.region_id,
            )
        ),
        guests=tuple(
            dataclasses.replace(
                one,
                place=NOWHERE,
                requests=tuple(dataclasses.replace(each, place=NOWHERE) for each in one.requests),
            )
            for one in declarations.guests
        ),
        event_channels=tuple(
            sorted(
                (dataclasses.replace(one, place=NOWHERE) for one in declarations.event_channels),
                key=lambda one: (one.guest, one.local_port),
            )
        ),
    )


def again(declarations: Declarations) -> tuple[Declarations, tuple[str, ...]]:
    """Write the declarations and read them; return what came back, and the losses."""
    text, losses = render_dts(declarations, arch=Arch.ARM64)
    decompiled(text)
    return placeless(read_devicetree(text.encode(), file="out.dts")), losses


@pytest.mark.parametrize(
    "name", ["design-2022.dts", "booting.dts", "smoke-test.dts", "event-channels.dts"]
)
def test_the_examples_come_back_as_they_were(name: str) -> None:
    declarations = read_devicetree((DATA / name).read_bytes(), file=name)
    assert again(declarations) == (placeless(declarations), ())


names = st.lists(
    st.from_regex(r"[a-zA-Z0-9,._+-]{1,20}", fullmatch=True).filter(lambda name: name != DOM0)
    | st.sampled_from([DOM0, "shared-memory-0", "shared-memory-0_", "evtchn-1"]),
    min_size=1, max_size=4, unique=True,
)  # fmt: skip
ids = st.lists(
    st.from_regex(r"[a-zA-Z0-9_@-]{1,15}", fullmatch=True), min_size=1, max_size=5, unique=True
)


@st.composite
def sayable(draw: st.DrawFn) -> Declarations:
    """Draw declarations that a device tree can say all of."""
    guests = draw(names)
    requests: dict[str, list[RegionRequest]] = {}
    regions = []
    for number, region_id in enumerate(draw(ids)):
        nr_frames = draw(st.integers(1, 1 << 20))
        members = draw(st.lists(st.sampled_from(guests), min_size=1, unique=True))
        mfn = number << 32 | draw(st.integers(0, 1 << 31))
        on_host = DOM0 in members or draw(st.booleans())
        terms = RegionTerms(backing=Backing.HOST, host_first_mfn=mfn) if on_host else RegionTerms()
        owner = draw(st.sampled_from(["", *members]))
        if not owner:
            regions.append(RegionConfig(region_id=region_id, nr_frames=nr_frames, terms=terms))
        for name in members:
            gfn = mfn if name == DOM0 else draw(st.integers(0, (1 << 52) - nr_frames))
            requests.setdefault(name, []).append(
                RegionRequest(
                    region_id=region_id,
                    first_gfn=Gfn(gfn),
                    nr_frames=nr_frames,
                    role=Role.OWNER if name == owner else Role.BORROWER,
                    terms=terms if name == owner else RegionTerms(),
                )
            )
    channels = []
    for port in range(draw(st.integers(0, 3))):
        first, second = (draw(st.sampled_from(guests)) for _ in range(2))
        here, there = 1 + 2 * port, 131071 - 2 * port
        channels += [
            EventChannel(guest=first, local_port=here, peer_guest=second, peer_port=there),
            EventChannel(guest=second, local_port=there, peer_guest=first, peer_port=here),
        ]
    return Declarations(
        regions=tuple(regions),
        guests=tuple(
            GuestConfig(
                name=name,
                requests=tuple(requests[name]),
                memory_mib=0 if name == DOM0 else draw(st.integers(0, 1 << 40)),
            )
            for name in requests
        ),
        event_channels=tuple(channels),
    )


def by_name(declarations: Declarations) -> Declarations:
    """Return them with the guests by name: /chosen's own nodes may stand before any domain."""
    guests = sorted(declarations.guests, key=lambda one: one.name)
    return dataclasses.replace(declarations, guests=tuple(guests))


@settings(max_examples=60, deadline=None)
@given(sayable())
def test_what_a_tree_can_say_comes_back(declarations: Declarations) -> None:
    found, losses = again(declarations)
    assert by_name(found) == by_name(placeless(declarations))
    assert losses == ()


@pytest.mark.parametrize(
    ("declarations", "loss"),
    [
        (said(guest(request("a23456789-123456"))),
         "region 'a23456789-123456' of guest 'u1': its id has 16 characters, more than 15"),
        (said(guest(request("a.b"))), "other than a-z A-Z 0-9 _ - @"),
        (said(guest(request(first_gfn=UNPLACED))), "no guest address yet"),
        (said(guest(request(nr_frames=WHOLE_REGION))), "nobody says how large it is"),
        (said(guest(request(prot=Prot.RO))), "prot=ro cannot be said, and would be read and write"),
        (said(guest(request()), regions=(region(prot=Prot.RO),)), "prot=ro cannot be said"),
        (said(guest(request(nr_frames=8)), regions=(region(),)), "a part of a region"),
        (said(guest(request(offset_frames=1))), "an offset cannot be said"),
        (said(guest(request()), regions=(region(transport=Transport.GRANT),)),
         "transport=grant cannot be said"),
        (said(guest(request(), name=DOM0)), "Dom0 is direct-mapped, so it needs a host address"),
        (said(guest(request(role=Role.OWNER, terms=HOST), name=DOM0)),
         "its guest address must be the host's"),
        (said(guest(request(role=Role.OWNER)), regions=(region(),)), "somebody else owns it"),
        (said(guest(request(), name="a b")), "guest 'a b': its name cannot be that of a node"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_left_out(declarations: Declarations, loss: str) -> None:
    found, losses = again(declarations)
    assert found == Declarations()
    assert loss in losses[0] or loss in losses[1]
    assert all(one.isprintable() for one in losses)


@pytest.mark.parametrize(
    ("declarations", "loss"),
    [
        (said(guest(request()), regions=(region(cache_policy=CachePolicy.X86_NORMAL),)),
         "region 'r': cache_policy=x86_normal; Xen has one, ARM_normal"),
        (said(guest(request(role=Role.OWNER, cache_policy=CachePolicy.ARM_NORMAL))),
         "region 'r' of guest 'u1': the word cache_policy; it is ARM_normal in any case"),
        (said(guest(request()), regions=(region(lifetime=Lifetime.MEMBERS),)),
         "region 'r': lifetime=members; such a region lasts until the host ends"),
        (said(guest(request()), regions=(region(isolation=Isolation.SEALED),)),
         "region 'r': isolation=sealed; Xen itself keeps such regions apart"),
        (said(guest(request(), uuid="x")), "guest 'u1': its uuid has no counterpart"),
        (said(guest(request(), guest_type=GuestType.HVM)), "type=hvm has no counterpart"),
        (said(guest(request(), maxmem_mib=7)), "maxmem has no counterpart"),
        (said(guest(request(), hap=False)), "hap=0 has no counterpart"),
        (said(guest(request(), altp2m=True)), "altp2m has no counterpart"),
        (said(guest(request(), nestedhvm=True)), "nestedhvm has no counterpart"),
        (said(guest(request()), regions=(region(), region())), "it is defined twice"),
        (said(guest(request()), regions=(region(), region("s"))),
         "region 's': without a guest that has it there is no node for it"),
    ],
)  # fmt: skip
def test_what_is_lost_without_harm_is_said(declarations: Declarations, loss: str) -> None:
    found, losses = again(declarations)
    (one,) = found.guests
    assert [(each.region_id, each.first_gfn, each.nr_frames) for each in one.requests] == [
        ("r", 0x3A000, 16)
    ]
    (said_loss,) = losses
    assert loss in said_loss


def test_prot_that_binds_nobody_is_written_and_lost() -> None:
    terms = RegionTerms(prot_enforcement=ProtEnforcement.ADVISORY)
    found, losses = again(
        said(
            guest(request(role=Role.OWNER, terms=terms)),
            guest(request(prot=Prot.RO), name="u2"),
        )
    )
    assert [one.name for one in found.guests] == ["u1", "u2"]
    assert losses == (
        "region 'r' of guest 'u1': prot_enforcement; there is no prot in a device tree",
        "region 'r' of guest 'u2': prot=ro, which is advisory; it is read and write",
    )


def test_a_whole_region_has_the_size_of_its_definition() -> None:
    found, losses = again(
        said(guest(request(role=Role.OWNER)), guest(request(nr_frames=WHOLE_REGION), name="u2"))
    )
    assert [one.requests[0].nr_frames for one in found.guests] == [16, 16]
    assert losses == ()


@pytest.mark.parametrize(
    "owner",
    [
        guest(request(role=Role.OWNER, terms=HOST, first_gfn=UNPLACED)),
        guest(request(role=Role.OWNER, terms=HOST), name="a b"),
    ],
)
def test_without_its_owner_nobody_has_a_region(owner: GuestConfig) -> None:
    """Xen would map memory that is nobody's."""
    found, losses = again(said(owner, guest(request(), name="u2")))
    assert found == Declarations()
    assert losses[-1] == "region 'r' of guest 'u2': its owner cannot be written"


def test_more_regions_than_xen_takes() -> None:
    many = [request(f"r{n}", first_gfn=Gfn(0x3A000 + 16 * n)) for n in range(34)]
    found, losses = again(said(guest(*many), guest(many[0], many[33], name="u2")))
    assert [len(one.requests) for one in found.guests] == [32, 1]
    assert losses == tuple(
        f"region '{region_id}' of guest '{name}': Xen takes 32 regions from a device tree"
        for region_id, name in (("r32", "u1"), ("r33", "u1"), ("r33", "u2"))
    )


@pytest.mark.parametrize(
    "channel",
    [
        EventChannel(guest="u1", local_port=1, peer_guest="u2", peer_port=2),
        EventChannel(guest="u1", local_port=1, peer_guest="u1", peer_port=1),
    ],
)
def test_half_a_channel_is_lost(channel: EventChannel) -> None:
    found, losses = again(Declarations(event_channels=(channel,)))
    assert found == Declarations()
    assert losses == (
        "event channel 0x1 of guest 'u1': its two ends do not name each other, or cannot be"
        " written",
    )


def test_on_x86_the_whole_tree_is_of_no_use() -> None:
    _, losses = render_dts(said(guest(request())), arch=Arch.X86_64)
    assert losses == ("the tree as a whole: Xen has static shared memory on Arm, not on x86_64",)


def test_a_guest_with_channels_has_event_channels_but_no_xenstore() -> None:
    text, _ = render_dts(
        read_devicetree((DATA / "event-channels.dts").read_bytes(), file="x"), arch=Arch.ARM64
    )
    assert text.count('xen,enhanced = "no-xenstore";') == 2
