# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which guests must share a holder: those linked by regions, however many steps apart.

A guest has one target for life (``d->target`` in Xen), so all its regions live in one holder, and
so do all regions of every guest it shares one with.  What is known *beforehand*, from the files on
this host, therefore decides where a region goes; two groups that already live cannot be joined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from xshmd.errors import Conflict
from xshmd.model import Guest, GuestConfig, GuestState, Lease, Region

_HAS_PAGES: Final = (GuestState.ATTACHING, GuestState.MAPPING, GuestState.ATTACHED)
_NEW_HOME: Final = "new-"


def linked_regions(
    wanted: Iterable[str], memberships: Iterable[tuple[str, Iterable[str]]]
) -> frozenset[str]:
    """Return every region id reachable from ``wanted`` through guests that have several.

    Args:
        wanted: The region ids to start from.
        memberships: One (guest name, its region ids) each; a name may come more than once.
    """
    per_guest: dict[str, set[str]] = {}
    for name, region_ids in memberships:
        per_guest.setdefault(name, set()).update(region_ids)
    reached = set(wanted)
    waiting = list(per_guest.values())
    while touching := [ids for ids in waiting if ids & reached]:
        waiting = [ids for ids in waiting if not ids & reached]
        reached.update(*touching)
    return frozenset(reached)


def choose_holder(
    config: GuestConfig,
    *,
    known: Iterable[GuestConfig],
    regions: Iterable[Region],
    guests: Iterable[Guest],
) -> str | None:
    """Return the UUID of the holder this guest's regions live in, or None for a new one.

    Raises:
        Conflict: its regions are, or would be linked to regions, in holders that cannot be joined.
    """
    guests = tuple(guests)
    own = {request.region_id for request in config.requests}
    memberships: list[tuple[str, Iterable[str]]] = [(config.name, own)]
    memberships += [
        (other.name, [request.region_id for request in other.requests])
        for other in known
        if other.name != config.name
    ]
    memberships += [
        (guest.name, [request.region_id for request in guest.requests])
        for guest in guests
        if guest.name != config.name
    ]
    # A region is where it is; one that is only about to be made is where the guest that makes it
    # has its target.
    home = {
        request.region_id: guest.holder_uuid
        for guest in guests
        if guest.holder_uuid and guest.name != config.name and guest.state in _HAS_PAGES
        for request in guest.requests
    }
    home |= {region.region_id: region.holder_uuid for region in regions}
    # Regions that exist and are wanted decide; linked ones that exist come second, since a link
    # that only a file on disk says may never become real.
    needed = {home[region_id] for region_id in own if region_id in home}
    if len(needed) > 1:
        placed = ", ".join(
            f"{region_id} with {_members(region_id, guests)}"
            for region_id in sorted(own)
            if region_id in home
        )
        raise Conflict(
            f"guest {config.name} wants regions of two share groups that already live: {placed}",
            hint="shut the guests of one group down, then start this one first: the groups join; "
            "or have all their files under /etc/xen, so that they are one group from the start",
            guest=config.name,
        )
    if needed:
        return needed.pop()
    linked = {
        home[region_id] for region_id in linked_regions(own, memberships) if region_id in home
    }
    # Linked to several by files alone: any will do now; the guest that really links them is refused
    # with the reason above when it comes.
    return min(linked) if linked else None


def _members(region_id: str, guests: Iterable[Guest]) -> str:
    names = [
        guest.name
        for guest in guests
        if any(request.region_id == region_id for request in guest.requests)
    ]
    return " and ".join(sorted(names)) or "no guest"


def movable_regions(
    regions: Iterable[Region], guests: Iterable[Guest], leases: Iterable[Lease] = ()
) -> Mapping[str, str]:
    """Return the regions that nobody has, with their holders: they can be had in any other.

    One that a process of the control domain has mapped would be left behind in the old one.
    """
    had = {request.region_id for guest in guests for request in guest.requests}
    had |= {lease.region_id for lease in leases}
    return {
        region.region_id: region.holder_uuid
        for region in regions
        if region.ready and region.region_id not in had
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A guest and the regions it is to have from now on, for :func:`assign_homes`."""

    guest: str
    holder_uuid: str
    """Its holder; empty if it has none yet."""
    region_ids: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Homes:
    """Where things are to be: holder UUIDs, or names of holders yet to be made."""

    regions: Mapping[str, str]
    guests: Mapping[str, str]


def is_new_home(home: str) -> bool:
    """Return whether this names a holder that is yet to be made."""
    return home.startswith(_NEW_HOME)


def assign_homes(
    new_regions: Iterable[str],
    links: Sequence[Link],
    *,
    known: Iterable[GuestConfig],
    regions: Iterable[Region],
    guests: Sequence[Guest],
    leases: Iterable[Lease] = (),
) -> Homes:
    """Return the holder of each linked guest, and of each region that is new or has to move.

    Args:
        new_regions: The ids of those to be made.
        links: The guests that are to have more, and what.
        known: What configurations say.
        regions: Those that exist; one that nobody has moves to where it is wanted.
        guests: Those that exist.
        leases: Those that exist.

    Raises:
        Conflict: things that have holders already would have to be in one.
    """
    wanted = {region_id for link in links for region_id in link.region_ids}
    regions = tuple(regions)
    movable = {
        region_id: home
        for region_id, home in movable_regions(regions, guests, leases).items()
        if region_id in wanted
    }
    at = {r.region_id: r.holder_uuid for r in regions if r.region_id not in movable}
    for link in links:
        _one_holder(link, at, guests)
    files = [(c.name, [r.region_id for r in c.requests]) for c in known]
    files += [(guest.name, [r.region_id for r in guest.requests]) for guest in guests]
    waiting = {*new_regions, *movable} - at.keys()
    count = 0
    while True:
        # What a guest that has a holder wants goes there; then what goes with that, and so on.
        for link in links:
            held = {link.holder_uuid} - {""} | {at[one] for one in link.region_ids & at.keys()}
            if len(held) > 1:
                raise _apart(link.guest, at, link.region_ids, guests)
            for home in held:
                at |= dict.fromkeys(link.region_ids - at.keys(), home)
        left = sorted(waiting - at.keys())
        if not left:
            break
        if any(
            not link.region_ids.isdisjoint(at) and link.region_ids - at.keys() for link in links
        ):
            continue
        one = next((region_id for region_id in left if region_id in movable), left[0])
        # Linked by files alone: those that exist decide, as in choose_holder().
        linked = linked_regions([one], files)
        there = sorted({at[other] for other in linked if at.get(other)})
        if one in movable:
            at[one] = movable[one]
        elif there:
            at[one] = there[0]
        else:
            count += 1
            at[one] = f"{_NEW_HOME}{count}"
    return Homes(
        regions={one: at[one] for one in waiting if at[one] != movable.get(one)},
        guests={
            link.guest: link.holder_uuid or next(at[one] for one in sorted(link.region_ids))
            for link in links
        },
    )


def _one_holder(link: Link, at: Mapping[str, str], guests: Sequence[Guest]) -> None:
    for region_id in sorted(link.region_ids & at.keys()):
        if link.holder_uuid and at[region_id] != link.holder_uuid:
            raise Conflict(
                f"guest {link.guest} cannot be given region {region_id}, which lives in another "
                f"share group, with {_members(region_id, guests)}: a guest has the memory of one "
                "holder for as long as it runs",
                hint=f"end guest {link.guest} and start it with the region in its configuration; "
                "or end the region's guests, remove it, and attach it here first",
                guest=link.guest,
                region=region_id,
            )


def _apart(
    guest: str, at: Mapping[str, str], region_ids: Iterable[str], guests: Sequence[Guest]
) -> Conflict:
    placed = ", ".join(
        f"{one} with {_members(one, guests)}" for one in sorted(region_ids) if one in at
    )
    return Conflict(
        f"guest {guest} would have regions of two share groups that already live: {placed}",
        hint="end the guests of one group, then start them anew with all regions in their "
        "configurations",
        guest=guest,
    )
