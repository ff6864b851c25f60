# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happened to regions and guests: one record that audit, metrics and Monitor all tell from."""

from __future__ import annotations

import dataclasses
import enum

from xshmd.model import Lease, RegionRequest
from xshmd.units import DomId


class EventKind(enum.StrEnum):
    """What may happen to regions and guests; each has a MESSAGE_ID in the journal."""

    REGION_CREATED = "region-created"
    REGION_REMOVED = "region-removed"
    PEER_JOINED = "peer-joined"
    """A guest was given a region's memory."""
    PEER_LEFT = "peer-left"
    """A region's memory was withdrawn from a guest, or the guest ended."""
    GUEST_REFUSED = "guest-refused"
    GUEST_AWAITED = "guest-awaited"
    """Its domain ended by itself; its regions wait for the next."""
    HOLDER_CREATED = "holder-created"
    HOLDER_DESTROYED = "holder-destroyed"
    HOLDER_LOST = "holder-lost"
    """Somebody else destroyed it: its regions are lost."""
    HOLDER_SUSPECT = "holder-suspect"
    """It is not as it was left, by a member's doing mostly."""
    GROUP_PAUSED = "group-paused"
    """The guests of a sealed group stood still while regions were put on fresh pages."""
    RELOADED = "reloaded"
    """The configuration was read again; what changed comes as events of its own before."""
    LEASE_BEGAN = "lease-began"
    """A process of the control domain may map a region from now on."""
    LEASE_ENDED = "lease-ended"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, with who, what and why: the source of audit, metrics, Monitor."""

    kind: EventKind
    region: str = ""
    guest: str = ""
    domid: DomId | None = None
    holder_uuid: str = ""
    request: RegionRequest | None = None
    """For PEER_JOINED and PEER_LEFT: the guest's part in the region."""
    size_bytes: int = 0
    """How much memory was granted, withdrawn, made or freed."""
    reason: str = ""
    """Why, in a few words, e.g. ``guest created``, ``admin``, ``owner gone``, ``reload``."""
    lease: Lease | None = None
    """For LEASE_BEGAN and LEASE_ENDED."""
    rules: tuple[str, ...] = ()
    """For GUEST_REFUSED: the names of the rules that are broken."""
    pause_us: int = 0
    """For GROUP_PAUSED: for how long, in microseconds."""
