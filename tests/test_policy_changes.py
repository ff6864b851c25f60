# SPDX-License-Identifier: LGPL-2.1-or-later
"""A plan of changes is decided from records alone; what files say now is compared with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from xshmd.changes import AddRegion, AttachRegion, Change, DetachRegion, RemoveRegion
from xshmd.declarations import Declarations
from xshmd.errors import Conflict, NoSuchGuest, XshmError
from xshmd.machine import Arch, DomainInfo, HostInfo
from xshmd.model import (
    UNPLACED,
    WHOLE_REGION,
    Guest,
    GuestConfig,
    GuestState,
    GuestType,
    Lifetime,
    Place,
    Region,
    RegionConfig,
    RegionRequest,
    Role,
    Snapshot,
)
from xshmd.policy.changes import ChangePlan, LiveDomain, plan_changes
from xshmd.policy.desired import differences
from xshmd.policy.grouping import Homes, Link, assign_homes, is_new_home
from xshmd.units import DomId, Gfn, gfn_of

AT = gfn_of(0x10_0000_0000)
HOST = HostInfo(
    arch=Arch.X86_64, xen_version=(4, 20), xen_extra=".4", xen_command_line="", has_hvm=True,
    has_hap=True, free_pages=1 << 18, total_pages=1 << 20,
)  # fmt: skip
H1 = "7873686d-6401-8000-8000-000000000001"
H2 = "7873686d-6401-8000-8000-000000000002"
OURS = "/etc/xshmd/guests.d/a.toml"


def borrow(region_id: str, frames: int = 4, at: int = 0, file: str = "vm.cfg") -> RegionRequest:
    return RegionRequest(
        region_id=region_id, first_gfn=Gfn(AT + at), nr_frames=frames, role=Role.BORROWER,
        place=Place(file=file),
    )  # fmt: skip


def guest(
    domid: int, name: str, *requests: RegionRequest, holder: str = H1,
    state: GuestState = GuestState.ATTACHED,
) -> Guest:  # fmt: skip
    return Guest(
        domid=DomId(domid), uuid=f"{domid:08x}-0000-4000-8000-000000000000", name=name,
        generation=f"g{domid}", state=state, holder_uuid=holder, requests=requests,
    )  # fmt: skip


def region(region_id: str, frames: int = 4, holder: str = H1, **more: object) -> Region:
    usual: dict[str, object] = {"lifetime": Lifetime.SYSTEM, "ready": True}
    return Region(
        region_id=region_id, nr_frames=frames, holder_uuid=holder, holder_first_gfn=Gfn(0x40200),
        **(usual | more),  # type: ignore[arg-type]
    )  # fmt: skip


def domain(one: Guest, **more: object) -> LiveDomain:
    usual: dict[str, object] = {
        "hvm": True, "hap": True, "paused": False, "shut_down": False, "shutdown_reason": 0xFF,
        "dying": False, "tot_pages": 1024, "max_pages": 1280, "max_vcpu_id": 0,
        "nr_online_vcpus": 1, "cpu_time_ns": 1, "gpaddr_bits": 46,
    }  # fmt: skip
    info = DomainInfo(domid=one.domid, uuid=one.uuid, **(usual | more))  # type: ignore[arg-type]
    return LiveDomain(info=info, name=one.name, guest_type=GuestType.PVH)


A, B = guest(1, "a", borrow("r")), guest(2, "b", borrow("s"), holder=H2)
SNAPSHOT = Snapshot(regions=(region("r"), region("s", holder=H2)), guests=(A, B))


def plan(*changes: Change, snapshot: Snapshot = SNAPSHOT, **more: Sequence[object]) -> ChangePlan:
    domains = [domain(one) for one in snapshot.guests]
    return plan_changes(
        changes, host=HOST, snapshot=snapshot, **({"domains": domains} | more)  # type: ignore[arg-type]
    )  # fmt: skip


def give(name: str, request: RegionRequest) -> AttachRegion:
    return AttachRegion(guest=name, request=request)


# -- plans ----------------------------------------------------------------------------------------


def test_order_does_not_matter() -> None:
    changes: list[Change] = [
        RemoveRegion(region_id="r", force=True), give("a", borrow("n", at=64)),
        AddRegion(config=RegionConfig(region_id="n", nr_frames=4)),
    ]  # fmt: skip
    found = plan(*changes)
    assert plan(*reversed(changes)) == found
    assert [step.verb for step in found.steps] == ["create", "attach", "detach", "remove"]
    assert [(new.region_id, home) for new, home in found.creates] == [("n", H1)]
    assert found.removes == ("r",)


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan() == ChangePlan()


def test_a_layout_is_the_files_where_there_is_one() -> None:
    """Xen says how much memory it may have, not where its devices are."""
    late = dataclasses.replace(guest(7, "late"), requests=(), generation="")
    config = GuestConfig(name="late", guest_type=GuestType.HVM, memory_mib=64)
    low = dataclasses.replace(borrow("r"), first_gfn=gfn_of(0x9000_0000))
    by_xen = domain(late)
    assert plan(give("late", low), domains=[by_xen]).guests[0].is_late
    with pytest.raises(XshmError, match="PCI"):
        plan(give("late", low), domains=[dataclasses.replace(by_xen, config=config)])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"hvm": False, "hap": False}, "PV guest"),
        ({"hap": False}, "hap=0"),
        ({"gpaddr_bits": 36}, "bits"),
        ({"max_pages": (0x10_0000_0000 >> 12) + 0x10000}, "RAM"),
        ({"dying": True}, "no guest"),
    ],
)
def test_what_xen_says_of_a_late_guest_counts(more: dict[str, object], words: str) -> None:
    late = dataclasses.replace(guest(7, "late"), requests=(), generation="")
    with pytest.raises(XshmError, match=words):
        plan(give("late", borrow("r")), domains=[domain(late, **more)])


def test_a_number_that_is_another_domains_by_now() -> None:
    other = dataclasses.replace(A, uuid=H2)
    with pytest.raises(NoSuchGuest):
        plan(give("a", borrow("n", at=64)), AddRegion(config=RegionConfig(
            region_id="n", nr_frames=4)), domains=[domain(other)],
        )  # fmt: skip


@pytest.mark.parametrize("state", [s for s in GuestState if s is not GuestState.ATTACHED])
def test_a_guest_that_comes_or_goes_is_left_alone(state: GuestState) -> None:
    snapshot = dataclasses.replace(SNAPSHOT, guests=(dataclasses.replace(A, state=state),))
    with pytest.raises(Conflict, match=r"is (rebooting|being)"):
        plan(give("a", borrow("n")), snapshot=snapshot)
    removal = RemoveRegion(region_id="r", force=True)
    if state is GuestState.REBOOTING:
        assert "when it comes back" in plan(removal, snapshot=snapshot).steps[0].text
    else:
        with pytest.raises(Conflict, match="is being"):
            plan(removal, snapshot=snapshot)


def test_of_two_guests_of_one_name_the_number_decides() -> None:
    old, new = guest(1, "a", borrow("r")), guest(9, "a", borrow("r"))
    snapshot = dataclasses.replace(SNAPSHOT, guests=(old, new))
    assert plan(DetachRegion(guest="a", region_id="r"), snapshot=snapshot).guests[0].guest is new
    assert plan(DetachRegion(guest="1", region_id="r"), snapshot=snapshot).guests[0].guest is old


# -- homes ----------------------------------------------------------------------------------------


def homes(new: Sequence[str], *links: Link, known: Sequence[GuestConfig] = ()) -> Homes:
    return assign_homes(
        new, links, known=known, regions=SNAPSHOT.regions, guests=SNAPSHOT.guests
    )  # fmt: skip


def link(name: str, *region_ids: str, holder: str = "") -> Link:
    return Link(guest=name, holder_uuid=holder, region_ids=frozenset(region_ids))


def test_a_new_region_goes_where_its_members_are() -> None:
    found = homes(["n"], link("late", "n"), link("a", "n", holder=H1))
    assert (found.regions, found.guests) == ({"n": H1}, {"late": H1, "a": H1})


def test_links_reach_however_many_steps_far() -> None:
    found = homes(["x", "y", "z"], link("p", "x", "y"), link("q", "y", "z"), link("o", "z", "s"))
    assert set(found.regions.values()) == {H2}


def test_what_nothing_links_is_apart() -> None:
    found = homes(["x", "y"], link("p", "x"), link("q", "y"))
    assert all(is_new_home(home) for home in found.regions.values())
    assert len(set(found.regions.values())) == 2


def test_what_files_link_is_together() -> None:
    both = GuestConfig(name="both", requests=(borrow("x"), borrow("y", at=64)))
    assert len(set(homes(["x", "y"], known=[both]).regions.values())) == 1
    near = GuestConfig(name="near", requests=(borrow("x"), borrow("s", at=64)))
    assert homes(["x"], known=[near]).regions == {"x": H2}


@pytest.mark.parametrize(
    "links",
    [
        [link("a", "s", holder=H1)],
        [link("late", "r", "s")],
        [link("a", "n", holder=H1), link("b", "n", holder=H2)],
        [link("late", "n", "r"), link("b", "n", holder=H2)],
    ],
)
def test_holders_cannot_be_joined(links: list[Link]) -> None:
    with pytest.raises(Conflict) as caught:
        homes(["n"], *links)
    assert caught.value.hint


# -- what files say -------------------------------------------------------------------------------


def declared(*guests: GuestConfig, regions: Sequence[RegionConfig] = ()) -> Declarations:
    return Declarations(guests=guests, regions=tuple(regions))


def said(name: str, *requests: RegionRequest) -> GuestConfig:
    place = Place(file=OURS)
    return GuestConfig(
        name=name, requests=tuple(dataclasses.replace(one, place=place) for one in requests)
    )


def made(*requests: RegionRequest) -> Snapshot:
    return Snapshot(guests=(guest(1, "a", *said("a", *requests).requests),))


def test_the_same_is_no_difference() -> None:
    now = declared(said("a", borrow("r")))
    assert differences(now, now, made(borrow("r"))) == ((), {})


def test_choices_left_to_us_are_no_difference() -> None:
    open_one = dataclasses.replace(borrow("r"), first_gfn=UNPLACED, nr_frames=WHOLE_REGION)
    now = declared(said("a", open_one))
    assert differences(now, now, made(borrow("r"))) == ((), {})


@pytest.mark.parametrize(
    "other", [borrow("r", at=64), borrow("r", 2), dataclasses.replace(borrow("r"), offset_frames=1)]
)
def test_an_entry_that_changed_goes_and_comes(other: RegionRequest) -> None:
    now = declared(said("a", other))
    changes, _ = differences(now, Declarations(), made(borrow("r")))
    assert changes == (
        DetachRegion(guest="1", region_id="r"),
        AttachRegion(guest="1", request=now.guests[0].requests[0]),
    )


def test_what_others_gave_stays() -> None:
    by_hand = guest(1, "a", *said("a", borrow("r")).requests, borrow("x", at=64, file=""))
    now = declared(said("a", borrow("r")))
    assert differences(now, now, Snapshot(guests=(by_hand,))) == ((), {})
    gone = (DetachRegion(guest="1", region_id="r"),)
    assert differences(declared(), now, Snapshot(guests=(by_hand,))) == (gone, {})


def test_guests_that_do_not_run_are_left_alone() -> None:
    snapshot = Snapshot(guests=(dataclasses.replace(A, state=GuestState.REBOOTING),))
    assert differences(declared(said("a", borrow("z"))), Declarations(), snapshot) == ((), {})


def test_a_region_that_is_defined_no_more() -> None:
    mine = region("r", from_file=True)
    lonely = Snapshot(regions=(mine,))
    removal = (RemoveRegion(region_id="r"),)
    assert differences(declared(), declared(), lonely) == (removal, {})
    used = dataclasses.replace(lonely, guests=(A,))
    assert differences(declared(), declared(), used) == ((), {"r": Lifetime.MEMBERS})
    back = declared(regions=[RegionConfig(region_id="r", nr_frames=4)])
    leaving = Snapshot(regions=(dataclasses.replace(mine, lifetime=Lifetime.MEMBERS),), guests=(A,))
    assert differences(back, declared(), leaving) == ((), {"r": Lifetime.SYSTEM})
    by_hand = Snapshot(regions=(region("r"),))
    assert differences(declared(), declared(), by_hand) == ((), {})
