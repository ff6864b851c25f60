# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a configuration may ask for, before anything is done: every broken rule, at once.

Each rule is one function in a module beside this one that yields what is wrong and says why it is a
rule: of a guest (:mod:`~xshmd.policy.guest_rules`), of its entries
(:mod:`~xshmd.policy.entry_rules`), of a region's definition
(:mod:`~xshmd.policy.definition_rules`) and between the two
(:mod:`~xshmd.policy.region_rules`); and of what guests map themselves
(:mod:`~xshmd.policy.grant_rules`).  They are pure: what exists on the host comes in as records.
Each finding has in its ``facts`` the name of its rule, ``rule``, which does not change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from xshmd.errors import XshmError
from xshmd.machine import Arch, HostInfo
from xshmd.model import Guest, GuestConfig, GuestState, Region, RegionConfig
from xshmd.policy import definition_rules, entry_rules, grant_rules, guest_rules, region_rules
from xshmd.policy.definitions import Claim, Definition, Said
from xshmd.policy.entry_rules import AddressSpace, overlapping
from xshmd.policy.grants import granted_ids, only, without
from xshmd.policy.region_rules import Case

__all__ = [
    "Claim", "check_config", "check_definitions", "check_guest", "check_region", "check_requests",
    "check_together", "claims", "overlapping", "remarks",
]  # fmt: skip


def check_guest(
    config: GuestConfig,
    host: HostInfo,
    *,
    gpaddr_bits: int = 0,
    granted: Collection[str] = (),
    lent: Collection[str] = (),
) -> tuple[XshmError, ...]:
    """Return every broken rule that concerns this guest alone, on this host.

    Args:
        config: What the guest's configuration says; without requests nothing is wrong with it.
        host: The machine it is to run on.
        gpaddr_bits: The domain's width of addresses if it exists already.
        granted: The ids of the regions that guests map themselves.
        lent: Those among them that are dom0's own memory.
    """
    if not config.requests:
        return ()
    # Holders are hardware-paged domains whatever they serve, and an older Xen is shown to do none
    # of it.
    found = [error for rule in guest_rules.HOST_RULES for error in rule(config, host)]
    if (part := without(lent, only(granted, config))).requests:
        found += [error for rule in grant_rules.HOST_RULES for error in rule(part, host)]
    checked = check_config(config, host.arch, gpaddr_bits=gpaddr_bits, granted=granted)
    return (*found, *checked)


def check_config(
    config: GuestConfig, arch: Arch, *, gpaddr_bits: int = 0, granted: Collection[str] = ()
) -> tuple[XshmError, ...]:
    """Return what :func:`check_guest` does without the rules that need a running Xen."""
    if not config.requests:
        return ()
    found: list[XshmError] = []
    if (mapped := without(granted, config)).requests:
        found += [error for rule in guest_rules.GUEST_RULES for error in rule(mapped, arch)]
    space = AddressSpace.of(config, arch, gpaddr_bits)
    for request in config.requests:
        for rule in entry_rules.ENTRY_RULES:
            found += rule(request, space)
    for together in entry_rules.TOGETHER_RULES:
        found += together(config.requests)
    return tuple(found)


def claims(guests: Sequence[Guest], configs: Sequence[GuestConfig]) -> tuple[Claim, ...]:
    """Gather who says what: the guests there are, and the configurations of those there are not.

    A guest that exists counts as it was made, not as its file reads now.  One that has only just
    been seen is not made yet, so its file counts; one that is being destroyed for want of its
    regions does not exist.
    """
    unmade = (GuestState.HELD, GuestState.DOOMED)
    there = [guest for guest in guests if guest.state not in unmade]
    names = {guest.name for guest in there}
    uuids = {guest.uuid for guest in there}
    found = [Claim(guest=guest.name, request=one) for guest in there for one in guest.requests]
    for config in configs:
        if config.name not in names and config.uuid not in uuids:
            found += [Claim(guest=config.name, request=one) for one in config.requests]
    return tuple(found)


def check_region(
    claim: Claim,
    *,
    region: Region | None,
    others: Sequence[Claim],
    regions: Sequence[RegionConfig] = (),
    arch: Arch | None = None,
) -> tuple[XshmError, ...]:
    """Return every broken rule between one entry and what else is said about its region.

    Args:
        claim: The entry, and whose it is.
        region: The region if it exists.
        others: What is said elsewhere, e.g. by :func:`claims`; about which region does not matter,
            and the guest's own are left out.
        regions: What is defined apart from any guest; about which region does not matter.
        arch: The machine's, where it is known.
    """
    said = Said((claim, *(one for one in others if one.guest != claim.guest)), regions)
    return tuple(_check_case(Case.of(claim, region, said), said, arch))


def check_requests(
    config: GuestConfig,
    *,
    existing: Mapping[str, Region],
    others: Sequence[Claim],
    regions: Sequence[RegionConfig] = (),
    arch: Arch | None = None,
) -> tuple[XshmError, ...]:
    """Do :func:`check_region` for all entries of a guest, in time proportional to what is said.

    Args:
        config: The guest's configuration.
        existing: The regions that exist, by id.
        others: As for :func:`check_region`.
        regions: As for :func:`check_region`.
        arch: As for :func:`check_region`.
    """
    own = [Claim(guest=config.name, request=request) for request in config.requests]
    said = Said((*own, *(one for one in others if one.guest != config.name)), regions)
    cases = [Case.of(claim, existing.get(claim.request.region_id), said) for claim in own]
    found = [error for case in cases for error in _check_case(case, said, arch)]
    return _once([*found, *_check_beside(cases)])


def check_definitions(
    regions: Sequence[RegionConfig], *, others: Sequence[Claim] = (), arch: Arch | None = None
) -> tuple[XshmError, ...]:
    """Return every broken rule of what is defined apart from any guest.

    Args:
        regions: The definitions.
        others: What guests say, e.g. by :func:`claims`.
        arch: The machine's, where it is known.
    """
    said = Said(others, regions)
    found: list[XshmError] = []
    for config in regions:
        found += _check_definition(Definition.of_config(config), said, arch)
    return _once(found)


def check_together(
    configs: Sequence[GuestConfig], regions: Sequence[RegionConfig], arch: Arch
) -> tuple[XshmError, ...]:
    """Return every broken rule of all of a host's configurations, each once; no Xen is needed.

    Args:
        configs: The guests'.
        regions: What is defined apart from any guest.
        arch: The machine's.
    """
    others = claims((), configs)
    said = Said(others, regions)
    found: list[XshmError] = []
    granted = granted_ids((), regions, configs)
    for config in configs:
        found += check_config(config, arch, granted=granted)
    found += check_definitions(regions, others=others, arch=arch)
    by_guest: dict[str, list[Case]] = {}
    for claim in others:
        case = Case.of(claim, None, said)
        found += _check_case(case, said, arch)
        by_guest.setdefault(claim.guest, []).append(case)
    for cases in by_guest.values():
        found += _check_beside(cases)
    return _once(found)


def remarks(
    config: GuestConfig,
    *,
    existing: Mapping[str, Region],
    others: Sequence[Claim],
    regions: Sequence[RegionConfig] = (),
) -> tuple[str, ...]:
    """Return what has to be said of a guest's entries though they break no rule.

    The arguments are those of :func:`check_requests`.
    """
    own = [Claim(guest=config.name, request=request) for request in config.requests]
    said = Said((*own, *(one for one in others if one.guest != config.name)), regions)
    cases = [Case.of(claim, existing.get(claim.request.region_id), said) for claim in own]
    return tuple(text for case in cases if (text := region_rules.unenforced(case)))


def _check_case(case: Case, said: Said, arch: Arch | None) -> Iterator[XshmError]:
    for rule in (*region_rules.REGION_RULES, *grant_rules.REGION_RULES):
        yield from rule(case)
    # A region that exists is as it is, and only what the entry itself says can be wrong with it.
    definitions = case.definitions if case.region is None else case.own
    for definition in definitions:
        yield from _check_definition(definition, said, arch)


def _check_beside(cases: Sequence[Case]) -> Iterator[XshmError]:
    for rule in region_rules.BESIDE_RULES:
        yield from rule(cases)


def _check_definition(definition: Definition, said: Said, arch: Arch | None) -> Iterator[XshmError]:
    for rule in (*definition_rules.DEFINITION_RULES, *grant_rules.DEFINITION_RULES):
        yield from rule(definition, said, arch)


def _once(found: Sequence[XshmError]) -> tuple[XshmError, ...]:
    """Leave out what was found before, as from each member of one region."""
    return tuple({error.one_line(): error for error in found}.values())
