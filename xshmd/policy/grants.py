# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which regions guests map themselves, and where room for their grant references is.

Pure.  A holder's grant table has an entry for every frame that every member may map, so a table
serves few regions, or one large region needs several; and a domain of ours is cheap.  Room is kept
for the members that are known of, and for some that are not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from xshmd.machine import HostInfo
from xshmd.model import Grant, Guest, GuestConfig, Holder, Piece, Region, RegionConfig, Transport
from xshmd.policy.definitions import terms_by_id
from xshmd.units import PAGE_SIZE, SUPERPAGE_FRAMES, Gfn

ENTRIES_PER_FRAME: Final = PAGE_SIZE // 8
RESERVED_ENTRIES: Final = 8
"""GNTTAB_NR_RESERVED_ENTRIES (xen/include/public/grant_table.h): the toolstack's."""
USUAL_TABLE_FRAMES: Final = 64
"""What Xen allows a domain unless told otherwise: opt_max_grant_frames, common/grant_table.c."""
LEAST_MEMBERS: Final = 4
"""For how many members there is room, though fewer are known of."""
MAX_RANGES: Final = 64
"""Of references to one region: a guest's node, and the records, have room for so many."""
ENTRY_BYTES: Final = 8 + 56
"""What Xen takes for one: grant_entry_v1_t, and its own struct active_grant_entry."""

_LIMIT: Final = re.compile(r"(?:^|\s)gnttab_max_frames=(\d+)")


def granted_ids(
    regions: Iterable[Region],
    defined: Iterable[RegionConfig],
    configs: Iterable[GuestConfig],
) -> frozenset[str]:
    """Return the ids of the regions that their members map themselves.

    The arguments are those of :func:`~xshmd.policy.definitions.terms_by_id`.
    """
    terms = terms_by_id(regions, defined, configs)
    return frozenset(one for one, its in terms.items() if its.transport is Transport.GRANT)


def lent_ids(
    regions: Iterable[Region],
    defined: Iterable[RegionConfig],
    configs: Iterable[GuestConfig],
) -> frozenset[str]:
    """Return the ids of the regions that are dom0's own memory; arguments as above."""
    terms = terms_by_id(regions, defined, configs)
    return frozenset(one for one, its in terms.items() if its.is_lent)


def without(granted: Collection[str], config: GuestConfig) -> GuestConfig:
    """Return a configuration with what is mapped for the guest alone."""
    kept = tuple(one for one in config.requests if one.region_id not in granted)
    return dataclasses.replace(config, requests=kept)


def only(granted: Collection[str], config: GuestConfig) -> GuestConfig:
    """Return a configuration with what the guest maps itself alone."""
    kept = tuple(one for one in config.requests if one.region_id in granted)
    return dataclasses.replace(config, requests=kept)


def guest_without(granted: Collection[str], guest: Guest) -> Guest:
    """Return a guest with what is mapped for it alone."""
    kept = tuple(one for one in guest.requests if one.region_id not in granted)
    return dataclasses.replace(guest, requests=kept)


def table_frames(host: HostInfo) -> int:
    """Return how many frames a grant table of ours may have: what Xen's command line allows.

    Xen itself would let a toolstack exceed it (``grant_table_init()``), but an administrator who
    says it means it.
    """
    said = _LIMIT.findall(host.xen_command_line)
    # One frame is what a holder has that serves no grants.
    return max(int(said[-1]), 2) if said else USUAL_TABLE_FRAMES


def capacity(nr_table_frames: int) -> int:
    """Return how many references a table of so many frames has for us."""
    return nr_table_frames * ENTRIES_PER_FRAME - RESERVED_ENTRIES


def room_bytes(nr_frames: int, nr_members: int) -> int:
    """Return what Xen takes for the references of so many members to so many frames."""
    return nr_frames * max(nr_members, LEAST_MEMBERS) * ENTRY_BYTES


# -- where a region goes ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """A part of a region to be made."""

    holder_uuid: str
    """The holder that is to have it; empty: a new one."""
    nr_frames: int


def shares(
    nr_frames: int, nr_members: int, *, nr_table_frames: int, room: Mapping[str, int]
) -> tuple[Share, ...]:
    """Return in which holders a region is made.

    Args:
        nr_frames: The region's frames.
        nr_members: How many members are known of.
        nr_table_frames: How large a table may be.
        room: How many references each holder that serves grants has left, by UUID.
    """
    each = max(nr_members, LEAST_MEMBERS)
    for uuid, left in room.items():
        if nr_frames * each <= left:
            return (Share(uuid, nr_frames),)
    most = capacity(nr_table_frames) // each
    if nr_frames > most >= SUPERPAGE_FRAMES:
        most -= most % SUPERPAGE_FRAMES  # else no piece but the first would be of whole superpages
    most = max(most, 1)
    return tuple(Share("", min(most, nr_frames - at)) for at in range(0, nr_frames, most))


def room_left(
    holder: Holder, regions: Iterable[Region], guests: Sequence[Guest], region_id: str = ""
) -> int:
    """Return how many references of a holder are free, and kept for no other region.

    Args:
        holder: The holder.
        regions: All that exist.
        guests: All that exist.
        region_id: The region they are wanted for, if it exists.
    """
    grants = [one for guest in guests for one in guest.grants if one.holder_uuid == holder.uuid]
    taken = 0
    kept = set()
    for region in regions:
        nr_frames = sum(p.nr_frames for p in region.pieces if p.holder_uuid == holder.uuid)
        used = sum(one.nr_frames for one in grants if one.region_id == region.region_id)
        least = 0 if region.region_id == region_id else nr_frames * LEAST_MEMBERS
        taken += max(used, least)
        kept.add(region.region_id)
    taken += sum(one.nr_frames for one in grants if one.region_id not in kept)
    return capacity(holder.nr_grant_frames) - taken


# -- a member's references -------------------------------------------------------------------------


def wanted_pieces(region: Region, offset_frames: int, nr_frames: int) -> Iterator[Piece]:
    """Yield the pieces of a part of a region."""
    end = offset_frames + nr_frames
    for piece in region.pieces:
        first = max(offset_frames, piece.offset_frames)
        last = min(end, piece.offset_frames + piece.nr_frames)
        if first < last:
            yield dataclasses.replace(
                piece,
                offset_frames=first,
                nr_frames=last - first,
                holder_first_gfn=Gfn(piece.holder_first_gfn + first - piece.offset_frames),
            )


def allot(region_id: str, piece: Piece, holder: Holder, taken: Iterable[Grant]) -> list[Grant]:
    """Return free references for all frames of a piece, in as few ranges as there are gaps for.

    Args:
        region_id: Whose they are.
        piece: The frames.
        holder: Its holder.
        taken: Every range of that holder that is in use, in any order.

    Returns:
        Ranges; fewer frames than wanted if there are not enough.
    """
    gaps = _gaps(holder, taken)
    whole = [gap for gap in gaps if gap[1] >= piece.nr_frames]
    found: list[Grant] = []
    done = 0
    for first_ref, size in whole[:1] or gaps:
        count = min(size, piece.nr_frames - done)
        if count:
            found.append(
                Grant(
                    region_id=region_id, holder_uuid=holder.uuid, first_ref=first_ref,
                    nr_frames=count, offset_frames=piece.offset_frames + done,
                )
            )  # fmt: skip
        done += count
    return found


def free_refs(holder: Holder, taken: Iterable[Grant], nr_refs: int) -> int | None:
    """Return the first of so many consecutive free references, the lowest that there are.

    A table grows to the highest that is used, and is never smaller again.

    Args:
        holder: The holder whose they are.
        taken: Every range of that holder that is in use, in any order.
        nr_refs: How many are wanted.
    """
    fitting = (first for first, size in _gaps(holder, taken) if size >= nr_refs)
    return next(fitting, None)


def _gaps(holder: Holder, taken: Iterable[Grant]) -> list[tuple[int, int]]:
    """Return the free references of a holder: each first one, and how many follow it."""
    end = holder.nr_grant_frames * ENTRIES_PER_FRAME
    there = sorted((one.first_ref, one.first_ref + one.nr_frames) for one in taken)
    gaps, at = [], RESERVED_ENTRIES
    for first, after in (*there, (end, end)):
        if first > at:
            gaps.append((at, first - at))
        at = max(at, after)
    return gaps


def published(grants: Iterable[Grant], domids: Mapping[str, int]) -> str:
    """Say references as a guest reads them: ``HOLDER:FIRST+COUNT``, in the order of its frames."""
    there = sorted(grants, key=lambda one: one.offset_frames)
    return ",".join(
        f"{domids[one.holder_uuid]}:{one.first_ref}+{one.nr_frames}"
        for one in there
        if one.holder_uuid in domids
    )
