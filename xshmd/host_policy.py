# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an administrator lets guests have: their own configurations cannot say it for them.

:mod:`xshmd.config.host_policy` reads it, :mod:`xshmd.policy` keeps to it.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from xshmd.model import NOWHERE, Place


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most of something, or of the host's free memory the least; and where that was written."""

    value: int
    """A number of things, of frames, or of milliseconds."""
    place: Place


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an administrator limits; None where nothing is."""

    regions: Limit | None = None
    """How many there are."""
    memory: Limit | None = None
    """How many frames they have, of fresh memory, all together."""
    members: Limit | None = None
    """How many guests have any one region."""
    leases: Limit | None = None
    """How many leases processes of the control domain have."""
    regions_per_guest: Limit | None = None
    memory_per_guest: Limit | None = None
    """How many frames one guest has, of all of its regions."""
    free_memory: Limit | None = None
    """How many frames of the host are left free when a region is made."""
    pause: Limit | None = None
    """For how many milliseconds the guests of a sealed group stand still for a change."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """Guests that may share regions with one another, all by shell patterns."""

    name: str
    guests: tuple[str, ...]
    regions: tuple[str, ...] = ("*",)
    """The ids of the regions that they may have."""
    dom0: bool = False
    """Whether processes of the control domain may have these regions as well."""
    place: Place = NOWHERE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostPolicy:
    """What an administrator lets guests have, whatever their own configurations say."""

    limits: Limits = Limits()
    allowed: tuple[Allowed, ...] = ()
    """Without any, every guest may share with every other; else only those that one of these
    names."""


NO_POLICY: Final = HostPolicy()
