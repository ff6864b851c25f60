# SPDX-License-Identifier: LGPL-2.1-or-later
"""At rest nothing may be left: what is looked at then, and whether any of it rises over hours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

COUNTS: Final = ("descriptors", "tasks", "threads")
"""What is exactly the same at every rest, whichever daemon it is by now."""
MAY_RISE: Final = {"rss_kib": 1024.0, "pss_kib": 1024.0, "objects": 500.0}
"""By the slope, in all the time that one daemon was looked at: an interpreter's memory is in
arenas of 1 MiB, and its objects go up and down by some hundred."""
WARM_RESTS: Final = 2
"""What a daemon allocates once it has by then."""
ENOUGH: Final = 3
"""Rests that a slope can be told from."""
HOUR_S: Final = 3600.0


@dataclass(frozen=True)
class Rest:
    """What there was when nothing lived.

    Attributes:
        at_s: when, in seconds since the churn began.
        life: which daemon of the run it was: 1 for the first.
        lacking_pages: how many pages of the host fewer were free than at the start.
        held: what the daemon held, see watched_daemon.py.
    """

    at_s: float
    life: int
    lacking_pages: int
    held: dict[str, int]

    def __str__(self) -> str:
        held = ", ".join(f"{name} {number}" for name, number in self.held.items())
        return f"{self.lacking_pages} pages lacking; daemon {self.life}: {held}"


@dataclass(frozen=True)
class Growth:
    """How much of something there was more and more.

    Attributes:
        an_hour: by least squares over the rests of one daemon.
        in_all: that slope times the hours from the first of those rests to the last.
    """

    an_hour: float
    in_all: float


def longest_life(rests: Sequence[Rest]) -> list[Rest]:
    """The rests of the daemon that was looked at most often, once it was warm."""
    lives: dict[int, list[Rest]] = {}
    for rest in rests:
        lives.setdefault(rest.life, []).append(rest)
    return max(lives.values(), key=len)[WARM_RESTS:]


def growth(rests: Sequence[Rest]) -> dict[str, Growth]:
    """By how much each figure has risen over these rests; empty if they are too few to tell."""
    if len(rests) < ENOUGH:
        return {}
    hours = [rest.at_s / HOUR_S for rest in rests]
    grown = {}
    for name in MAY_RISE:
        an_hour = statistics.linear_regression(hours, [rest.held[name] for rest in rests]).slope
        grown[name] = Growth(an_hour, an_hour * (hours[-1] - hours[0]))
    return grown


def risen(grown: dict[str, Growth]) -> list[str]:
    """What has risen by more than it may, for people."""
    return [
        f"{name} rises by {found.an_hour:+.0f} an hour, {found.in_all:+.0f} in all; "
        f"{MAY_RISE[name]:.0f} is allowed"
        for name, found in grown.items()
        if found.in_all > MAY_RISE[name]
    ]
