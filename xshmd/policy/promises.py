# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which promises cannot be kept, found out by asking the rules: docs/promises.md is made from this.

A *choice* is what a configuration or a machine may be like in one respect; the first of each is the
usual one.  Choices are combined until a rule speaks against them, and a row of the table is a
combination that is refused while it would not be without any one of its parts.

    python3 -m xshmd.policy.promises > docs/promises.md
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

from xshmd.errors import XshmError
from xshmd.machine import Arch, HostInfo
from xshmd.model import (
    Backing,
    CachePolicy,
    GuestConfig,
    GuestType,
    Isolation,
    Prot,
    ProtEnforcement,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.policy import rules
from xshmd.policy.grants import granted_ids, lent_ids
from xshmd.units import Gfn

MOST_PARTS: Final = 3
"""How many unusual choices are combined: no rule is about more."""
FIRST_GFN: Final = Gfn(0x3A000)
"""0x3a000000: a place for regions on either architecture."""
CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "isolation": ("group", "sealed", "region"),
    "transport": ("physmap", "grant"),
    "prot": ("rw", "ro"),
    "prot_enforcement": ("required", "advisory"),
    "cache_policy": ("the machine's", "another machine's"),
    "backing": ("holder", "host", "dom0"),
    "the guest's other region": ("none", "isolation=group", "isolation=sealed"),
    "the guest's type": ("pvh", "hvm", "pv"),
    "hap": ("1", "0"),
    "altp2m": ("0", "1"),
    "nestedhvm": ("0", "1"),
    "Xen": ("4.20", "4.18", "4.17"),
    "xsm": ("dummy", "silo", "flask"),
    "the machine": ("with hardware-assisted paging", "without hardware-assisted paging"),
}
"""What may be chosen, by what it is called in the table."""

INTRODUCTION: Final = """\
# What cannot be kept, and what to do about it

Made by `python3 -m xshmd.policy.promises`: what a region may be, in what guest and on what machine,
was put to the rules that xshmd itself asks, in every combination. What is not in this table is
kept; what is in it is refused before anything is done, with these words, and with the file and line
in front of them. `xshmctl check FILE...` asks the same rules without a daemon or Xen, but for those
about the machine.

| if | unless | on | it is refused, since | remedy | rule |
|---|---|---|---|---|---|"""

Combination = tuple[tuple[str, str], ...]
"""The unusual choices of a configuration on a machine; all others are the usual ones."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A combination that cannot be kept."""

    parts: Combination
    arches: tuple[Arch, ...]
    rule: str
    """The name of the rule that refuses it."""
    refusal: str
    remedy: str
    unless: Combination = ()
    """Each of these choices, made as well, leaves the rule nothing to say."""


def refusals(parts: Combination, arch: Arch) -> tuple[XshmError, ...]:
    """Return what the rules have against a combination on a machine of this architecture."""
    chosen = {name: values[0] for name, values in CHOICES.items()} | dict(parts)
    regions = [RegionConfig(region_id="r", nr_frames=256, terms=_terms(chosen, arch))]
    if chosen["the guest's other region"] != "none":
        isolation = Isolation(chosen["the guest's other region"].partition("=")[2])
        regions.append(
            RegionConfig(region_id="s", nr_frames=256, terms=RegionTerms(isolation=isolation))
        )
    config = _guest(chosen, regions)
    others = rules.claims((), (config,))
    granted, lent = (ids((), regions, (config,)) for ids in (granted_ids, lent_ids))
    found = rules.check_guest(config, _host(chosen, arch), granted=granted, lent=lent)
    asked = rules.check_requests(config, existing={}, others=others, regions=regions, arch=arch)
    return (*found, *asked)


def _terms(chosen: Mapping[str, str], arch: Arch) -> RegionTerms:
    policies = {Arch.X86_64: CachePolicy.X86_NORMAL, Arch.ARM64: CachePolicy.ARM_NORMAL}
    own = chosen["cache_policy"] == CHOICES["cache_policy"][0]
    other = next(policy for one, policy in policies.items() if one is not arch)
    on_host = chosen["backing"] == Backing.HOST
    return RegionTerms(
        isolation=Isolation(chosen["isolation"]),
        transport=Transport(chosen["transport"]),
        prot=Prot(chosen["prot"]),
        prot_enforcement=ProtEnforcement(chosen["prot_enforcement"]),
        cache_policy=policies[arch] if own else other,
        backing=Backing(chosen["backing"]),
        host_first_mfn=0xC000000 if on_host else None,
    )


def _guest(chosen: Mapping[str, str], regions: list[RegionConfig]) -> GuestConfig:
    requests = [
        RegionRequest(
            region_id=region.region_id, first_gfn=Gfn(FIRST_GFN + 0x200 * at), nr_frames=256,
            role=Role.BORROWER, prot=region.terms.prot,
        )
        for at, region in enumerate(regions)
    ]  # fmt: skip
    return GuestConfig(
        name="a", memory_mib=64, guest_type=GuestType(chosen["the guest's type"]),
        hap=chosen["hap"] == "1", altp2m=chosen["altp2m"] == "1",
        nestedhvm=chosen["nestedhvm"] == "1", requests=tuple(requests),
    )  # fmt: skip


def _host(chosen: Mapping[str, str], arch: Arch) -> HostInfo:
    major, minor = map(int, chosen["Xen"].split("."))
    return HostInfo(
        arch=arch, xen_version=(major, minor), xen_extra="",
        xen_command_line=f"xsm={chosen['xsm']}",
        has_hvm=True, has_hap=chosen["the machine"] == CHOICES["the machine"][0],
        free_pages=1 << 20, total_pages=1 << 21,
    )  # fmt: skip


def combinations() -> Iterator[Combination]:
    """Yield every combination of few unusual choices, those of fewer first."""
    unusual = [(name, value) for name, values in CHOICES.items() for value in values[1:]]
    for count in range(1, MOST_PARTS + 1):
        for parts in itertools.combinations(unusual, count):
            if len({name for name, _ in parts}) == count:
                yield parts


def rows() -> tuple[Row, ...]:
    """Return everything that cannot be kept, the architectures it is the same on together."""
    found: dict[tuple[Combination, str, str, str], list[Arch]] = {}
    for arch in Arch:
        known: dict[str, list[set[tuple[str, str]]]] = {}
        for parts in combinations():
            for error in refusals(parts, arch):
                rule = str(error.facts["rule"])
                smaller = known.setdefault(rule, [])
                if not any(one <= set(parts) for one in smaller):
                    smaller.append(set(parts))
                    found.setdefault((parts, rule, error.message, error.hint), []).append(arch)
    return tuple(
        Row(
            parts=parts, arches=tuple(arches), rule=rule, refusal=message, remedy=hint,
            unless=tuple(_lifting(parts, rule, arches[0])),
        )
        for (parts, rule, message, hint), arches in found.items()
    )  # fmt: skip


def _lifting(parts: Combination, rule: str, arch: Arch) -> Iterator[tuple[str, str]]:
    said = {name for name, _ in parts}
    for name, values in CHOICES.items():
        for value in values[1:]:
            more = (*parts, (name, value))
            if name not in said and not _is_refused(more, arch, rule):
                yield name, value


def _is_refused(parts: Combination, arch: Arch, rule: str) -> bool:
    return any(error.facts["rule"] == rule for error in refusals(parts, arch))


def markdown() -> str:
    """Return docs/promises.md."""
    lines = [INTRODUCTION]
    for row in rows():
        condition = " and ".join(_said(name, value) for name, value in row.parts)
        where = "both" if len(row.arches) > 1 else row.arches[0].value
        unless = " or ".join(_said(name, value) for name, value in row.unless)
        cells = (condition, unless, where, row.refusal, row.remedy, f"`{row.rule}`")
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join((*lines, ""))


def _said(name: str, value: str) -> str:
    if name == "the machine":
        return f"{name} is {value}"
    return f"{name}: {value}" if " " in name + value else f"`{name}={value}`"


def main(*_: Any) -> int:
    """Print the page."""
    sys.stdout.write(markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
