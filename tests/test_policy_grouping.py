# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests linked by regions have one holder, and what cannot have one is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.errors import Conflict
from xshmd.model import Guest, GuestConfig, GuestState, Region, RegionRequest, Role
from xshmd.policy.grouping import choose_holder, linked_regions
from xshmd.units import DomId, Gfn

IDS = st.sampled_from("abcdefgh")
MEMBERSHIPS = st.lists(st.tuples(st.sampled_from("VWXYZ"), st.sets(IDS, max_size=3)), max_size=8)


def requests(ids: str) -> tuple[RegionRequest, ...]:
    return tuple(
        RegionRequest(region_id=one, first_gfn=Gfn(16 * i), nr_frames=1, role=Role.BORROWER)
        for i, one in enumerate(ids)
    )


def config(name: str, ids: str) -> GuestConfig:
    return GuestConfig(name=name, requests=requests(ids))


def region(region_id: str, holder: str) -> Region:
    return Region(
        region_id=region_id, nr_frames=1, holder_uuid=holder, holder_first_gfn=Gfn(0), ready=True
    )


def guest(
    name: str, ids: str, holder: str, state: GuestState = GuestState.ATTACHED, domid: int = 1
) -> Guest:
    return Guest(
        domid=DomId(domid), uuid="u", name=name, generation=name, state=state, holder_uuid=holder,
        requests=requests(ids),
    )  # fmt: skip


def test_links_go_over_many_guests() -> None:
    memberships = [("V", "ab"), ("W", "bc"), ("X", "cd"), ("Y", "ef")]
    assert linked_regions("a", memberships) == set("abcd")
    assert linked_regions("e", memberships) == set("ef")
    assert linked_regions("z", memberships) == {"z"}
    assert linked_regions("", memberships) == set()


def test_one_guest_said_twice_is_one_guest() -> None:
    assert linked_regions("a", [("V", "a"), ("V", "b")]) == set("ab")


@settings(deadline=None)
@given(st.sets(IDS), MEMBERSHIPS)
def test_linked_is_a_closure(wanted: set[str], memberships: list[tuple[str, set[str]]]) -> None:
    found = linked_regions(wanted, memberships)
    assert wanted <= found
    assert linked_regions(found, memberships) == found
    per_guest: dict[str, set[str]] = {}
    for name, ids in memberships:
        per_guest.setdefault(name, set()).update(ids)
    for ids in per_guest.values():
        assert not ids & found or ids <= found


@settings(deadline=None)
@given(IDS, IDS, MEMBERSHIPS)
def test_linked_is_mutual(one: str, other: str, memberships: list[tuple[str, set[str]]]) -> None:
    there = other in linked_regions({one}, memberships)
    assert there == (one in linked_regions({other}, memberships))


def test_the_first_of_all_gets_a_new_holder() -> None:
    assert choose_holder(config("V", "ab"), known=[], regions=[], guests=[]) is None


def test_a_region_that_exists_decides() -> None:
    there = [region("a", "H1"), region("z", "H2")]
    assert choose_holder(config("V", "ab"), known=[], regions=there, guests=[]) == "H1"


def test_a_link_only_in_files_decides_too() -> None:
    found = choose_holder(
        config("V", "b"), known=[config("W", "ab")], regions=[region("a", "H1")], guests=[]
    )
    assert found == "H1"


def test_a_link_by_a_guest_that_lives() -> None:
    found = choose_holder(
        config("V", "b"), known=[], regions=[region("a", "H1")], guests=[guest("W", "ab", "H1")]
    )
    assert found == "H1"


def test_wanted_goes_before_linked() -> None:
    found = choose_holder(
        config("V", "bc"),
        known=[config("W", "ab")],
        regions=[region("a", "H1"), region("c", "H2")],
        guests=[],
    )
    assert found == "H2"


def test_linked_to_several_by_files_is_the_same_whenever_asked() -> None:
    known = [config("W", "ab"), config("X", "cb")]
    there = [region("a", "H2"), region("c", "H1")]
    found = {
        choose_holder(config("V", "b"), known=order, regions=regions, guests=[])
        for order in (known, known[::-1])
        for regions in (there, there[::-1])
    }
    assert len(found) == 1
    assert found <= {"H1", "H2"}


def test_two_that_live_cannot_be_joined() -> None:
    with pytest.raises(Conflict) as caught:
        choose_holder(
            config("V", "ac"),
            known=[],
            regions=[region("a", "H1"), region("c", "H2")],
            guests=[guest("W", "a", "H1"), guest("X", "a", "H1"), guest("Y", "c", "H2")],
        )
    assert "a with W and X, c with Y" in caught.value.message
    assert caught.value.facts["guest"] == "V"
    assert caught.value.hint


def test_what_its_own_file_or_former_life_said_does_not_link() -> None:
    found = choose_holder(
        config("V", "b"),
        known=[config("V", "ab")],
        regions=[region("a", "H1")],
        guests=[],
    )
    assert found is None


def test_a_region_about_to_be_made_is_where_its_first_guest_is() -> None:
    """A guest is recorded with its holder before its regions are made."""
    begun = guest("W", "a", "H1", GuestState.ATTACHING)
    assert choose_holder(config("V", "a"), known=[], regions=[], guests=[begun]) == "H1"


def test_a_guest_without_regions_needs_none() -> None:
    assert choose_holder(config("V", ""), known=[], regions=[region("a", "H")], guests=[]) is None
