# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has what, before a change and after it: all that limits and allow-lists need to know."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from xshmd.declarations import Declarations
from xshmd.model import (
    NOWHERE,
    Backing,
    GuestConfig,
    GuestState,
    Place,
    RegionRequest,
    RegionTerms,
    Role,
    Snapshot,
    Transport,
)
from xshmd.policy.definitions import terms_by_id, terms_of

NO_TERMS: Final[Mapping[str, RegionTerms]] = {}
_UNMADE = (GuestState.HELD, GuestState.DOOMED)
"""States of guests that have nothing yet, or never will."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Regions and who has them."""

    regions: Mapping[str, int]
    """How many frames of fresh memory each region has, by id."""
    guests: Mapping[str, Mapping[str, int]]
    """Of each guest, how many frames of each of its regions it has."""
    homes: Mapping[str, str]
    """The holder of each guest that has one, or the name of one to be made."""
    closed: frozenset[str] = frozenset()
    """The regions that open nothing but themselves: sealed ones, and those that guests map."""
    lent: frozenset[str] = frozenset()
    """The regions that are dom0's own memory."""
    places: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    """Where it was written what a region is, or that a guest has it."""

    @classmethod
    def of(cls, snapshot: Snapshot, terms: Mapping[str, RegionTerms] = NO_TERMS) -> Holdings:
        """Return what exists.

        Args:
            snapshot: All of it.
            terms: Those of all regions, of those that are to be made too.
        """
        guests = [guest for guest in snapshot.guests if guest.state not in _UNMADE]
        return cls(
            regions={
                region.region_id: _fresh(region.terms, region.nr_frames)
                for region in snapshot.regions
            },
            guests={guest.name: _frames(guest.requests) for guest in guests},
            homes={guest.name: guest.holder_uuid for guest in guests if guest.holder_uuid},
            closed=_closed(terms),
            lent=_lent(terms),
        )

    @classmethod
    def of_files(cls, said: Declarations) -> Holdings:
        """Return what there would be if all guests of some files ran."""
        regions = {
            config.region_id: _fresh(config.terms, config.nr_frames) for config in said.regions
        }
        places = {config.region_id: config.place for config in said.regions}
        for guest in said.guests:
            for request in guest.requests:
                places.setdefault(request.region_id, request.place)
                if request.role is Role.OWNER:
                    regions[request.region_id] = _fresh(terms_of(request), request.nr_frames)
        terms = terms_by_id((), said.regions, said.guests)
        return cls(
            regions=regions,
            guests={guest.name: _frames(guest.requests) for guest in said.guests if guest.requests},
            homes={},
            closed=_closed(terms),
            lent=_lent(terms),
            places=places | _places(said.guests),
        )

    def with_regions(self, made: Mapping[str, int], removed: Iterable[str] = ()) -> Holdings:
        """Return what there is with regions made, of so many fresh frames each, and removed."""
        gone = set(removed)
        left = {one: frames for one, frames in self.regions.items() if one not in gone}
        return dataclasses.replace(self, regions={**left, **made})

    def with_guest(self, name: str, requests: Sequence[RegionRequest], home: str) -> Holdings:
        """Return what there is with a guest that has exactly this."""
        config = GuestConfig(name=name, requests=tuple(requests))
        places = {one.region_id: one.place for one in requests}
        return dataclasses.replace(
            self,
            guests={**self.guests, name: _frames(requests)},
            homes={**self.homes, name: home} if home else self.homes,
            places=places | dict(self.places) | _places([config]),
        )

    def place_of(self, region_id: str = "", guest: str = "") -> Place:
        """Return where something was written, or NOWHERE."""
        return self.places.get(_key(guest, region_id)) or NOWHERE

    def groups(self) -> tuple[frozenset[str], ...]:
        """Return the guests that reach each other's regions: of one holder, or linked by regions.

        A guest that has given its regions back still has the holder as its target.
        """
        members: dict[str, list[str]] = defaultdict(list)
        """Of each holder and each region, told apart by a word before it."""
        for name, home in self.homes.items():
            if not self.guests.get(name, {}).keys() & self.closed:
                members[f"holder {home}"].append(name)
        for name, had in self.guests.items():
            for region_id in had.keys() - self.closed:
                members[f"region {region_id}"].append(name)
        group_of = {name: {name} for name in (*self.guests, *self.homes)}
        for first, *others in members.values():
            for other in others:
                small, large = sorted((group_of[first], group_of[other]), key=len)
                if small is not large:
                    large |= small
                    group_of |= dict.fromkeys(small, large)
        found = {id(group): frozenset(group) for group in group_of.values()}
        return tuple(group for group in found.values() if len(group) > 1)


NOTHING: Final = Holdings(regions={}, guests={}, homes={})


def _closed(terms: Mapping[str, RegionTerms]) -> frozenset[str]:
    return frozenset(
        region_id
        for region_id, its in terms.items()
        if its.is_sealed or its.transport is Transport.GRANT
    )


def _lent(terms: Mapping[str, RegionTerms]) -> frozenset[str]:
    return frozenset(region_id for region_id, its in terms.items() if its.is_lent)


def _fresh(terms: RegionTerms, nr_frames: int) -> int:
    """Return how many frames of a region are had from Xen for it."""
    return nr_frames if terms.backing is Backing.HOLDER else 0


def _frames(requests: Iterable[RegionRequest]) -> dict[str, int]:
    return {request.region_id: request.nr_frames for request in requests}


def _places(guests: Iterable[GuestConfig]) -> dict[str, Place]:
    return {
        _key(guest.name, request.region_id): request.place
        for guest in guests
        for request in guest.requests
    }


def _key(guest: str, region_id: str) -> str:
    return f"{guest}/{region_id}" if guest else region_id
