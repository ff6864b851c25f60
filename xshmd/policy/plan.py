# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must be done so that a guest has its regions, decided from records alone, or why not.

Pure: a configuration, the host and a snapshot in, a frozen plan out.  The engine carries plans out
and decides nothing; whoever wants to know beforehand (``xshmctl create -N``) asks for the same
plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from xshmd.errors import XshmError, combined
from xshmd.host_policy import NO_POLICY, HostPolicy
from xshmd.machine import HostInfo
from xshmd.model import (
    USUAL_TERMS,
    Backing,
    GuestConfig,
    Lifetime,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Snapshot,
    Transport,
)
from xshmd.policy import quota_rules, rules
from xshmd.policy.definitions import terms_by_id, terms_of
from xshmd.policy.grants import granted_ids, guest_without, lent_ids, room_bytes, without
from xshmd.policy.grouping import choose_holder, movable_regions
from xshmd.policy.holdings import Holdings
from xshmd.policy.placement import placed
from xshmd.policy.quota_rules import Growth
from xshmd.policy.sealing import check_alike
from xshmd.units import PAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NewRegion:
    """A region to be made."""

    region_id: str
    nr_frames: int
    owner: str = ""
    """Name of the guest that owns it; empty: it is the system's."""
    lifetime: Lifetime = Lifetime.OWNER
    terms: RegionTerms = USUAL_TERMS
    from_file: bool = False
    """Whether a configuration file defines it apart from any guest."""
    nr_members: int = 0
    """How many guests are known that want it."""

    @property
    def nr_fresh_frames(self) -> int:
        """How many frames have to be had from Xen for it."""
        return self.nr_frames if self.terms.backing is Backing.HOLDER else 0

    @property
    def is_granted(self) -> bool:
        """Whether its members map it themselves."""
        return self.terms.transport is Transport.GRANT

    @property
    def nr_needed_frames(self) -> int:
        """How many frames it takes of the host, with what Xen needs to serve its grants."""
        if not self.is_granted or self.terms.is_lent:
            return self.nr_fresh_frames
        return self.nr_frames + -(-room_bytes(self.nr_frames, self.nr_members) // PAGE_SIZE)


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
    movable: tuple[str, ...] = ()
    """Regions that nobody else has: they move to the holder if they are in another."""
    needs_holder: bool = True
    """Whether anything of it lives in its holder; what it maps itself lives elsewhere."""


def plan_guest(
    config: GuestConfig,
    *,
    host: HostInfo,
    snapshot: Snapshot,
    known: Sequence[GuestConfig],
    defined: Sequence[RegionConfig] = (),
    gpaddr_bits: int = 0,
    policy: HostPolicy | XshmError = NO_POLICY,
) -> GuestPlan:
    """Return how this guest gets its regions.

    Args:
        config: What it asks for.
        host: The machine and its Xen.
        snapshot: What exists.
        known: What other configurations on this host say.
        defined: The regions that configurations define apart from any guest.
        gpaddr_bits: The domain's width of addresses if it exists already, else 0.
        policy: What the administrator lets guests have, or why that is not known.

    Raises:
        ConfigError, Refused, Conflict, OutOfMemory: the broken rules, all of them in one error.
    """
    others = tuple(other for other in known if other.name != config.name)
    by_id = {region.region_id: region for region in snapshot.regions}
    # What no file defines any more may still exist, and is then as large as it is.
    sizes = {region.region_id: region.nr_frames for region in snapshot.regions}
    config = placed(config, host.arch, sizes=sizes)
    said_elsewhere = rules.claims(snapshot.guests, others)
    granted = granted_ids(snapshot.regions, defined, (*others, config))
    lent = lent_ids(snapshot.regions, defined, (*others, config))
    broken = list(
        rules.check_guest(config, host, gpaddr_bits=gpaddr_bits, granted=granted, lent=lent)
    )
    broken += rules.check_requests(
        config, existing=by_id, others=said_elsewhere, regions=defined, arch=host.arch
    )
    if broken:
        raise combined(broken)
    # What guests map themselves links no guests: each has what it was granted and no more.
    mapped = without(granted, config)
    wanted = {request.region_id for request in mapped.requests}
    guests = [guest_without(granted, guest) for guest in snapshot.guests]
    others_alive = [guest for guest in guests if guest.name != config.name]
    free = movable_regions(snapshot.regions, others_alive, snapshot.leases)
    movable = {region_id: home for region_id, home in free.items() if region_id in wanted}
    holder_uuid = choose_holder(
        mapped,
        known=[without(granted, other) for other in others],
        regions=[
            region
            for region in snapshot.regions
            if region.region_id not in movable and region.region_id not in granted
        ],
        guests=guests,
    )
    holder_uuid = holder_uuid or next(iter(movable.values()), None)
    new_regions = tuple(
        with_members(
            new_region(request, config.name, said_elsewhere, defined), config.name, said_elsewhere
        )
        for request in {one.region_id: one for one in config.requests}.values()
        if request.region_id not in by_id
    )
    there = [r for r in snapshot.regions if r.holder_uuid == holder_uuid or r.region_id in movable]
    check_alike(
        [*((r.region_id, r.terms) for r in there), *((r.region_id, r.terms) for r in new_regions)]
    )
    plan = GuestPlan(
        config=config,
        holder_uuid=holder_uuid,
        new_regions=new_regions,
        requests=config.requests,
        movable=tuple(movable),
        needs_holder=bool(mapped.requests),
    )
    before = Holdings.of(snapshot, terms_by_id(snapshot.regions, defined, (*others, config)))
    made = {new.region_id: new.nr_fresh_frames for new in plan.new_regions}
    home = plan.holder_uuid if plan.needs_holder else None
    after = before.with_regions(made).with_guest(config.name, plan.requests, home or "")
    over = quota_rules.broken(
        Growth(before=before, after=after, policy=policy, free_bytes=host.free_bytes)
    )
    if over:
        raise combined(over)
    return plan


def with_members(new: NewRegion, guest_name: str, said: Iterable[rules.Claim]) -> NewRegion:
    """Return a region to be made with how many guests want it, if it has to have room for each.

    Args:
        new: The region.
        guest_name: A guest that wants it; empty where none need.
        said: What guests say.
    """
    if not new.is_granted:
        return new
    names = {claim.guest for claim in said if claim.request.region_id == new.region_id}
    return dataclasses.replace(new, nr_members=len((names | {guest_name}) - {""}))


def new_region(
    request: RegionRequest,
    guest_name: str,
    said_elsewhere: Sequence[rules.Claim],
    defined: Sequence[RegionConfig],
) -> NewRegion:
    """Return the region that this entry, against which no rule speaks, needs to be made."""
    if request.role is Role.OWNER:
        return _owned(request, guest_name)
    for config in defined:
        if config.region_id == request.region_id:
            return systems_region(config, from_file=True)
    # A borrower that comes before its owner: the owner's configuration says how large the region
    # is.  That there is exactly one is one of the rules.
    for claim in said_elsewhere:
        if claim.request.region_id == request.region_id and claim.request.role is Role.OWNER:
            return _owned(claim.request, claim.guest)
    raise AssertionError(f"{request.place}: rules.check_region let a borrower without owner by")


def _owned(request: RegionRequest, owner: str) -> NewRegion:
    terms = terms_of(request)
    return NewRegion(
        region_id=request.region_id, nr_frames=request.nr_frames, owner=owner,
        lifetime=terms.lifetime or Lifetime.OWNER, terms=terms,
    )  # fmt: skip


def systems_region(config: RegionConfig, *, from_file: bool) -> NewRegion:
    """Return the region that a definition apart from any guest makes."""
    return NewRegion(
        region_id=config.region_id, nr_frames=config.nr_frames,
        lifetime=config.terms.lifetime or Lifetime.SYSTEM, terms=config.terms,
        from_file=from_file,
    )  # fmt: skip
