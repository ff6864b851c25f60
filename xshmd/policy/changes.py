# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a set of changes to running guests comes to, decided from records alone, or why it cannot.

Pure, like :mod:`xshmd.policy.plan`: the engine carries the plan out as it is, and whoever wants to
know beforehand is shown its steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from xshmd.changes import AddRegion, AttachRegion, Change, DetachRegion, RemoveRegion, Step
from xshmd.errors import (
    XshmError,
    combined,
)
from xshmd.host_policy import NO_POLICY, HostPolicy
from xshmd.machine import DomainInfo, HostInfo
from xshmd.model import (
    Guest,
    GuestConfig,
    GuestState,
    GuestType,
    Lifetime,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Snapshot,
)
from xshmd.policy import quota_rules, refusals, rules
from xshmd.policy.definitions import terms_by_id
from xshmd.policy.entry_rules import overlapping
from xshmd.policy.grants import granted_ids, guest_without, lent_ids, without
from xshmd.policy.grouping import Homes, Link, assign_homes
from xshmd.policy.holdings import Holdings
from xshmd.policy.identity import is_holder_uuid
from xshmd.policy.placement import placed
from xshmd.policy.plan import NewRegion, new_region, systems_region, with_members
from xshmd.policy.quota_rules import Growth
from xshmd.policy.sealing import check_alike
from xshmd.policy.steps import steps_of
from xshmd.units import DOMID_0, bytes_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LiveDomain:
    """A domain that changes speak of, and what is known of it besides our records."""

    info: DomainInfo
    name: str
    guest_type: GuestType
    """As the toolstack wrote it down."""
    config: GuestConfig | None = None
    """Its configuration, if one was found."""
    is_built: bool = True
    """Whether the toolstack has made its memory: before, nothing can be mapped beside it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuestChange:
    """What happens to one guest."""

    guest: Guest
    """As it is; one that joins late has no holder and no generation yet."""
    home: str
    """Its holder's UUID, or the name of one to be made."""
    attach: tuple[RegionRequest, ...] = ()
    detach: tuple[RegionRequest, ...] = ()

    @property
    def is_late(self) -> bool:
        """Whether the guest is none of ours yet."""
        return not self.guest.generation


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChangePlan:
    """All that is to be done, in this order: creates, attaches, detaches, removals."""

    creates: tuple[tuple[NewRegion, str], ...] = ()
    """Regions to be made, each with its holder's UUID or the name of one to be made."""
    moves: tuple[tuple[str, str], ...] = ()
    """Regions that nobody has and that are wanted elsewhere, each with its new home."""
    guests: tuple[GuestChange, ...] = ()
    lifetimes: tuple[tuple[str, Lifetime], ...] = ()
    """Regions that get another lifetime."""
    removes: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()


def plan_changes(
    changes: Sequence[Change],
    *,
    host: HostInfo,
    snapshot: Snapshot,
    known: Sequence[GuestConfig] = (),
    defined: Sequence[RegionConfig] = (),
    domains: Sequence[LiveDomain] = (),
    lifetimes: Mapping[str, Lifetime] | None = None,
    policy: HostPolicy | XshmError = NO_POLICY,
) -> ChangePlan:
    """Return how these changes are made.

    Args:
        changes: What is asked for, in any order.
        host: The machine and its Xen.
        snapshot: What exists.
        known: What configurations on this host say of guests.
        defined: The regions that configurations define apart from any guest.
        domains: Every domain that the changes name, by name or number.
        lifetimes: Regions that are to get another lifetime.
        policy: What the administrator lets guests have, or why that is not known.

    Raises:
        NoSuchGuest, NoSuchRegion, ConfigError, Refused, Conflict, OutOfMemory: all that is wrong
            with it.
    """
    planner = _Planner(
        host=host, snapshot=snapshot, known=known, defined=defined, domains=domains, policy=policy
    )
    return planner.plan(changes, lifetimes or {})


@dataclasses.dataclass(slots=True, kw_only=True)
class _Member:
    """A guest while what happens to it is gathered."""

    guest: Guest
    domain: LiveDomain | None
    attach: list[RegionRequest] = dataclasses.field(default_factory=list)
    detach: list[RegionRequest] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> list[RegionRequest]:
        """What it has now and keeps."""
        return [request for request in self.guest.requests if request not in self.detach]


class _Planner:
    def __init__(
        self,
        *,
        host: HostInfo,
        snapshot: Snapshot,
        known: Sequence[GuestConfig],
        defined: Sequence[RegionConfig],
        domains: Sequence[LiveDomain],
        policy: HostPolicy | XshmError,
    ) -> None:
        self._policy = policy
        self._host, self._snapshot, self._defined = host, snapshot, tuple(defined)
        self._known, self._domains = tuple(known), tuple(domains)
        self._regions = {region.region_id: region for region in snapshot.regions}
        self._granted: frozenset[str] = frozenset()
        """The regions that guests map themselves."""
        self._lent: frozenset[str] = frozenset()
        """Those of them that are dom0's own memory."""
        self._terms: Mapping[str, RegionTerms] = {}
        self._members: dict[str, _Member] = {}
        self._broken: list[XshmError] = []

    def plan(self, changes: Sequence[Change], lifetimes: Mapping[str, Lifetime]) -> ChangePlan:
        added = self._added([one for one in changes if isinstance(one, AddRegion)])
        removed = [one for one in changes if isinstance(one, RemoveRegion)]
        for change in changes:
            if isinstance(change, DetachRegion):
                self._detach(change)
        for change in changes:
            if isinstance(change, AttachRegion):
                self._attach(change, {one.region_id for one in removed})
        for removal in removed:
            self._remove(removal, added)
        creates = self._check(added)
        homes = self._homes(creates)
        self._check_alike(creates, homes)
        made = {new.region_id for new in creates}
        plan = ChangePlan(
            creates=tuple((new, homes.regions.get(new.region_id, "")) for new in creates),
            moves=tuple(
                (region_id, home)
                for region_id, home in sorted(homes.regions.items())
                if region_id not in made
            ),
            guests=tuple(
                GuestChange(
                    guest=member.guest,
                    home=homes.guests.get(member.guest.name, member.guest.holder_uuid),
                    attach=tuple(member.attach),
                    detach=tuple(member.detach),
                )
                for member in self._members.values()
            ),
            lifetimes=tuple(lifetimes.items()),
            removes=tuple(dict.fromkeys(one.region_id for one in removed)),
        )
        self._check_quotas(plan)
        return dataclasses.replace(plan, steps=steps_of(plan, self._regions))

    def _check_quotas(self, plan: ChangePlan) -> None:
        before = Holdings.of(self._snapshot, self._terms)
        made = {new.region_id: new.nr_fresh_frames for new, _ in plan.creates}
        after = before.with_regions(made, plan.removes)
        for member, change in zip(self._members.values(), plan.guests, strict=True):
            requests = (*member.left, *member.attach)
            after = after.with_guest(member.guest.name, requests, change.home)
        over = quota_rules.broken(
            Growth(
                before=before, after=after, policy=self._policy, free_bytes=self._host.free_bytes
            )
        )
        if over:
            raise combined(over)

    # -- regions --------------------------------------------------------------------------------

    def _added(self, changes: Iterable[AddRegion]) -> dict[str, RegionConfig]:
        added: dict[str, RegionConfig] = {}
        for change in changes:
            config = change.config
            if config.region_id in added:
                self._broken.append(refusals.added_twice(config))
            elif (region := self._regions.get(config.region_id)) is not None:
                self._broken.append(refusals.exists_already(config, region))
            added[config.region_id] = config
        return added

    def _remove(self, change: RemoveRegion, added: Mapping[str, RegionConfig]) -> None:
        region_id = change.region_id
        if region_id not in self._regions:
            self._broken.append(refusals.no_region(region_id))
            return
        if region_id in added:
            return  # said already: it exists
        members = [
            guest
            for guest in self._snapshot.guests
            if any(request.region_id == region_id for request in self._left(guest))
        ]
        leases = [lease for lease in self._snapshot.leases if lease.region_id == region_id]
        if not members and not leases:
            return
        if not change.force:
            self._broken.append(refusals.has_members(region_id, members, leases))
            return
        for guest in members:
            if guest.state not in (GuestState.ATTACHED, GuestState.REBOOTING):
                self._broken.append(refusals.not_now(guest))
                continue
            member = self._member(guest)
            member.detach += [one for one in member.left if one.region_id == region_id]

    def _left(self, guest: Guest) -> Sequence[RegionRequest]:
        member = self._members.get(_key(guest))
        return member.left if member else guest.requests

    # -- guests ---------------------------------------------------------------------------------

    def _member(self, guest: Guest, domain: LiveDomain | None = None) -> _Member:
        if domain is None:
            domain = next((one for one in self._domains if one.info.domid == guest.domid), None)
        return self._members.setdefault(_key(guest), _Member(guest=guest, domain=domain))

    def _find(self, said: str) -> _Member | None:
        """Return the guest that is called so or has this number; note why if there is none."""
        ours = [guest for guest in self._snapshot.guests if _is_called(guest, said)]
        attached = [guest for guest in ours if guest.state is GuestState.ATTACHED]
        if attached:
            return self._member(attached[-1])
        if ours:
            self._broken.append(refusals.not_now(ours[-1]))
            return None
        for domain in self._domains:
            if said not in (domain.name, str(domain.info.domid)):
                continue
            if domain.info.domid == DOMID_0 or is_holder_uuid(domain.info.uuid):
                self._broken.append(refusals.no_guest_at_all(said, domain.info.domid))
                return None
            guest = Guest(
                domid=domain.info.domid, uuid=domain.info.uuid, name=domain.name, generation="",
                state=GuestState.ATTACHED,
            )  # fmt: skip
            if not domain.is_built:
                unmade = dataclasses.replace(guest, state=GuestState.HELD)
                self._broken.append(refusals.not_now(unmade))
                return None
            return self._member(guest, domain)
        self._broken.append(refusals.no_guest(said))
        return None

    def _detach(self, change: DetachRegion) -> None:
        member = self._find(change.guest)
        if member is None:
            return
        found = [one for one in member.left if one.region_id == change.region_id]
        if not found:
            self._broken.append(refusals.has_not(member.guest, change.region_id))
        member.detach += found

    def _attach(self, change: AttachRegion, removed: set[str]) -> None:
        member = self._find(change.guest)
        if member is None:
            return
        region_id = change.request.region_id
        if region_id in removed:
            self._broken.append(refusals.comes_and_goes(region_id))
        elif any(one.region_id == region_id for one in (*member.left, *member.attach)):
            self._broken.append(refusals.has_already(member.guest, change.request))
        member.attach.append(change.request)

    # -- all of it together ---------------------------------------------------------------------

    def _check(self, added: Mapping[str, RegionConfig]) -> tuple[NewRegion, ...]:
        """Note every broken rule; return the regions to be made."""
        members = list(self._members.values())
        self._place(added)
        own = [
            rules.Claim(guest=member.guest.name, request=request)
            for member in members
            for request in member.attach
        ]
        others = (*rules.claims(self._snapshot.guests, self._known), *own)
        files = tuple(one for one in self._defined if one.region_id not in added)
        defined = (*files, *added.values())
        attaching = [
            GuestConfig(name=member.guest.name, requests=tuple(member.attach)) for member in members
        ]
        configs = (*self._known, *attaching)
        self._terms = terms_by_id(self._snapshot.regions, defined, configs)
        self._granted = granted_ids(self._snapshot.regions, defined, configs)
        self._lent = lent_ids(self._snapshot.regions, defined, configs)
        arch = self._host.arch
        self._broken += rules.check_definitions(tuple(added.values()), others=others, arch=arch)
        for config in added.values():
            if config.terms.lifetime is Lifetime.MEMBERS and not _is_wanted(config, own):
                self._broken.append(refusals.freed_at_once(config))
        for member in members:
            self._check_member(member)
            self._broken += rules.check_requests(
                GuestConfig(name=member.guest.name, requests=tuple(member.attach)),
                existing=self._regions,
                others=others,
                regions=defined,
                arch=arch,
            )
        if self._broken:
            raise combined(self._broken)
        in_files = {config.region_id for config in self._defined}
        creates = {
            config.region_id: systems_region(config, from_file=config.region_id in in_files)
            for config in added.values()
        }
        for claim in own:
            region_id = claim.request.region_id
            if region_id not in self._regions and region_id not in creates:
                creates[region_id] = new_region(claim.request, claim.guest, others, files)
        return tuple(with_members(new, "", others) for new in creates.values())

    def _place(self, added: Mapping[str, RegionConfig]) -> None:
        """Choose the frames and sizes that requests leave to us."""
        members = [one for one in self._members.values() if one.attach and one.domain]
        said = rules.claims(self._snapshot.guests, self._known)
        owners = [claim.request for claim in said if claim.request.role is Role.OWNER]
        owners += [one for member in members for one in member.attach if one.role is Role.OWNER]
        sizes = {one.region_id: one.nr_frames for one in owners}
        sizes |= {one.region_id: one.nr_frames for one in (*self._defined, *added.values())}
        sizes |= {one.region_id: one.nr_frames for one in self._regions.values()}
        for member in members:
            assert member.domain is not None
            config = _layout_of(member.domain, (*member.left, *member.attach))
            try:
                config = placed(config, self._host.arch, sizes=sizes)
            except XshmError as no_room:
                self._broken.append(no_room)
            else:
                member.attach = list(config.requests[len(member.left) :])

    def _check_member(self, member: _Member) -> None:
        if not member.attach:
            return
        domain = member.domain
        if domain is None or domain.info.uuid != member.guest.uuid or domain.info.dying:
            self._broken.append(refusals.no_guest(member.guest.name))
            return
        after = (*member.left, *member.attach)
        config = _layout_of(domain, after)
        self._broken += rules.check_guest(
            config,
            self._host,
            gpaddr_bits=domain.info.gpaddr_bits,
            granted=self._granted,
            lent=self._lent,
        )
        if member.detach:
            # Everything is mapped before anything is taken away.
            self._broken += overlapping((*member.detach, *member.attach))

    def _check_alike(self, creates: Iterable[NewRegion], homes: Homes) -> None:
        terms = {region_id: region.terms for region_id, region in self._regions.items()}
        terms |= {new.region_id: new.terms for new in creates}
        at = {region_id: region.holder_uuid for region_id, region in self._regions.items()}
        at |= homes.regions
        for home in set(at.values()):
            check_alike((one, terms[one]) for one in sorted(at) if at[one] == home)

    def _homes(self, creates: Iterable[NewRegion]) -> Homes:
        links = [
            Link(
                guest=member.guest.name,
                holder_uuid=member.guest.holder_uuid,
                region_ids=frozenset(one.region_id for one in member.attach) - self._granted,
            )
            for member in self._members.values()
        ]
        regions = self._snapshot.regions
        return assign_homes(
            [new.region_id for new in creates if not new.is_granted],
            [link for link in links if link.region_ids],
            known=[without(self._granted, config) for config in self._known],
            regions=[region for region in regions if region.region_id not in self._granted],
            guests=[guest_without(self._granted, guest) for guest in self._snapshot.guests],
            leases=self._snapshot.leases,
        )


def _key(guest: Guest) -> str:
    return guest.generation or f"domain {guest.domid}"


def _is_called(guest: Guest, said: str) -> bool:
    lives = guest.state is not GuestState.REBOOTING
    return guest.name == said or (lives and str(guest.domid) == said)


def _layout_of(domain: LiveDomain, requests: Sequence[RegionRequest]) -> GuestConfig:
    """Return what decides where this guest may have regions: its file, and Xen's word for it."""
    info = domain.info
    config = domain.config or GuestConfig(
        name=domain.name,
        guest_type=domain.guest_type,
        # All that it may ever have: libxl_domain_setmaxmem and ballooning stay below it.
        memory_mib=-(-bytes_of(info.max_pages) // (1 << 20)),
    )
    return dataclasses.replace(
        config,
        guest_type=config.guest_type if info.hvm else GuestType.PV,
        hap=info.hap,
        requests=tuple(requests),
    )


def _is_wanted(config: RegionConfig, claims: Iterable[rules.Claim]) -> bool:
    return any(claim.request.region_id == config.region_id for claim in claims)
