# SPDX-License-Identifier: LGPL-2.1-or-later
"""A plan says all that is to be done, from records alone; or every rule that is broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from xshmd.errors import ConfigError, Conflict, Refused, XshmError
from xshmd.machine import Arch, HostInfo
from xshmd.model import (
    UNPLACED,
    WHOLE_REGION,
    CachePolicy,
    Guest,
    GuestConfig,
    GuestState,
    Lifetime,
    Place,
    Prot,
    Region,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Snapshot,
)
from xshmd.policy.plan import GuestPlan, NewRegion, plan_guest
from xshmd.units import DomId, Gfn, gfn_of

AT = gfn_of(0x10_0000_0000)
HOST = HostInfo(
    arch=Arch.X86_64, xen_version=(4, 20), xen_extra=".4", xen_command_line="", has_hvm=True,
    has_hap=True, free_pages=1 << 18, total_pages=1 << 20,
)  # fmt: skip
H = "7873686d-6401-8000-8000-000000000001"


def entry(region_id: str, frames: int = 4, role: Role = Role.OWNER, at: int = 0) -> RegionRequest:
    return RegionRequest(
        region_id=region_id, first_gfn=Gfn(AT + at), nr_frames=frames, role=role,
        place=Place(file="vm.cfg", key=f"static_shm[{at}]"),
    )  # fmt: skip


def borrow(region_id: str, frames: int = 4, at: int = 0, offset: int = 0) -> RegionRequest:
    return dataclasses.replace(entry(region_id, frames, Role.BORROWER, at), offset_frames=offset)


def config(name: str, *requests: RegionRequest) -> GuestConfig:
    return GuestConfig(name=name, memory_mib=64, requests=requests)


def region(region_id: str, frames: int = 4, owner: str = "a") -> Region:
    return Region(
        region_id=region_id, nr_frames=frames, holder_uuid=H, holder_first_gfn=Gfn(0x40200),
        owner=owner, ready=True, lifetime=Lifetime.OWNER if owner else Lifetime.SYSTEM,
    )  # fmt: skip


def plan(
    wanted: GuestConfig,
    snapshot: Snapshot | None = None,
    known: Sequence[GuestConfig] = (),
    defined: Sequence[RegionConfig] = (),
) -> GuestPlan:
    return plan_guest(
        wanted, host=HOST, snapshot=snapshot or Snapshot(), known=known, defined=defined
    )


def test_an_owner_makes_its_regions() -> None:
    wanted = config("a", entry("r", 4), entry("s", 9, at=64))
    found = plan(wanted)
    assert found.holder_uuid is None
    assert found.new_regions == (
        NewRegion(region_id="r", nr_frames=4, owner="a"),
        NewRegion(region_id="s", nr_frames=9, owner="a"),
    )
    assert found.requests == wanted.requests
    assert found.config == wanted


def test_a_borrower_first_makes_it_as_large_as_its_owner_says() -> None:
    owner = config("a", entry("r", 9))
    found = plan(config("b", borrow("r", 2, offset=3)), known=[owner])
    assert found.new_regions == (NewRegion(region_id="r", nr_frames=9, owner="a"),)


def test_what_exists_is_not_made_again() -> None:
    found = plan(config("b", borrow("r")), Snapshot(regions=(region("r"),)))
    assert found.new_regions == ()
    assert found.holder_uuid == H


def test_an_owner_that_comes_second() -> None:
    found = plan(config("a", entry("r")), Snapshot(regions=(region("r"),)))
    assert found.new_regions == ()


def test_a_systems_region_is_made_for_the_first_that_wants_it() -> None:
    terms = RegionTerms(prot=Prot.RW)
    defined = RegionConfig(region_id="r", nr_frames=9, terms=terms)
    found = plan(config("b", borrow("r", 2)), defined=[defined])
    assert found.new_regions == (
        NewRegion(
            region_id="r", nr_frames=9, owner="", lifetime=Lifetime.SYSTEM, terms=terms,
            from_file=True,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("lifetime", [None, Lifetime.OWNER, Lifetime.MEMBERS])
def test_an_owners_terms_are_the_regions(lifetime: Lifetime | None) -> None:
    wanted = dataclasses.replace(
        entry("r"), cache_policy=CachePolicy.X86_NORMAL, terms=RegionTerms(lifetime=lifetime)
    )
    (new,) = plan(config("a", wanted)).new_regions
    assert new.lifetime is (lifetime or Lifetime.OWNER)
    assert new.terms.cache_policy is CachePolicy.X86_NORMAL
    assert not new.from_file


def test_its_own_file_is_not_another_guest() -> None:
    wanted = config("a", entry("r", 4))
    assert plan(wanted, known=[wanted, config("a", entry("r", 8))]).new_regions[0].nr_frames == 4


def test_nothing_wanted_is_nothing_to_do() -> None:
    found = plan(config("a"))
    assert (found.new_regions, found.requests) == ((), ())


@pytest.mark.parametrize(
    ("wanted", "snapshot", "known", "kind"),
    [
        (config("b", borrow("r")), Snapshot(), (), ConfigError),
        (config("b", borrow("r", 5)), Snapshot(regions=(region("r"),)), (), ConfigError),
        (config("b", borrow("r", 2, offset=3)), Snapshot(regions=(region("r"),)), (), ConfigError),
        (config("a", entry("r", 5)), Snapshot(regions=(region("r"),)), (), Conflict),
        (config("x", entry("r")), Snapshot(regions=(region("r"),)), (), Conflict),
        (config("x", entry("r")), Snapshot(), (config("a", entry("r")),), Conflict),
        (config("a", entry("r"), entry("s", at=2)), Snapshot(), (), ConfigError),
        (config("a", dataclasses.replace(entry("r"), prot=Prot.RO)), Snapshot(), (), Refused),
    ],
    ids=["no owner", "too large", "past the end", "other size", "other owner", "two owners",
         "overlap", "read-only"],
)  # fmt: skip
def test_what_is_refused(
    wanted: GuestConfig,
    snapshot: Snapshot,
    known: tuple[GuestConfig, ...],
    kind: type[XshmError],
) -> None:
    with pytest.raises(kind):
        plan(wanted, snapshot, known)


def test_every_broken_rule_is_said() -> None:
    wanted = config("a", dataclasses.replace(entry("r"), prot=Prot.RO), borrow("s", at=64))
    with pytest.raises(XshmError) as caught:
        plan(wanted)
    said = " ".join([caught.value.message, *getattr(caught.value, "__notes__", ())])
    assert "read-only" in said or "prot=ro" in said
    assert "nobody defines" in said


def test_a_guest_that_lives_counts_as_it_was_made() -> None:
    """Its file has been edited since; the region keeps the size it has."""
    alive = Guest(
        domid=DomId(1), uuid="u", name="a", generation="g", state=GuestState.ATTACHED,
        holder_uuid=H, requests=(entry("r", 4),),
    )  # fmt: skip
    snapshot = Snapshot(guests=(alive,), regions=(region("r"),))
    edited = config("a", entry("r", 64))
    assert plan(config("b", borrow("r")), snapshot, [edited]).holder_uuid == H
    with pytest.raises(ConfigError):
        plan(config("b", borrow("r", 64)), snapshot, [edited])


def test_a_plan_changes_nothing_it_was_given() -> None:
    snapshot = Snapshot(regions=(region("r"),))
    before = repr(snapshot)
    plan(config("b", borrow("r")), snapshot)
    assert repr(snapshot) == before


def test_what_a_borrower_leaves_to_us_follows_from_a_region_that_only_exists() -> None:
    open_request = dataclasses.replace(
        borrow("r", offset=1), first_gfn=UNPLACED, nr_frames=WHOLE_REGION
    )
    found = plan(config("b", open_request), Snapshot(regions=(region("r", 4),)))
    (request,) = found.requests
    assert (request.nr_frames, request.first_gfn) == (3, 0x1000000)
