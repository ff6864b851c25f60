# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must be done so that a guest has its regions, decided from records alone, or why not.

Pure: a configuration, the host and a snapshot in, a frozen plan out.  The engine carries plans out
and decides nothing; whoever wants to know beforehand (``xshmctl create -N``) asks for the same
plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xshmd.errors import combined
from xshmd.model import GuestConfig, HostInfo, Lifetime, RegionRequest, Role, Snapshot
from xshmd.policy import rules
from xshmd.policy.grouping import choose_holder


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NewRegion:
    """A region to be made."""

    region_id: str
    nr_frames: int
    owner: str
    lifetime: Lifetime = Lifetime.MEMBERS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuestPlan:
    """The steps for one guest, in the order they are taken."""

    config: GuestConfig
    holder_uuid: str | None
    """The holder to use; None: make one."""
    new_regions: tuple[NewRegion, ...]
    """Regions to make in it."""
    requests: tuple[RegionRequest, ...]
    """What to map, all of it or nothing."""


def plan_guest(
    config: GuestConfig,
    *,
    host: HostInfo,
    snapshot: Snapshot,
    known: Sequence[GuestConfig],
    gpaddr_bits: int = 0,
) -> GuestPlan:
    """Return how this guest gets its regions.

    Args:
        config: What it asks for.
        host: The machine and its Xen.
        snapshot: What exists.
        known: What other configurations on this host say.
        gpaddr_bits: The domain's width of addresses if it exists already, else 0.

    Raises:
        ConfigError, Refused, Conflict: the broken rules, all of them in one error.
    """
    others = tuple(other for other in known if other.name != config.name)
    by_id = {region.region_id: region for region in snapshot.regions}
    said_elsewhere = rules.claims(snapshot.guests, others)
    broken = list(rules.check_guest(config, host, gpaddr_bits=gpaddr_bits))
    for request in config.requests:
        broken += rules.check_region(
            rules.Claim(guest=config.name, request=request),
            region=by_id.get(request.region_id),
            others=said_elsewhere,
        )
    if broken:
        raise combined(broken)
    return GuestPlan(
        config=config,
        holder_uuid=choose_holder(
            config, known=others, regions=snapshot.regions, guests=snapshot.guests
        ),
        new_regions=tuple(
            _new_region(request, config.name, said_elsewhere)
            for request in {one.region_id: one for one in config.requests}.values()
            if request.region_id not in by_id
        ),
        requests=config.requests,
    )


def _new_region(
    request: RegionRequest, guest_name: str, said_elsewhere: Sequence[rules.Claim]
) -> NewRegion:
    if request.role is Role.OWNER:
        return NewRegion(region_id=request.region_id, nr_frames=request.nr_frames, owner=guest_name)
    # A borrower that comes before its owner: the owner's configuration says how large the region
    # is.  That there is exactly one is one of the rules.
    for claim in said_elsewhere:
        if claim.request.region_id == request.region_id and claim.request.role is Role.OWNER:
            return NewRegion(
                region_id=request.region_id, nr_frames=claim.request.nr_frames, owner=claim.guest
            )
    raise AssertionError(f"{request.place}: rules.check_region let a borrower without owner by")
