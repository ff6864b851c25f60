# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a window comes to, from records alone: which pages are made where, and who is given them."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection, Iterable, Sequence

from xshmd.engine import attach as maps
from xshmd.engine.attach import Mapping, Span
from xshmd.engine.holders import FIRST_REGION_GFN
from xshmd.engine.intents import Intent
from xshmd.engine.window_records import Fresh, Phase, Window
from xshmd.model import Guest, Holder, Region
from xshmd.units import SUPERPAGE_FRAMES, Gfn


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A guest that is given sealed regions; it stands still already."""

    guest: Guest
    wanted: Sequence[Mapping]
    again: bool
    """As for :func:`xshmd.engine.attach.attach`."""
    with_tables: Collection[Span] = ()
    pauses: int | None = None
    """How many pauses are on it, if it may run on should this fail; None: it will not."""


def new_window(holder: Holder, regions: Iterable[Region], reason: str, join: Join | None) -> Window:
    """Return a window in which these regions are put on fresh pages; nobody is to pause yet.

    The pages of a sealed holder are at the same frames in each: Xen frees none of the tables that
    it has for them, and outside of windows nothing is there.
    """
    fresh, first = [], FIRST_REGION_GFN
    for region in regions:
        name = f"{holder.uuid}.{secrets.token_hex(8)}"
        fresh.append(Fresh(region.region_id, name, first, region.nr_frames))
        first = Gfn(-(-(first + region.nr_frames) // SUPERPAGE_FRAMES) * SUPERPAGE_FRAMES)
    return Window(
        holder_uuid=holder.uuid,
        phase=Phase.PREPARING,
        reason=reason,
        fresh=tuple(fresh),
        joiner=join.guest.generation if join else "",
        joins=tuple(maps.span_of(one.request) for one in join.wanted) if join else (),
    )


def members(
    window: Window, guests: Iterable[Guest], regions: Sequence[Region], intents: Iterable[Intent]
) -> list[tuple[Guest, list[Mapping]]]:
    """Return who of these guests has the window's regions, and what they are to have.

    Args:
        window: The window; its joiner is none of them.
        guests: Those that were let run.
        regions: All that there are.
        intents: Changes under way: what they gave a guest its record does not say yet.
    """
    given = {
        part.generation: part.attach
        for intent in intents
        for part in intent.parts
        if part.is_mapping
    }
    found = []
    for guest in guests:
        has = dict.fromkeys((*guest.requests, *given.get(guest.generation, ())))
        now = dataclasses.replace(guest, requests=tuple(has))
        wanted = placed(maps.of_sealed(now, regions), window)
        if wanted and guest.generation != window.joiner:
            found.append((guest, wanted))
    return found


def placed(wanted: Iterable[Mapping], window: Window) -> list[Mapping]:
    """Return those of a window's regions, with where their pages are in the holder."""
    first = {fresh.region_id: fresh.first_gfn for fresh in window.fresh}
    return [
        dataclasses.replace(
            one, holder_gfn=Gfn(first[one.request.region_id] + one.request.offset_frames)
        )
        for one in wanted
        if one.request.region_id in first
    ]


def nr_moved(window: Window, having: Iterable[tuple[Guest, list[Mapping]]]) -> int:
    """Return how many frames of guests are to be mapped, the joiner's among them."""
    moved = sum(one.request.nr_frames for _, each in having for one in each)
    return moved + sum(nr_frames for _, nr_frames in window.joins)
