# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that configuration files say: only together can they be seen to be right."""

from __future__ import annotations

import dataclasses

from xshmd.host_policy import NO_POLICY, HostPolicy
from xshmd.model import NOWHERE, GuestConfig, Place, RegionConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EventChannel:
    """One end of a static event channel (dom0less ``xen,evtchn-v1``): read and reported only."""

    guest: str
    local_port: int
    peer_guest: str
    peer_port: int
    place: Place = NOWHERE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Declarations:
    """Everything that some configuration files say, in the order they say it."""

    regions: tuple[RegionConfig, ...] = ()
    guests: tuple[GuestConfig, ...] = ()
    event_channels: tuple[EventChannel, ...] = ()
    policy: HostPolicy = NO_POLICY
