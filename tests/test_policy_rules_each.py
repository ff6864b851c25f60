# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every rule is needed: for each there is a case that nothing but this rule refuses.

A case is a small host; what it breaks is named by the rules' names, which programs depend on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from test_config_static_shm import WRONG

from xshmd.errors import XshmError
from xshmd.machine import Arch, HostInfo
from xshmd.model import (
    DOMAIN_0,
    WHOLE_REGION,
    Backing,
    CachePolicy,
    GuestConfig,
    GuestType,
    Isolation,
    Lifetime,
    Place,
    Prot,
    ProtEnforcement,
    Region,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.policy import (
    definition_rules,
    entry_rules,
    grant_rules,
    grants,
    guest_rules,
    region_rules,
    rules,
)
from xshmd.units import Gfn, gfn_of

BASE = 0x1000000000
HOST = HostInfo(
    arch=Arch.X86_64, xen_version=(4, 20), xen_extra=".1", xen_command_line="",
    has_hvm=True, has_hap=True, free_pages=1 << 20, total_pages=1 << 21,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A host on which one rule is broken."""

    rule: str
    guests: tuple[GuestConfig, ...] = ()
    regions: tuple[RegionConfig, ...] = ()
    existing: tuple[Region, ...] = ()
    host: HostInfo = HOST

    def __str__(self) -> str:
        return self.rule


def owner(address: int = BASE, frames: int = 4, region_id: str = "r", **more: Any
) -> RegionRequest:  # fmt: skip
    values: dict[str, Any] = {"role": Role.OWNER, "place": Place(file="f", key=f"{address:#x}")}
    return RegionRequest(
        region_id=region_id, first_gfn=gfn_of(address), nr_frames=frames, **(values | more)
    )


def borrower(address: int = BASE, frames: int = 4, region_id: str = "r", **more: Any
) -> RegionRequest:  # fmt: skip
    return owner(address, frames, region_id, role=Role.BORROWER, **more)


def guest(name: str, *requests: RegionRequest, **more: Any) -> GuestConfig:
    return GuestConfig(name=name, memory_mib=64, requests=requests, **more)


def system(frames: int = 4, region_id: str = "r", line: int = 1, **terms: Any) -> RegionConfig:
    place = Place(file="r.toml", line=line)
    terms_of_it = RegionTerms(**terms)
    return RegionConfig(region_id=region_id, nr_frames=frames, terms=terms_of_it, place=place)


def there(frames: int = 4, owned_by: str = "a", **terms: Any) -> Region:
    return Region(
        region_id="r", nr_frames=frames, holder_uuid="h", holder_first_gfn=Gfn(0), owner=owned_by,
        lifetime=terms.get("lifetime") or (Lifetime.OWNER if owned_by else Lifetime.SYSTEM),
        terms=RegionTerms(**terms),
    )  # fmt: skip


def on(mfn: int, **more: Any) -> dict[str, Any]:
    return {"backing": Backing.HOST, "host_first_mfn": mfn, **more}


GRANT: dict[str, Any] = {"transport": Transport.GRANT}
LENT: dict[str, Any] = {**GRANT, "backing": Backing.DOM0}
RO: dict[str, Any] = {"prot": Prot.RO, "prot_enforcement": ProtEnforcement.ADVISORY}
OTHER = dataclasses.replace(HOST, xen_version=(4, 18))
SILO = dataclasses.replace(HOST, xen_command_line="xsm=silo")
NO_HAP = dataclasses.replace(HOST, has_hap=False)
CASES = (
    Case(rule="xen-too-old", guests=(guest("a", owner()),), host=OTHER),
    Case(rule="no-hap-here", guests=(guest("a", owner()),), host=NO_HAP),
    Case(
        rule="no-hap-here",
        guests=(guest("a", borrower()),),
        regions=(system(**GRANT),),
        host=NO_HAP,
    ),
    Case(rule="pv-guest", guests=(guest("a", owner(), guest_type=GuestType.PV),)),
    Case(rule="shadow-paging", guests=(guest("a", owner(), hap=False),)),
    Case(rule="altp2m", guests=(guest("a", owner(), altp2m=True),)),
    Case(rule="nested-hvm", guests=(guest("a", owner(), nestedhvm=True),)),
    Case(rule="inside-ram", guests=(guest("a", owner(0x3FFF000, 1)),)),
    Case(rule="on-reserved-range", guests=(guest("a", owner(0xFEE00000)),)),
    Case(rule="beyond-address-width", guests=(guest("a", owner(1 << 48)),)),
    Case(
        rule="other-cache-policy",
        guests=(guest("a", owner(cache_policy=CachePolicy.ARM_NORMAL)),),
    ),
    Case(rule="other-cache-policy", regions=(system(cache_policy=CachePolicy.ARM_NORMAL),)),
    Case(
        rule="borrower-cache-policy",
        guests=(guest("a", borrower(cache_policy=CachePolicy.X86_NORMAL)),),
        regions=(system(),),
    ),
    Case(rule="owner-offset", guests=(guest("a", owner(offset_frames=1)),)),
    Case(rule="overlapping", guests=(guest("a", owner(), owner(BASE + 0x3000, 1, "s")),)),
    Case(
        rule="region-twice",
        guests=(guest("a", borrower(), borrower(BASE + 0x4000)),),
        regions=(system(),),
    ),
    Case(rule="undefined-region", guests=(guest("b", borrower()),)),
    Case(rule="two-owners", guests=(guest("a", owner()), guest("b", owner()))),
    Case(rule="two-owners", guests=(guest("b", owner()),), existing=(there(),)),
    Case(rule="owner-of-systems", guests=(guest("a", owner()),), regions=(system(),)),
    Case(rule="owner-of-systems", guests=(guest("a", owner()),), existing=(there(owned_by=""),)),
    Case(
        rule="different-sizes",
        guests=(guest("a", owner()),),
        regions=(system(5),),
        existing=(),
    ),
    Case(rule="other-size", guests=(guest("a", owner(frames=5)),), existing=(there(),)),
    Case(
        rule="other-terms",
        guests=(guest("a", owner(prot=Prot.RW)),),
        existing=(there(**RO),),
    ),
    Case(rule="beyond-end", guests=(guest("b", borrower(frames=5)),), regions=(system(),)),
    Case(
        rule="part-of-2017",
        guests=(guest("b", borrower(frames=3, is_whole=True)),),
        regions=(system(),),
    ),
    Case(
        rule="prot-above-owner",
        guests=(guest("b", borrower()),),
        regions=(system(**RO),),
    ),
    Case(rule="read-only", guests=(guest("a", owner(prot=Prot.RO)),)),
    Case(rule="read-only", guests=(guest("b", borrower(prot=Prot.RO)),), regions=(system(),)),
    Case(
        rule="mixed-kinds",
        guests=(guest("a", borrower(), borrower(BASE + 0x100000, region_id="s")),),
        regions=(system(isolation=Isolation.SEALED), system(region_id="s", line=2)),
    ),
    Case(rule="direct-map", guests=(guest(DOMAIN_0, borrower()),), regions=(system(),)),
    Case(rule="direct-map", guests=(guest(DOMAIN_0, borrower()),), regions=(system(**on(7)),)),
    Case(rule="bad-id", regions=(system(region_id="a/b"),)),
    Case(rule="bad-id", regions=(system(region_id="a" * 129),)),
    Case(rule="size-zero", regions=(system(0),)),
    Case(rule="size-zero", regions=(system(1 << 41),)),
    Case(rule="region-without-grant", regions=(system(isolation=Isolation.REGION),)),
    Case(rule="grant-sealed", regions=(system(**GRANT, isolation=Isolation.SEALED),)),
    Case(rule="grant-backing", regions=(system(**GRANT, **on(7)),)),
    Case(rule="lent-without-grant", regions=(system(backing=Backing.DOM0),)),
    Case(rule="lent-whole", guests=(guest("a", borrower(frames=3)),), regions=(system(**LENT),)),
    Case(
        rule="lent-whole",
        guests=(guest("a", borrower(offset_frames=1, frames=WHOLE_REGION)),),
        existing=(there(owned_by="", **LENT),),
    ),
    Case(
        rule="grant-under-silo",
        guests=(guest("a", borrower()),),
        regions=(system(**GRANT),),
        host=SILO,
    ),
    Case(rule="lifetime-contradiction", regions=(system(lifetime=Lifetime.OWNER),)),
    Case(
        rule="lifetime-contradiction",
        guests=(guest("a", owner(terms=RegionTerms(lifetime=Lifetime.SYSTEM))),),
    ),
    Case(rule="host-address", regions=(system(backing=Backing.HOST),)),
    Case(rule="host-address", regions=(system(host_first_mfn=7),)),
    Case(rule="shared-host-range", regions=(system(**on(7)), system(region_id="s", **on(10)))),
    Case(rule="defined-twice", regions=(system(), system(line=9))),
    Case(rule="doorbells", regions=(system(doorbells=1),)),
    Case(rule="doorbells", regions=(system(doorbells=16),)),
    Case(rule="doorbells", regions=(system(1, doorbells=2),)),
    Case(rule="doorbells", regions=(system(**on(7), doorbells=2),)),
)
GOOD = (
    Case(rule="", guests=(guest("a", owner()), guest("b", borrower()))),
    Case(rule="", guests=(guest("a", borrower()), guest("b", borrower())), regions=(system(),)),
    Case(rule="", guests=(guest("b", borrower(frames=1, offset_frames=3)),), existing=(there(),)),
    Case(rule="", guests=(guest("a", owner()),), existing=(there(),)),
    Case(rule="", guests=(guest("a", owner(prot=Prot.RO, terms=RegionTerms(**RO))),)),
    Case(rule="", guests=(guest(DOMAIN_0, borrower(0x7000)),), regions=(system(**on(7)),)),
    Case(rule="", regions=(system(**on(7)), system(region_id="s", **on(11)))),
    Case(rule="", guests=(guest("a", owner(terms=RegionTerms(lifetime=Lifetime.MEMBERS))),)),
    Case(rule="", regions=(system(2, doorbells=15),)),
    Case(rule="", regions=(system(lifetime=Lifetime.SYSTEM, isolation=Isolation.GROUP),)),
    Case(rule="", regions=(system(**GRANT, isolation=Isolation.REGION),)),
    Case(
        rule="",
        guests=(
            guest("a", borrower(prot=Prot.RO), guest_type=GuestType.PV),
            guest("b", borrower(), hap=False, altp2m=True, nestedhvm=True),
        ),
        regions=(system(**GRANT),),
    ),
    Case(rule="", guests=(guest("a", owner()),), host=SILO),
    Case(rule="", guests=(guest("a", borrower()),), regions=(system(**LENT),), host=SILO),
    Case(
        rule="",
        guests=(guest("a", borrower(frames=WHOLE_REGION, prot=Prot.RO)),),
        regions=(system(**LENT, isolation=Isolation.REGION),),
    ),
)
COMPANIONS = {"different-sizes": {"owner-of-systems"}}
"""Rules that cannot be broken without these."""


def broken(case: Case) -> list[XshmError]:
    """Return all that is wrong on the case's host."""
    others = rules.claims((), case.guests)
    existing = {region.region_id: region for region in case.existing}
    found = list(rules.check_definitions(case.regions, others=others, arch=case.host.arch))
    granted, lent = (
        ids(case.existing, case.regions, case.guests)
        for ids in (grants.granted_ids, grants.lent_ids)
    )
    for config in case.guests:
        found += rules.check_guest(config, case.host, granted=granted, lent=lent)
        found += rules.check_requests(
            config, existing=existing, others=others, regions=case.regions, arch=case.host.arch
        )
    return found


def broken_rules(case: Case) -> set[str]:
    return {str(error.facts["rule"]) for error in broken(case)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_case_breaks_its_rule_and_no_other(case: Case) -> None:
    assert broken_rules(case) - COMPANIONS.get(case.rule, set()) == {case.rule}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_finding_says_where_and_what_to_do(case: Case) -> None:
    for error in broken(case):
        assert error.hint
        assert error.facts.keys() >= {"file", "place", "line", "rule"}
        assert error.message.startswith(f"{error.facts['file']}:")
        assert not error.message.endswith(".")
        assert not re.search("implement|support", error.one_line())


@pytest.mark.parametrize("case", GOOD)
def test_what_is_allowed(case: Case) -> None:
    assert broken(case) == []


REGISTRIES = (
    (guest_rules, "HOST_RULES"),
    (guest_rules, "GUEST_RULES"),
    (entry_rules, "ENTRY_RULES"),
    (entry_rules, "TOGETHER_RULES"),
    (region_rules, "REGION_RULES"),
    (region_rules, "BESIDE_RULES"),
    (definition_rules, "DEFINITION_RULES"),
    (grant_rules, "HOST_RULES"),
    (grant_rules, "DEFINITION_RULES"),
    (grant_rules, "REGION_RULES"),
)
EACH = [
    pytest.param(module, registry, index, id=f"{registry}-{rule.__name__}")
    for module, registry in REGISTRIES
    for index, rule in enumerate(getattr(module, registry))
]


def finds_nothing(*anything: object) -> Iterator[XshmError]:
    return iter(())


@pytest.mark.parametrize(("module", "registry", "index"), EACH)
def test_a_rule_that_finds_nothing_is_missed(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, registry: str, index: int
) -> None:
    all_rules = list(getattr(module, registry))
    name = all_rules[index].__name__.replace("_", "-")
    all_rules[index] = finds_nothing
    monkeypatch.setattr(module, registry, tuple(all_rules))
    missed = {case.rule for case in CASES if case.rule not in broken_rules(case)}
    assert missed == {name}


def test_every_rule_of_a_module_is_in_its_registry() -> None:
    for module in {module for module, _ in REGISTRIES}:
        listed = {
            rule.__name__
            for one, registry in REGISTRIES
            if one is module
            for rule in getattr(module, registry)
            if rule.__module__ == module.__name__  # those of grants have a module of their own
        }
        written = {
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__
            and not name.startswith("_")
            and getattr(value, "__annotations__", {}).get("return") == "Findings"
        }
        assert listed == written


CHECKLIST = {
    "A1 a list of strings, key = value": "not-a-list not-a-string empty-part no-value"
    " too-much-wrong",
    "A3 ids, which are strings": "bad-id",
    "A4 begin and end": "bad-number missing-key beyond-64-bits",
    "A5 granularity": "bad-granularity missing-key",
    "A6 prot, its ceiling, and that it is kept": "no-such-prot prot-above-owner read-only",
    "A7 one master": "two-owners owner-of-systems",
    "A8 a slave needs its master's definition": "undefined-region",
    "A9 sizes": "beyond-end part-of-2017 different-sizes",
    "A10 overlapping areas": "overlapping shared-host-range",
    "A13 three forms": "mixed-forms ambiguous-form",
    "A14 keys": "key-twice unknown-key bad-word unaligned region-twice",
    "A14 what only one role says": "owner-offset owners-only borrower-cache-policy",
    "A14 cache policies": "other-cache-policy",
    "A15 RAM": "inside-ram on-reserved-range beyond-address-width",
    "A17 x86": "pv-guest shadow-paging altp2m nested-hvm xen-too-old no-hap-here",
    "B2 B9 ids": "bad-id",
    "B3 B10 addresses and sizes": "host-address size-zero",
    "B4 B7 whose it is and when it ends": "owner-of-systems lifetime-contradiction",
    "B11 one id, one range; one range, one id": "defined-twice different-sizes shared-host-range",
    "B14 direct map": "direct-map",
    "D2 a number for each peer, and its doorbells": "doorbells",
    "B15 no more than can be kept": "other-size mixed-kinds grant-under-silo grant-backing"
    " grant-sealed region-without-grant other-terms lent-without-grant lent-whole",
}
"""What the source mails ask for, by the numbers of their list, and the rules that see to it."""


def test_the_checklist_names_every_rule_there_is_and_no_other() -> None:
    known = {case.rule for case in CASES} | {rule for _, rule, _, _ in WRONG}
    known |= {"not-a-list", "not-a-string", "too-much-wrong"}
    assert {rule for text in CHECKLIST.values() for rule in text.split()} == known
