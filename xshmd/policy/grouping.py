# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which guests must share a holder: those linked by regions, however many steps apart.

A guest has one target for life (``d->target`` in Xen), so all its regions live in one holder, and
so do all regions of every guest it shares one with.  What is known *beforehand*, from the files on
this host, therefore decides where a region goes; two groups that already live cannot be joined.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from xshmd.errors import Conflict
from xshmd.model import Guest, GuestConfig, GuestState, Region

_HAS_PAGES: Final = (GuestState.ATTACHING, GuestState.MAPPING, GuestState.ATTACHED)


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
