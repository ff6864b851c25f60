# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gives every member of a region a number of its own: the lowest that no other member has.

It stays the member's through reboots, and is free again once the guest has left or ended.
"""

from __future__ import annotations

from collections.abc import Iterable

from xshmd.errors import Conflict
from xshmd.model import Guest, GuestState, Peer, Region


def places(guest: Guest, guests: Iterable[Guest], regions: Iterable[Region]) -> tuple[Peer, ...]:
    """Return a guest's place in each region it asks for, in the order it names them.

    Ports that it has are kept: those of a place that it still has there, and those of places it
    has no more for whoever needs ports next, the oldest first.

    Args:
        guest: The guest.
        guests: All that are known; one of the same name that reboots is the same peer.
        regions: All that are known.

    Raises:
        Conflict: a region has doorbells, and none for one more peer.
    """
    others = [one for one in guests if one.generation != guest.generation]
    by_id = {region.region_id: region for region in regions}
    wanted = dict.fromkeys(request.region_id for request in guest.requests)
    had = {peer.region_id: peer for peer in guest.peers}
    spare = [port for peer in guest.peers if peer.region_id not in wanted for port in peer.ports]
    found = []
    for region_id in wanted:
        nr_doorbells = by_id[region_id].terms.doorbells if region_id in by_id else 0
        if region_id in had:
            peer_id, ports = had[region_id].peer_id, list(had[region_id].ports)
        else:
            peer_id, ports = _free_id(guest, others, region_id), []
        if nr_doorbells and peer_id >= nr_doorbells:
            raise Conflict(
                f"region {region_id} has doorbells for {nr_doorbells} peers, and guest "
                f"{guest.name} would be one more",
                hint="say a larger number of doorbells where the region is defined",
                region=region_id,
            )
        while spare and len(ports) < nr_doorbells:
            ports.append(spare.pop(0))
        found.append(Peer(region_id=region_id, peer_id=peer_id, ports=tuple(ports)))
    if spare:
        found.append(Peer(region_id="", peer_id=-1, ports=tuple(spare)))
    return tuple(found)


def _free_id(guest: Guest, others: Iterable[Guest], region_id: str) -> int:
    taken = set()
    for other in others:
        peer = other.peer(region_id)
        if peer is None:
            continue
        if other.name == guest.name and other.state is GuestState.REBOOTING:
            return peer.peer_id
        taken.add(peer.peer_id)
    return next(one for one in range(len(taken) + 1) if one not in taken)
