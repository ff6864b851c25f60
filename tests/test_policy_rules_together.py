# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of a guest among others: who defines a region, who borrows it, and on what terms."""

import dataclasses
from typing import Any

import pytest
from flat import LINEAR, growth
from hypothesis import given
from hypothesis import strategies as st
from policy_words import X86, X86_FREE, guest, one, request

from xshmd.config.guest import guest_config
from xshmd.errors import ConfigError, Conflict, Refused, XshmError
from xshmd.machine import Arch
from xshmd.model import (
    Backing,
    CachePolicy,
    Guest,
    GuestState,
    Isolation,
    Lifetime,
    Place,
    Prot,
    ProtEnforcement,
    Region,
    RegionConfig,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.policy.rules import (
    Claim,
    check_config,
    check_definitions,
    check_region,
    check_requests,
    check_together,
    claims,
    remarks,
)
from xshmd.units import DomId, Gfn

# --- the guest among the others ---------------------------------------------------------------


def claim(name: str = "vm", **more: Any) -> Claim:
    return Claim(guest=name, request=request(file=f"{name}.cfg", **more))


def borrower(name: str = "vm", **more: Any) -> Claim:
    return claim(name, role=Role.BORROWER, **more)


def region(nr_frames: int = 4, owner: str = "a", region_id: str = "r") -> Region:
    return Region(
        region_id=region_id, nr_frames=nr_frames, holder_uuid="h", holder_first_gfn=Gfn(0),
        owner=owner, lifetime=Lifetime.OWNER if owner else Lifetime.SYSTEM,
    )  # fmt: skip


def test_a_borrower_of_nothing() -> None:
    errors = check_region(borrower(), region=None, others=[borrower(), claim("a", region_id="s")])
    error = one(
        errors, ConfigError, "guest 'vm' borrows region 'r', which nobody defines",
        "id=r and role=owner", "or define the region for the system", "/etc/xen",
        "/etc/xshmd/guests.d", "/etc/xshmd/regions.d",
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


def test_an_owner_of_its_own_region() -> None:
    ask = claim(frames=4)
    assert check_region(ask, region=region(owner="vm"), others=[ask]) == ()


def test_an_owner_of_what_the_system_has() -> None:
    errors = check_region(claim(frames=4), region=region(owner=""), others=[])
    one(errors, Conflict, "region 'r' is defined by the system, for which it exists, and by its",
        "guest 'vm' (vm.cfg:5: static_shm[0])", "say role=borrower")  # fmt: skip


def test_an_owner_who_wants_another_size() -> None:
    errors = check_region(claim(frames=3), region=region(owner="vm"), others=[])
    one(errors, Conflict, "is to have 12 KiB, but it exists with 16 KiB", "say size=0x4000")


@pytest.mark.parametrize(
    ("said", "has", "to_be", "kept"),
    [
        ({"prot": Prot.RO}, {}, "prot=ro", "prot=rw"),
        ({"lifetime": Lifetime.MEMBERS}, {}, "lifetime=members", "lifetime=owner"),
        ({"transport": Transport.GRANT}, {}, "transport=grant", "transport=physmap"),
        ({"isolation": Isolation.SEALED}, {}, "isolation=sealed", "isolation=group"),
        (
            {"isolation": Isolation.GROUP}, {"isolation": Isolation.SEALED},
            "isolation=group", "isolation=sealed",
        ),
        (
            {"prot_enforcement": ProtEnforcement.ADVISORY}, {},
            "prot_enforcement=advisory", "prot_enforcement=required",
        ),
        (
            {"cache_policy": CachePolicy.X86_NORMAL}, {"cache_policy": CachePolicy.ARM_NORMAL},
            "cache_policy=x86_normal", "cache_policy=ARM_normal",
        ),
        ({}, {"backing": Backing.HOST, "host_first_mfn": 7}, "backing=holder", "backing=host"),
        (
            {"backing": Backing.HOST, "host_first_mfn": 6},
            {"backing": Backing.HOST, "host_first_mfn": 7}, "host address 0x6000", "0x7000",
        ),
    ],
)  # fmt: skip
def test_an_owner_who_comes_back_with_other_terms(
    said: dict[str, Any], has: dict[str, Any], to_be: str, kept: str
) -> None:
    terms = RegionTerms(**said)
    back = claim(frames=4, terms=terms, prot=terms.prot, cache_policy=terms.cache_policy)
    exists = dataclasses.replace(region(owner="vm"), terms=RegionTerms(**has))
    errors = check_region(back, region=exists, others=[])
    (error,) = [error for error in errors if error.facts["rule"] == "other-terms"]
    assert isinstance(error, Conflict)
    assert f"is to have {to_be}, but it exists with" in error.message
    assert kept in error.message
    assert error.hint.startswith("say ")
    assert kept in error.hint


def test_what_an_owner_leaves_open_is_no_other_term() -> None:
    has = RegionTerms(isolation=Isolation.SEALED, cache_policy=CachePolicy.X86_NORMAL)
    exists = dataclasses.replace(region(owner="vm"), terms=has)
    errors = check_region(claim(frames=4), region=exists, others=[])
    assert "other-terms" not in {error.facts["rule"] for error in errors}


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


# --- what the system defines ------------------------------------------------------------------


def defined(nr_frames: int = 4, region_id: str = "r", file: str = "r.toml", **terms: Any
) -> RegionConfig:  # fmt: skip
    return RegionConfig(
        region_id=region_id, nr_frames=nr_frames, terms=RegionTerms(**terms),
        place=Place(file=file, key=f"region.{region_id}", line=1),
    )  # fmt: skip


def test_a_borrower_of_what_the_system_defines() -> None:
    assert check_region(borrower(frames=4), region=None, others=[], regions=[defined()]) == ()
    errors = check_region(borrower(frames=5), region=None, others=[], regions=[defined()])
    one(errors, ConfigError, "but the system (r.toml:1: region.r) gives it only 16 KiB")


def test_both_the_system_and_a_guest_define_it() -> None:
    words = ("is defined by the system (r.toml:1: region.r), and by its owner guest 'vm'",)
    errors = check_region(claim(frames=4), region=None, others=[], regions=[defined()])
    one(errors, Conflict, *words)
    other = check_region(
        borrower(name="b"), region=None, others=[claim(frames=4)], regions=[defined()]
    )
    (error,) = other
    assert words[0] in error.message


def test_one_id_has_one_size() -> None:
    errors = check_region(claim(frames=9), region=None, others=[], regions=[defined()])
    assert [error.facts["rule"] for error in errors] == ["owner-of-systems", "different-sizes"]
    assert "has two sizes: 36 KiB by guest 'vm'" in errors[1].message
    assert "and 16 KiB by the system (r.toml:1: region.r)" in errors[1].message
    errors = check_region(claim(frames=9), region=None, others=[claim("a", frames=8)])
    assert [error.facts["rule"] for error in errors] == ["two-owners", "different-sizes"]
    errors = check_region(claim(frames=9), region=None, others=[claim("a", frames=9)])
    assert [error.facts["rule"] for error in errors] == ["two-owners"]


def test_the_rest_of_a_region_is_a_frame_at_least() -> None:
    rest = borrower(frames=0, offset_frames=3)
    assert check_region(rest, region=region(), others=[]) == ()
    none = borrower(frames=0, offset_frames=4)
    one(check_region(none, region=region(), others=[]), ConfigError, "ends at offset 0x5000")


READ_ONLY: dict[str, Any] = {"prot": Prot.RO, "prot_enforcement": ProtEnforcement.ADVISORY}


def test_read_only_is_refused() -> None:
    asks = claim(prot=Prot.RO)
    errors = check_region(asks, region=None, others=[])
    one(
        errors,
        Refused,
        "prot=ro, which Xen cannot enforce",
        "say transport=grant if its guests can map grants",
    )
    errors = check_region(borrower(prot=Prot.RO), region=region(), others=[])
    one(errors, Refused, "prot=ro, which Xen cannot enforce")


@pytest.mark.parametrize("prot", Prot)
def test_read_only_that_binds_nobody(prot: Prot) -> None:
    terms = RegionTerms(prot_enforcement=ProtEnforcement.ADVISORY)
    owner = claim("a", prot=prot, frames=4, terms=terms)
    asks = borrower(prot=Prot.RO)
    assert check_region(owner, region=None, others=[asks]) == ()
    assert check_region(asks, region=None, others=[owner]) == ()
    exists = dataclasses.replace(region(), terms=terms)
    assert check_region(asks, region=exists, others=[]) == ()


def test_what_binds_nobody_is_said() -> None:
    advisory = defined(prot_enforcement=ProtEnforcement.ADVISORY)
    config = guest(request(prot=Prot.RO, role=Role.BORROWER), request(index=1, region_id="s"))
    (said,) = remarks(config, existing={}, others=[], regions=[advisory])
    assert said == (
        "guest 'vm' (vm.cfg:5: static_shm[0]): prot=ro of region 'r' at 0x1000000000-0x1000000fff"
        " is advisory and binds nobody: the guest can write to it"
    )


def test_a_borrower_that_wants_more_than_the_owner_allows() -> None:
    places: tuple[dict[str, Any], ...] = (
        {"others": [claim("a", frames=4, prot=Prot.RO, terms=RegionTerms(**READ_ONLY))]},
        {"others": [], "regions": [defined(**READ_ONLY)]},
    )
    for where in places:
        errors = check_region(borrower(), region=None, **where)
        one(errors, ConfigError, "asks for prot=rw, but", "allows at most prot=ro", "say prot=ro")
    exists = dataclasses.replace(region(owner="vm"), terms=RegionTerms(**READ_ONLY))
    one(check_region(borrower(), region=exists, others=[]), ConfigError, "region 'r' allows")
    same = claim(frames=4, prot=Prot.RO, terms=RegionTerms(**READ_ONLY))
    assert check_region(same, region=exists, others=[]) == ()


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"isolation": Isolation.REGION}, ("isolation=region", "may trust each other")),
        (
            {"transport": Transport.GRANT, "isolation": Isolation.SEALED},
            ("isolation=sealed", "say isolation=region"),
        ),
    ],
)
def test_terms_that_cannot_be_kept(terms: dict[str, Any], words: tuple[str, ...]) -> None:
    owner = claim(frames=4, terms=RegionTerms(**terms))
    one(check_region(owner, region=None, others=[]), Refused, *words)
    (error,) = check_region(borrower(name="b"), region=None, others=[owner])
    assert error.facts["file"] == "vm.cfg"
    exists = dataclasses.replace(region(owner="vm"), terms=RegionTerms(**terms))
    one(check_region(owner, region=exists, others=[]), Refused, *words)
    assert check_region(borrower(name="b"), region=region(owner="vm"), others=[owner]) == ()
    (error,) = check_definitions([defined(**terms)])
    assert error.message.startswith("r.toml:1: region.r: region 'r' asks for")


def test_the_terms_of_a_borrower_do_not_count() -> None:
    asks = borrower(terms=RegionTerms(transport=Transport.GRANT, lifetime=Lifetime.SYSTEM))
    assert check_region(asks, region=None, others=[claim("a")]) == ()


def test_domain_0_has_host_memory_where_it_is() -> None:
    host_terms = RegionTerms(backing=Backing.HOST, host_first_mfn=0x10000)
    config = RegionConfig(region_id="r", nr_frames=4, terms=host_terms, place=Place(file="t.dts"))

    def asks(address: int) -> tuple[XshmError, ...]:
        mine = Claim(guest="Domain-0", request=request(address, 2, role=Role.BORROWER))
        return check_region(mine, region=None, others=[], regions=[config])

    assert asks(0x10000000) == ()
    one(asks(0x10001000), ConfigError, "is for Domain-0", "begin at 0x10000000")
    dom0 = guest(request(0x0, role=Role.BORROWER), name="Domain-0")
    assert check_config(dom0, Arch.ARM64) == ()


def test_host_memory_is_one_regions_only() -> None:
    def at(mfn: int, region_id: str, frames: int = 4) -> RegionConfig:
        return defined(frames, region_id, backing=Backing.HOST, host_first_mfn=mfn)

    assert check_definitions([at(0x100, "a"), at(0x104, "b"), at(0xFC, "c")]) == ()
    errors = check_definitions([at(0x100, "a"), at(0x103, "b", 9), at(0x200, "c")])
    assert [error.facts["place"] for error in errors] == ["region.a", "region.b"]
    assert all(type(error) is Conflict for error in errors)
    inside = check_definitions([at(0x10, "big", 0x1000), at(0x20, "b"), at(0x500, "c", 1)])
    assert [error.facts["place"] for error in inside] == [
        "region.big", "region.big", "region.b", "region.c",
    ]  # fmt: skip
    both = [at(0x100, "r"), at(0x102, "s")]
    (error,) = check_region(borrower(), region=None, others=[], regions=both)
    assert error.facts["rule"] == "shared-host-range"


spans_of_host = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8)


@given(spans_of_host)
def test_shared_host_memory_is_found_exactly_where_there_is_some(
    chosen: list[tuple[int, int]],
) -> None:
    configs = [
        defined(frames, f"r{index}", backing=Backing.HOST, host_first_mfn=first)
        for index, (first, frames) in enumerate(chosen)
    ]
    pairs = sum(
        index != other and first < last_first + last_frames and last_first < first + frames
        for index, (first, frames) in enumerate(chosen)
        for other, (last_first, last_frames) in enumerate(chosen)
    )
    assert len(check_definitions(configs)) == pairs


def test_many_at_once_are_as_each_by_itself() -> None:
    config = guest(
        request(frames=4, role=Role.BORROWER),
        request(index=1, region_id="s", frames=9),
        request(index=2, region_id="t", frames=9, role=Role.BORROWER),
    )
    others = [claim("a", frames=3), claim("b", region_id="s", frames=1), claim("vm", region_id="t")]
    existing = {"t": region(2, region_id="t")}
    each: list[XshmError] = []
    for entry in config.requests:
        each += check_region(
            Claim(guest="vm", request=entry), region=existing.get(entry.region_id), others=others
        )
    together = check_requests(config, existing=existing, others=others)
    assert [error.one_line() for error in together] == [error.one_line() for error in each]
    assert [error.facts["rule"] for error in together] == [
        "beyond-end", "two-owners", "different-sizes", "beyond-end",
    ]  # fmt: skip


def test_ten_thousand_regions_are_checked_at_once() -> None:
    many = [
        request(X86_FREE + index * 0x1000, 1, index, region_id=f"r{index}")
        for index in range(10_000)
    ]
    borrowing = [dataclasses.replace(one, role=Role.BORROWER) for one in many]

    def check(number: int) -> None:
        configs = [guest(*many[:number], name="a"), guest(*borrowing[:number], name="b")]
        regions = [defined(1, f"s{index}") for index in range(number)]
        assert check_together(configs, regions, X86.arch) == ()

    assert growth(lambda: check(1_000), lambda: check(10_000)) < LINEAR


def test_all_files_together_say_each_thing_once() -> None:
    bad = claim("a", frames=4, terms=RegionTerms(isolation=Isolation.REGION)).request
    lenders = [request(role=Role.BORROWER, file=f"{name}.cfg") for name in "bcd"]
    configs = [guest(bad, name="a")]
    configs += [guest(one, name=name) for one, name in zip(lenders, "bcd", strict=True)]
    errors = check_together(configs, [defined(region_id="s", lifetime=Lifetime.OWNER)], X86.arch)
    assert [error.facts["rule"] for error in errors] == [
        "lifetime-contradiction", "region-without-grant",
    ]  # fmt: skip


def test_the_example_of_the_published_manual_page_breaks_two_rules() -> None:
    """Its own code refused it, too: ID2 is borrowed beyond its end, and the policy is x86's."""
    base = "begin={}, size={}, role={}"
    texts = {
        "vm1": ["id=ID1, " + base.format("0x3a100000", "0x100000", "owner, cache_policy=x86_normal,"
                " prot=rw"), "id=ID2, " + base.format("0x3a300000", "0x100000", "owner")],
        "vm2": ["id=ID1, offset=0, " + base.format("0x3a500000", "0x100000", "borrower, prot=rw")],
        "vm3": ["id=ID2, offset=0x10000, " + base.format("0x3a690000", "0x110000", "borrower")],
    }  # fmt: skip
    for moved, more in ((True, set()), (False, {"on-reserved-range"})):
        configs = []
        for name, entries in texts.items():
            lines = [entry if moved else entry.replace("0x3a", "0x") for entry in entries]
            text = f"name='{name}'\nstatic_shm={lines!r}\n"
            configs.append(guest_config(text, file=f"{name}.cfg", arch=Arch.ARM64))
        errors = check_together(configs, [], Arch.ARM64)
        found = {str(error.facts["rule"]): error for error in errors}
        assert found.keys() == {"other-cache-policy", "beyond-end"} | more
        assert "cache_policy=x86_normal, which is not for arm64" in (
            found["other-cache-policy"].message
        )
        assert found["other-cache-policy"].facts["file"] == "vm1.cfg"
        assert "0x120000 of the region" in found["beyond-end"].message
        assert found["beyond-end"].facts["file"] == "vm3.cfg"
