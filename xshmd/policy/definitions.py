# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who says what about a region: definitions by owners or for the system, and claims of guests.

A region is *defined* once: by the entry of the guest that owns it, or apart from any guest, and
then it is the system's.  Whatever else names it is a borrower.
"""

from __future__ import annotations

import bisect
import dataclasses
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator

from xshmd.model import (
    NOWHERE,
    Backing,
    GuestConfig,
    Place,
    Region,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What some guest says about a region, and which guest it is."""

    guest: str
    request: RegionRequest

    def __str__(self) -> str:
        where = f" ({self.request.place})" if self.request.place.file else ""
        return f"guest '{self.guest}'{where}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What a region is to be, or is, and who says so."""

    region_id: str
    nr_frames: int
    terms: RegionTerms
    owner: str
    """The guest that owns it; empty: it is the system's."""
    place: Place
    who: str
    """Who says so, in words."""

    @classmethod
    def of_claim(cls, claim: Claim) -> Definition:
        """Return what an owner's entry defines."""
        request = claim.request
        return cls(
            region_id=request.region_id, nr_frames=request.nr_frames, terms=terms_of(request),
            owner=claim.guest, place=request.place, who=str(claim),
        )  # fmt: skip

    @classmethod
    def of_config(cls, config: RegionConfig) -> Definition:
        """Return what a definition apart from any guest defines."""
        return cls(
            region_id=config.region_id, nr_frames=config.nr_frames, terms=config.terms, owner="",
            place=config.place, who=f"the system ({config.place})",
        )  # fmt: skip

    @classmethod
    def of_region(cls, region: Region) -> Definition:
        """Return what a region that exists is."""
        return cls(
            region_id=region.region_id, nr_frames=region.nr_frames, terms=region.terms,
            owner=region.owner, place=NOWHERE, who=f"region '{region.region_id}'",
        )  # fmt: skip

    @property
    def host_span(self) -> tuple[int, int] | None:
        """The first machine frame and the one after the last; None for fresh pages."""
        first = self.terms.host_first_mfn
        if self.terms.backing is not Backing.HOST or first is None:
            return None
        return first, first + self.nr_frames


class Said:
    """All definitions of regions, by region and by machine frame: made once for many questions."""

    def __init__(self, claims: Iterable[Claim] = (), configs: Iterable[RegionConfig] = ()) -> None:
        self._by_id: dict[str, list[Definition]] = defaultdict(list)
        for claim in claims:
            if claim.request.role is Role.OWNER:
                self._add(Definition.of_claim(claim))
        for config in configs:
            self._add(Definition.of_config(config))
        spans = ((one.host_span, one) for one in self)
        self._by_host = sorted(
            ((span, one) for span, one in spans if span is not None), key=operator.itemgetter(0)
        )
        self._largest = max((last - first for (first, last), _ in self._by_host), default=0)

    def _add(self, definition: Definition) -> None:
        self._by_id[definition.region_id].append(definition)

    def __iter__(self) -> Iterator[Definition]:
        for several in self._by_id.values():
            yield from several

    def definitions(self, region_id: str) -> tuple[Definition, ...]:
        """Return every definition of a region, the owners' first."""
        return tuple(self._by_id.get(region_id, ()))

    def sharing_host_frames(self, definition: Definition) -> tuple[Definition, ...]:
        """Return the definitions of other regions that have machine frames of this one."""
        span = definition.host_span
        if span is None:
            return ()
        first, last = span
        key = operator.itemgetter(0)
        begin = bisect.bisect_right(self._by_host, (first - self._largest, 0), key=key)
        end = bisect.bisect_left(self._by_host, (last, 0), key=key)
        return tuple(
            other
            for (_, other_last), other in self._by_host[begin:end]
            if other_last > first and other.region_id != definition.region_id
        )


def terms_of(request: RegionRequest) -> RegionTerms:
    """Return the terms that an owner's entry sets, its own prot and cache policy among them."""
    terms, said = request.terms, (request.prot, request.cache_policy)
    if (terms.prot, terms.cache_policy) == said:
        return terms
    return dataclasses.replace(terms, prot=request.prot, cache_policy=request.cache_policy)


def terms_by_id(
    regions: Iterable[Region], defined: Iterable[RegionConfig], configs: Iterable[GuestConfig]
) -> dict[str, RegionTerms]:
    """Return the terms of every region that is known of.

    Args:
        regions: Those that exist, which are as they are whatever anybody says.
        defined: What is defined apart from any guest.
        configs: What guests say.
    """
    there = {region.region_id: region.terms for region in regions}
    said = {config.region_id: config.terms for config in defined}
    said |= {
        request.region_id: request.terms
        for config in configs
        for request in config.requests
        if request.role is Role.OWNER
    }
    return said | there
