# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a region that exists is what a definition says: its members have it by its terms.

A definition that has changed since, be it its owner's who comes back or a file's, cannot change the
memory that others have by the old one; to go on with the old one would not be what was written.
"""

from __future__ import annotations

import dataclasses
import enum

from xshmd.model import Isolation, Lifetime, Region, RegionTerms
from xshmd.units import Gfn, address_of


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One term that is not what it is to be, both in the words of an entry."""

    said: str
    kept: str


def differences(said: RegionTerms, region: Region, *, lifetime: Lifetime) -> tuple[Difference, ...]:
    """Return every term in which a definition differs from the region that exists.

    Args:
        said: What the definition says; where it leaves the choice to us nothing differs.
        region: What exists.
        lifetime: What the definition means where it says no lifetime.
    """
    has = region.terms
    pairs: list[tuple[str, enum.StrEnum, enum.StrEnum]] = [
        ("prot", said.prot, has.prot),
        ("lifetime", said.lifetime or lifetime, region.lifetime),
        ("backing", said.backing, has.backing),
        ("transport", said.transport, has.transport),
        ("prot_enforcement", said.prot_enforcement, has.prot_enforcement),
    ]
    if said.cache_policy is not None and has.cache_policy is not None:
        pairs.append(("cache_policy", said.cache_policy, has.cache_policy))
    if said.isolation is not None:
        pairs.append(("isolation", said.isolation, has.isolation or Isolation.GROUP))
    found = [
        Difference(f"{name}={to_be}", f"{name}={is_}") for name, to_be, is_ in pairs if to_be != is_
    ]
    if said.backing is has.backing and said.host_first_mfn != has.host_first_mfn:
        found.append(Difference(_at(said), _at(has)))
    return tuple(found)


def _at(terms: RegionTerms) -> str:
    return f"host address {address_of(Gfn(terms.host_first_mfn or 0)):#x}"
