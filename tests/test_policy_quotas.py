# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits and allow-lists: for each rule there is a host on which it alone refuses what grows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.declarations import Declarations
from xshmd.errors import ConfigError, Conflict, OutOfMemory, Refused, XshmError
from xshmd.host_policy import NO_POLICY, Allowed, HostPolicy, Limit, Limits
from xshmd.model import (
    Backing,
    Isolation,
    Lease,
    Place,
    Process,
    Prot,
    Region,
    RegionConfig,
    RegionTerms,
    Snapshot,
    Transport,
)
from xshmd.policy import quota_rules
from xshmd.policy.holdings import NOTHING, Holdings
from xshmd.policy.quota_rules import QUOTA_RULES, Growth, broken, check_lease
from xshmd.units import PAGE_SIZE, Gfn

POLICY_FILE = "/etc/xshmd/xshmd.toml"


def limit(value: int, line: int = 2) -> Limit:
    return Limit(value=value, place=Place(file=POLICY_FILE, key="limits.x", line=line))


def limits(**values: int) -> HostPolicy:
    return HostPolicy(limits=Limits(**{key: limit(value) for key, value in values.items()}))


def allow(*sets: Allowed) -> HostPolicy:
    return HostPolicy(allowed=sets)


def a_set(*guests: str, regions: tuple[str, ...] = ("*",), dom0: bool = False) -> Allowed:
    place = Place(file=POLICY_FILE, key="allow.one", line=9)
    return Allowed(name="one", guests=guests, regions=regions, dom0=dom0, place=place)


def holdings(
    guests: Mapping[str, Mapping[str, int]],
    homes: Mapping[str, str] | None = None,
    **regions: int,
) -> Holdings:
    """Return what there is; every part in a region has a place of its own."""
    places = {
        f"{guest}/{region}": Place(file=f"{guest}.cfg", line=number)
        for guest, had in guests.items()
        for number, region in enumerate(had, 1)
    }
    places |= {region: Place(file="first.cfg", line=1) for region in regions}
    return Holdings(regions=regions, guests=guests, homes=homes or {}, places=places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A host on which one rule is broken."""

    rule: str
    policy: HostPolicy
    before: Holdings = NOTHING
    after: Holdings
    free_bytes: int | None = None

    def __str__(self) -> str:
        return self.rule


PAIR = holdings({"a": {"r": 4}, "b": {"r": 4}}, r=4)
CHAIN = holdings({"a": {"r": 4}, "b": {"r": 4, "s": 2}, "c": {"s": 2}}, r=4, s=2)
TWO_SETS = allow(a_set("a", "b"), a_set("b", "c"))
CASES = (
    Case(rule="too-many-regions", policy=limits(regions=1), after=holdings({}, r=1, s=1)),
    Case(rule="too-much-memory", policy=limits(memory=5), after=holdings({}, r=4, s=2)),
    Case(
        rule="too-many-regions-of-guest",
        policy=limits(regions_per_guest=1),
        after=holdings({"a": {"r": 1, "s": 1}}, r=1, s=1),
    ),
    Case(
        rule="too-much-memory-of-guest",
        policy=limits(memory_per_guest=5),
        after=holdings({"a": {"r": 4, "s": 2}}, r=4, s=2),
    ),
    Case(rule="too-many-members", policy=limits(members=1), after=PAIR),
    Case(
        rule="free-memory-floor",
        policy=limits(free_memory=7),
        after=holdings({}, r=4),
        free_bytes=10 * PAGE_SIZE,
    ),
    Case(rule="not-allowed", policy=allow(a_set("b*")), after=holdings({"a": {"r": 1}}, r=1)),
    Case(
        rule="not-allowed",
        policy=allow(a_set("a", regions=("s",))),
        after=holdings({"a": {"r": 1}}, r=1),
    ),
    Case(rule="not-allowed-together", policy=allow(a_set("a"), a_set("b")), after=PAIR),
    Case(
        rule="not-allowed-together",
        policy=allow(a_set("a", "b", regions=("s",)), a_set("*", regions=("t",)),
                     a_set("a", regions=("r",)), a_set("b", regions=("r",))),
        after=PAIR,
    ),
    Case(
        rule="not-allowed-in-group",
        policy=TWO_SETS,
        before=holdings({"a": {"r": 4}, "b": {"r": 4}}, r=4),
        after=CHAIN,
    ),
    Case(
        rule="not-allowed-in-group",
        policy=TWO_SETS,
        before=holdings({"a": {}}, {"a": "h"}),
        after=holdings({"a": {}, "c": {"s": 2}}, {"a": "h", "c": "h"}, s=2),
    ),
)  # fmt: skip
GOOD = (
    Case(rule="", policy=NO_POLICY, after=CHAIN),
    Case(rule="", policy=limits(regions=2, memory=6, members=2), after=CHAIN),
    Case(rule="", policy=limits(regions_per_guest=2, memory_per_guest=6), after=CHAIN),
    Case(
        rule="", policy=limits(free_memory=6), after=holdings({}, r=4), free_bytes=10 * PAGE_SIZE
    ),
    Case(rule="", policy=limits(free_memory=99), after=holdings({}, r=0), free_bytes=0),
    Case(rule="", policy=limits(free_memory=99), after=PAIR),
    Case(rule="", policy=allow(a_set("[a-c]")), after=CHAIN),
    Case(rule="", policy=TWO_SETS, after=PAIR),
    Case(
        rule="", policy=TWO_SETS, before=holdings({"a": {"r": 4}, "b": {"r": 4}}, r=4),
        after=dataclasses.replace(CHAIN, closed=frozenset({"s"})),
    ),
    Case(
        rule="", policy=TWO_SETS, before=holdings({"a": {"r": 4}, "b": {"r": 4}}, r=4),
        after=dataclasses.replace(
            holdings(CHAIN.guests, dict.fromkeys("abc", "h"), r=4, s=2), closed=frozenset("rs")
        ),
    ),
    Case(
        rule="", policy=TWO_SETS,
        after=holdings({"a": {"r": 4}, "c": {"s": 2}}, {"a": "h", "c": "i"}, r=4, s=2),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "is_closed"),
    [
        (RegionTerms(), False),
        (RegionTerms(isolation=Isolation.GROUP), False),
        (RegionTerms(isolation=Isolation.SEALED), True),
        (RegionTerms(transport=Transport.GRANT), True),
    ],
)
def test_which_regions_open_nothing_but_themselves(terms: RegionTerms, is_closed: bool) -> None:
    assert Holdings.of(Snapshot(), {"r": terms}).closed == ({"r"} if is_closed else set())
    region = RegionConfig(region_id="r", nr_frames=1, terms=terms)
    said = Declarations(regions=(region,))
    assert Holdings.of_files(said).closed == ({"r"} if is_closed else set())


def found(case: Case) -> list[XshmError]:
    growth = Growth(
        before=case.before, after=case.after, policy=case.policy, free_bytes=case.free_bytes
    )
    return list(broken(growth))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_case_breaks_its_rule_and_no_other(case: Case) -> None:
    assert {error.facts["rule"] for error in found(case)} == {case.rule}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_finding_says_where_what_and_what_to_do(case: Case) -> None:
    for error in found(case):
        kind = OutOfMemory if case.rule == "free-memory-floor" else Refused
        assert type(error) is kind
        assert re.match(r"\w+\.cfg:[12]: ", error.message)
        assert not error.message.endswith(".")
        assert POLICY_FILE in error.hint


@pytest.mark.parametrize("case", GOOD)
def test_what_is_allowed(case: Case) -> None:
    assert found(case) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_there_already_is_never_refused(case: Case) -> None:
    assert found(dataclasses.replace(case, before=case.after)) == []


NOT_KNOWN = ConfigError("xshmd.toml:1: nonsense")


@pytest.mark.parametrize("after", [PAIR, holdings({}, r=0)])
def test_where_nothing_is_known_nothing_grows(after: Holdings) -> None:
    assert broken(Growth(before=NOTHING, after=after, policy=NOT_KNOWN)) == (NOT_KNOWN,)


def test_where_nothing_is_known_what_stays_and_what_goes_is_no_matter() -> None:
    for before in (PAIR, CHAIN):
        assert broken(Growth(before=before, after=PAIR, policy=NOT_KNOWN)) == ()


def finds_nothing(growth: Growth, policy: HostPolicy) -> Iterator[XshmError]:
    return iter(())


@pytest.mark.parametrize("index", range(len(QUOTA_RULES)))
def test_a_rule_that_finds_nothing_is_missed(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    all_rules = list(QUOTA_RULES)
    name = all_rules[index].__name__.replace("_", "-")
    all_rules[index] = finds_nothing
    monkeypatch.setattr(quota_rules, "QUOTA_RULES", tuple(all_rules))
    assert {case.rule for case in CASES if not found(case)} == {name}


LEASE = Lease(lease_id="l", region_id="frames1", prot=Prot.RO, process=Process(pid=7, uid=0))


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (NO_POLICY, None),
        (limits(leases=2), None),
        (limits(leases=1), "too-many-leases"),
        (limits(leases=0), "too-many-leases"),
        (allow(a_set("a")), "lease-not-allowed"),
        (allow(a_set("a", regions=("other",), dom0=True)), "lease-not-allowed"),
        (allow(a_set("a"), a_set("b", regions=("frames?",), dom0=True)), None),
    ],
)
def test_leases(policy: HostPolicy, rule: str | None) -> None:
    if rule is None:
        check_lease(LEASE, policy, nr_leases=2)
        return
    with pytest.raises(Refused) as refusal:
        check_lease(LEASE, policy, nr_leases=2)
    assert refusal.value.facts["rule"] == rule
    assert POLICY_FILE in refusal.value.hint


@pytest.mark.parametrize("policy", [NO_POLICY, NOT_KNOWN], ids=["known", "not"])
def test_what_dom0_lends_it_lends_to_one(policy: HostPolicy | XshmError) -> None:
    """Whatever an administrator says: the kernel grants a page once."""
    one = dataclasses.replace(holdings({"a": {"r": 4}}, r=0), lent=frozenset("r"))
    two = dataclasses.replace(PAIR, lent=frozenset("r"))
    error, *_ = broken(Growth(before=one, after=two, policy=policy))
    assert (type(error), error.facts["rule"]) == (Conflict, "lent-to-one")
    assert error.message.startswith("b.cfg:1: guests 'b' and 'a' would both have region 'r'")
    assert len(broken(Growth(before=NOTHING, after=two, policy=NO_POLICY))) == 1, "said once"
    for before, after in ((NOTHING, one), (two, two), (one, PAIR)):
        found = broken(Growth(before=before, after=after, policy=NO_POLICY))
        assert found == (), (before, after)


def test_of_dom0s_memory_nothing_is_xens() -> None:
    terms = RegionTerms(backing=Backing.DOM0, transport=Transport.GRANT)
    said = Declarations(regions=(RegionConfig(region_id="r", nr_frames=9, terms=terms),))
    files = Holdings.of_files(said)
    assert files.regions == {"r": 0}
    assert files.lent == {"r"}
    there = Holdings.of(
        Snapshot(
            regions=(
                Region(
                    region_id="r", nr_frames=9, holder_uuid="", holder_first_gfn=Gfn(0), terms=terms
                ),
            )
        ),
        {"r": terms},
    )
    assert there.regions == {"r": 0}
    assert there.lent == {"r"}


NAMES = st.sampled_from("abcdefgh")


@given(
    st.dictionaries(NAMES, st.dictionaries(st.sampled_from("rstuvw"), st.just(1), max_size=3)),
    st.dictionaries(NAMES, st.sampled_from("hij")),
)
def test_groups_are_what_can_be_reached(
    guests: dict[str, dict[str, int]], homes: dict[str, str]
) -> None:
    """Against the plainest way to say it: go on joining whatever touches."""

    def linked(one: str, other: str) -> bool:
        same_home = one in homes and homes[one] == homes.get(other)
        return same_home or bool(guests.get(one, {}).keys() & guests.get(other, {}).keys())

    names = {*guests, *homes}
    expected = set()
    for name in names:
        group = {name}
        while more := {new for new in names - group if any(linked(new, old) for old in group)}:
            group |= more
        if len(group) > 1:
            expected.add(frozenset(group))
    assert set(holdings(guests, homes).groups()) == expected
