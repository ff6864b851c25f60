# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the definition of a region can say, whoever its members are.

"seeds" in the sources below is reference/seeds-and-peers.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from xshmd.machine import Arch
from xshmd.model import (
    MAX_DOORBELLS,
    MAX_REGION_ID_LENGTH,
    Backing,
    Isolation,
    Lifetime,
    RegionTerms,
    Transport,
)
from xshmd.policy.definitions import Definition, Said
from xshmd.policy.entry_rules import CACHE_POLICY
from xshmd.policy.findings import Findings, config_error, conflict, refused
from xshmd.units import MAX_GUEST_FRAMES, bytes_of, human_size

_ID: Final = re.compile(rf"[_a-zA-Z0-9@-]{{1,{MAX_REGION_ID_LENGTH}}}")


def bad_id(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """An id is part of xenstore paths and of three file formats (seeds A14)."""
    if not _ID.fullmatch(definition.region_id):
        yield config_error(
            "bad-id",
            definition.place,
            f"{definition.region_id[:40]!a} is no id of a region",
            f"1 to {MAX_REGION_ID_LENGTH} characters a-z A-Z 0-9 _ - @ are possible",
        )


def size_zero(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """A region has at least one page and fits into an address space (seeds B10)."""
    if not 0 < definition.nr_frames <= MAX_GUEST_FRAMES:
        most = human_size(bytes_of(MAX_GUEST_FRAMES))
        yield config_error(
            "size-zero",
            definition.place,
            f"region '{definition.region_id}' has a size of {definition.nr_frames} pages",
            f"say a size of one page or more, and at most {most}",
        )


def lifetime_contradiction(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Who defines a region says whose it is, so that also ends it (seeds B7)."""
    terms = definition.terms
    if definition.owner and terms.lifetime is Lifetime.SYSTEM:
        yield config_error(
            "lifetime-contradiction",
            definition.place,
            f"region '{definition.region_id}' has lifetime=system, but is owned by guest"
            f" '{definition.owner}'",
            "define it apart from any guest, in a file in /etc/xshmd/regions.d, or say"
            " lifetime=members",
        )
    if not definition.owner and terms.lifetime is Lifetime.OWNER:
        yield config_error(
            "lifetime-contradiction",
            definition.place,
            f"region '{definition.region_id}' has lifetime=owner, but no owner",
            "name its owner, or say lifetime=members or lifetime=system",
        )


def other_cache_policy(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """As :func:`xshmd.policy.entry_rules.other_cache_policy`, for what the system defines."""
    policy = definition.terms.cache_policy
    if definition.owner or policy is None or arch is None or policy is CACHE_POLICY[arch]:
        return
    yield config_error(
        "other-cache-policy",
        definition.place,
        f"region '{definition.region_id}' has cache_policy={policy}, which is not for {arch}",
        f"say cache_policy={CACHE_POLICY[arch]} or leave it out",
    )


def host_address(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Memory of the host is said by its address, and no other is (seeds B3, B10)."""
    terms = definition.terms
    if (terms.backing is Backing.HOST) == (terms.host_first_mfn is not None):
        return
    yield config_error(
        "host-address",
        definition.place,
        f"region '{definition.region_id}' has {_backing_text(terms)}",
        "say both, or neither",
    )


def shared_host_range(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Two ids never name the same memory (seeds A10, B11)."""
    for other in said.sharing_host_frames(definition):
        yield conflict(
            "shared-host-range",
            definition.place,
            f"region '{definition.region_id}' of {definition.who} has host memory that region"
            f" '{other.region_id}' of {other.who} has as well",
            "give each region a range of its own, or both guests the same region",
            region=definition.region_id,
        )


def defined_twice(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """What the system defines it defines once (seeds B11)."""
    if definition.owner:
        return
    first = next(one for one in said.definitions(definition.region_id) if not one.owner)
    if first != definition:
        yield conflict(
            "defined-twice",
            definition.place,
            f"region '{definition.region_id}' is defined already, by {first.who}",
            "remove one of the two definitions",
            region=definition.region_id,
        )


def doorbells(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Peers that ring each other need a page to say who is there, and dom0 has to reach it."""
    terms = definition.terms
    if not terms.doorbells:
        return
    what = f"region '{definition.region_id}' has doorbells"
    if not 2 <= terms.doorbells <= MAX_DOORBELLS:
        yield config_error(
            "doorbells",
            definition.place,
            f"{what} for {terms.doorbells} peers",
            f"say a number of 2 to {MAX_DOORBELLS}, or leave it out",
        )
    if definition.nr_frames < 2:
        yield config_error(
            "doorbells",
            definition.place,
            f"{what} and a single page, which would be the control page",
            "give it one page more",
        )
    other = (terms.backing, terms.transport, terms.isolation)
    if any(one in other for one in (Backing.HOST, Transport.GRANT, Isolation.SEALED)):
        yield refused(
            "doorbells",
            definition.place,
            f"{what}, and xshmd cannot reach its memory while its guests run",
            "leave out doorbells, or backing=host, transport=grant or isolation=sealed",
        )


DEFINITION_RULES: tuple[Callable[[Definition, Said, Arch | None], Findings], ...] = (
    bad_id,
    size_zero,
    lifetime_contradiction,
    other_cache_policy,
    host_address,
    shared_host_range,
    defined_twice,
    doorbells,
)


def _backing_text(terms: RegionTerms) -> str:
    if terms.backing is Backing.HOST:
        return "backing=host without a host address"
    return f"a host address without backing={Backing.HOST}"
