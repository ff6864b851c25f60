# SPDX-License-Identifier: LGPL-2.1-or-later
"""What sealed regions ask of their share group: all of it sealed, and a pause that is bounded.

A sealed region's pages are in its holder's p2m only while every guest that has the holder as its
target stands still (reference: security.md, 2.4).  So a holder has sealed regions or others, never
both, and whoever is to wait should be told beforehand for how long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

from xshmd.errors import Conflict, Refused
from xshmd.host_policy import Limit
from xshmd.model import Backing, RegionTerms, Transport
from xshmd.units import bytes_of, human_size

USUAL_PAUSE_S: Final = 10.0
"""For how long a group may stand still where the administrator says nothing."""
FIRST_MAP_S: Final = 10e-6
"""What mapping a frame is taken to cost before it was ever measured, in seconds."""


def mixed(regions: Iterable[tuple[str, RegionTerms]]) -> tuple[str, str] | None:
    """Return a sealed region and one that is not among those of one holder; None if all are alike.

    What nobody maps out of a holder that is a target counts as neither: host memory, and grants.
    """
    ours = [
        one
        for one in regions
        if one[1].backing is Backing.HOLDER and one[1].transport is Transport.PHYSMAP
    ]
    sealed = next((region_id for region_id, terms in ours if terms.is_sealed), None)
    plain = next((region_id for region_id, terms in ours if not terms.is_sealed), None)
    return None if sealed is None or plain is None else (sealed, plain)


def check_alike(regions: Iterable[tuple[str, RegionTerms]]) -> None:
    """Raise Conflict if regions that would live in one holder are not sealed alike."""
    if (pair := mixed(regions)) is not None:
        raise Conflict(
            f"regions {pair[0]}, which is sealed, and {pair[1]}, which is not, would be in one"
            " share group: whoever may reach the second would be its only protection",
            hint="say isolation=sealed for all of them, or give no guest both kinds",
            region=pair[0],
        )


@dataclasses.dataclass(slots=True)
class Pace:
    """How fast this machine puts regions on fresh pages, as far as it was seen doing so."""

    fresh_s: float = 0.0
    """Seconds for making and filling one fresh frame: the best that was seen; 0 before."""
    map_s: float = 0.0
    """Seconds for moving one frame of one member: the worst of late; 0 before."""

    def learn_fresh(self, nr_frames: int, seconds: float) -> None:
        """Take in how long making and filling so many frames took."""
        each = seconds / max(1, nr_frames)
        self.fresh_s = min(self.fresh_s, each) if self.fresh_s else each

    def learn_map(self, nr_frames: int, seconds: float) -> None:
        """Take in how long moving so many frames of members took."""
        each = seconds / max(1, nr_frames)
        self.map_s = max(each, 0.75 * self.map_s)

    def rest_s(self, nr_fresh: int, nr_moved: int) -> float:
        """Return what is left of a pause: frames still to make, and frames of members to move."""
        return nr_fresh * self.fresh_s + nr_moved * (self.map_s or FIRST_MAP_S)


def count_of(nr_guests: int) -> str:
    """Say how many guests that is."""
    return "1 guest" if nr_guests == 1 else f"{nr_guests} guests"


def check_pause(
    what: str, seconds: float, ceiling: Limit | None, nr_frames: int, nr_guests: int
) -> None:
    """Raise Refused if a group would stand still for longer than the administrator lets it."""
    ceiling_s = USUAL_PAUSE_S if ceiling is None else ceiling.value / 1000
    if nr_guests and seconds > ceiling_s:
        raise Refused(
            f"{what}: {count_of(nr_guests)} of its group would stand still for about"
            f" {seconds:.2g} s while {human_size(bytes_of(nr_frames))} are put on fresh pages, and"
            f" {ceiling_s:g} s is the most it may",
            hint="make sealed regions smaller, or raise "
            f"{ceiling.place if ceiling else '[limits] pause in /etc/xshmd/xshmd.toml'}",
            rule="too-long-a-pause",
        )
