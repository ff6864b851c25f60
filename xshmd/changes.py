# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may be asked to be changed while guests run, and the steps that it takes: all or nothing."""

from __future__ import annotations

import dataclasses

from xshmd.model import RegionConfig, RegionRequest
from xshmd.units import DomId


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AddRegion:
    """A change: make this region, which belongs to the system."""

    config: RegionConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RemoveRegion:
    """A change: free this region."""

    region_id: str
    force: bool = False
    """Withdraw it from its members first; otherwise it is refused while it has any."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttachRegion:
    """A change: give a running guest a region."""

    guest: str
    """Its name, or its domid in decimal."""
    request: RegionRequest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DetachRegion:
    """A change: withdraw a region from a running guest."""

    guest: str
    """Its name, or its domid in decimal."""
    region_id: str


Change = AddRegion | RemoveRegion | AttachRegion | DetachRegion


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a plan, for people and programs; the plan is carried out in this order."""

    verb: str
    """``create``, ``attach``, ``detach`` or ``remove``."""
    region: str
    guest: str = ""
    domid: DomId | None = None
    text: str = ""
    """The step in words, e.g. ``pause ctl and map 1 MiB of r0 at 0x3a000000``."""
