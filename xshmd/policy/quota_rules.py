# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host's administrator lets guests have: limits, and who may share with whom.

Only what grows is ever refused: who lowers a limit takes nothing away, and a guest that reboots
finds what it had.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from typing import Final

from xshmd.errors import XshmError
from xshmd.host_policy import Allowed, HostPolicy, Limit
from xshmd.model import NOWHERE, Lease, Place
from xshmd.policy.findings import Findings, conflict, out_of_memory, refused
from xshmd.policy.holdings import Holdings
from xshmd.units import PAGE_SHIFT, bytes_of, human_size

LISTS: Final = "`xshmctl list` shows what there is"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What there is, what there would be, and what the administrator says of it."""

    before: Holdings
    after: Holdings
    policy: HostPolicy | XshmError
    """That, or why it is not known."""
    free_bytes: int | None = None
    """Free memory of the host; None where no region is really to be made."""

    @property
    def new_regions(self) -> tuple[str, ...]:
        return tuple(one for one in self.after.regions if one not in self.before.regions)

    def new_of(self, guest: str) -> tuple[str, ...]:
        """The regions that a guest has after and not before."""
        had = self.before.guests.get(guest, {})
        return tuple(one for one in self.after.guests.get(guest, {}) if one not in had)

    @property
    def growing(self) -> Iterator[str]:
        """The guests that have more regions after than before."""
        return (name for name in self.after.guests if self.new_of(name))

    @property
    def new_parts(self) -> Iterator[tuple[str, str]]:
        """Each guest with each of the regions that it has after and not before."""
        return ((guest, one) for guest in self.after.guests for one in self.new_of(guest))


def broken(growth: Growth) -> tuple[XshmError, ...]:
    """Return every rule that what there would be breaks.

    Where it is not known what the administrator allows, nothing may grow.
    """
    return (*lent_to_one(growth), *_broken(growth))


def lent_to_one(growth: Growth) -> Findings:
    """dom0's kernel grants each page to one domain, once (drivers/xen/gntalloc.c of Linux)."""
    for guest in growth.growing:
        for region_id in growth.new_of(guest):
            others = [
                name
                for name, had in growth.after.guests.items()
                if name != guest and region_id in had
                # Else it is said already, the other way round.
                if not (name < guest and region_id in growth.new_of(name))
            ]
            if region_id in growth.after.lent and others:
                yield conflict(
                    "lent-to-one",
                    growth.after.place_of(region_id, guest),
                    f"guests '{guest}' and '{others[0]}' would both have region '{region_id}',"
                    " which is dom0's own memory: its kernel lends a page to one guest",
                    "leave backing=dom0 out, or give each guest a region of its own",
                    guest=guest,
                    region=region_id,
                )


def _broken(growth: Growth) -> tuple[XshmError, ...]:
    policy = growth.policy
    if isinstance(policy, XshmError):
        return (policy,) if growth.new_regions or any(growth.growing) else ()
    return tuple(error for rule in QUOTA_RULES for error in rule(growth, policy))


# --- limits ---------------------------------------------------------------------------------------


def too_many_regions(growth: Growth, policy: HostPolicy) -> Findings:
    """Each is a record in xenstore, and work at every look of the daemon's."""
    limit, count = policy.limits.regions, len(growth.after.regions)
    if limit and count > limit.value and count > len(growth.before.regions):
        yield _over(
            "too-many-regions", growth.after.place_of(growth.new_regions[0]), limit,
            f"there would be {count} regions, and at most {limit.value} are allowed",
        )  # fmt: skip


def too_much_memory(growth: Growth, policy: HostPolicy) -> Findings:
    """What regions have, guests and the control domain have not."""
    limit = policy.limits.memory
    before, after = (sum(one.regions.values()) for one in (growth.before, growth.after))
    if limit and after > limit.value and after > before:
        yield _over(
            "too-much-memory", growth.after.place_of(growth.new_regions[0]), limit,
            f"regions would have {_size(after)} of the host's memory, and at most"
            f" {_size(limit.value)} is allowed",
        )  # fmt: skip


def too_many_regions_of_guest(growth: Growth, policy: HostPolicy) -> Findings:
    """No guest's configuration shall take what is meant for all."""
    limit = policy.limits.regions_per_guest
    return _over_of_guest("too-many-regions-of-guest", growth, limit, len, what="{} regions")


def too_much_memory_of_guest(growth: Growth, policy: HostPolicy) -> Findings:
    """As :func:`too_many_regions_of_guest`: a borrower too has its page tables made by Xen."""
    limit = policy.limits.memory_per_guest
    return _over_of_guest(
        "too-much-memory-of-guest", growth, limit, sum, what="{} of regions", said=_size
    )


def too_many_members(growth: Growth, policy: HostPolicy) -> Findings:
    """Whoever is a member must be trusted by all the others."""
    limit = policy.limits.members
    for guest, region_id in growth.new_parts if limit else ():
        count = sum(region_id in had for had in growth.after.guests.values())
        if limit and count > limit.value:
            yield _over(
                "too-many-members", growth.after.place_of(region_id, guest), limit,
                f"region '{region_id}' would have {count} guests, and a region is allowed"
                f" {limit.value}",
                region=region_id,
            )  # fmt: skip


def free_memory_floor(growth: Growth, policy: HostPolicy) -> Findings:
    """What is left has to do for guests to be started and for Xen's own needs."""
    limit = policy.limits.free_memory
    nr_new = sum(growth.after.regions[one] for one in growth.new_regions)
    if limit is None or growth.free_bytes is None or not nr_new:
        return
    left = (growth.free_bytes >> PAGE_SHIFT) - nr_new
    if left < limit.value:
        yield out_of_memory(
            "free-memory-floor",
            growth.after.place_of(growth.new_regions[0]),
            f"{_size(nr_new)} for regions would leave {_size(max(left, 0))} of the host's memory"
            f" free, and {_size(limit.value)} stay free",
            f"end guests, give dom0 less memory (`xl mem-set 0 ...`), or lower {limit.place}",
        )


# --- who may share with whom ----------------------------------------------------------------------


def not_allowed(growth: Growth, policy: HostPolicy) -> Findings:
    """Where sets are said, what is in none of them is not meant to be."""
    allowed = policy.allowed
    for guest, region_id in growth.new_parts if allowed else ():
        if not any(_has(one, guest, region=region_id) for one in allowed):
            yield refused(
                "not-allowed",
                growth.after.place_of(region_id, guest),
                f"guest '{guest}' is not allowed to have region '{region_id}'",
                f"{_remedy(allowed)} that has both",
                guest=guest,
                region=region_id,
            )


def not_allowed_together(growth: Growth, policy: HostPolicy) -> Findings:
    """Members of a region read and write the same bytes."""
    allowed = policy.allowed
    for guest, region_id in growth.new_parts if allowed else ():
        for other, had in growth.after.guests.items():
            if other == guest or region_id not in had:
                continue
            if other < guest and region_id in growth.new_of(other):
                continue  # said already, the other way round
            if any(_has(one, guest, other, region=region_id) for one in allowed):
                continue
            yield refused(
                "not-allowed-together",
                growth.after.place_of(region_id, guest),
                f"guests '{guest}' and '{other}' are not allowed to share region '{region_id}'",
                f"{_remedy(allowed)} that has both guests and the region",
                guest=guest,
                region=region_id,
            )


def not_allowed_in_group(growth: Growth, policy: HostPolicy) -> Findings:
    """All guests of a share group can reach all of its regions (DESIGN, section 2).

    So two that must not share may not be linked through a third either.
    """
    allowed = policy.allowed
    if not allowed:
        return
    had = {frozenset(pair) for pair in _pairs(growth.before)}
    for one, other in _pairs(growth.after):
        share = growth.after.guests.get(one, {}).keys() & growth.after.guests.get(other, {}).keys()
        is_old = frozenset((one, other)) in had
        if share or is_old or any(_has(each, one, other) for each in allowed):
            continue
        guest = one if growth.new_of(one) else other
        yield refused(
            "not-allowed-in-group",
            _place(growth, guest),
            f"guests '{one}' and '{other}' are not allowed to share, and would be linked by the"
            " regions of others: the guests of a share group can reach all of its regions",
            f"take the link away, or {_remedy(allowed)} that has both guests",
            guest=guest,
        )


QUOTA_RULES: tuple[Callable[[Growth, HostPolicy], Findings], ...] = (
    too_many_regions,
    too_much_memory,
    too_many_regions_of_guest,
    too_much_memory_of_guest,
    too_many_members,
    free_memory_floor,
    not_allowed,
    not_allowed_together,
    not_allowed_in_group,
)


def check_lease(lease: Lease, policy: HostPolicy, *, nr_leases: int) -> None:
    """Raise Refused if the administrator does not let a process have this lease.

    Args:
        lease: The lease.
        policy: What the administrator says.
        nr_leases: How many there would be.
    """
    limit = policy.limits.leases
    if limit and nr_leases > limit.value:
        raise _over(
            "too-many-leases", NOWHERE, limit,
            f"processes would have {nr_leases} leases, and at most {limit.value} are allowed",
        )  # fmt: skip
    if policy.allowed and not any(
        one.dom0 and _matches(lease.region_id, one.regions) for one in policy.allowed
    ):
        raise refused(
            "lease-not-allowed",
            NOWHERE,
            f"no process of the control domain is allowed to have region '{lease.region_id}'",
            f"say dom0 = true in a set that has the region, as in {policy.allowed[0].place}",
            region=lease.region_id,
        )


def _over_of_guest(
    rule: str,
    growth: Growth,
    limit: Limit | None,
    count_of: Callable[[Collection[int]], int],
    *,
    what: str,
    said: Callable[[int], str] = str,
) -> Findings:
    """Find the guests that grow beyond what each is allowed.

    Args:
        rule, growth, limit: The rule.
        count_of: What is limited, of the sizes of a guest's regions in frames.
        what: What that is, with a place for how many.
        said: How a number of them is said.
    """
    for guest in growth.growing if limit else ():
        count = count_of(growth.after.guests[guest].values())
        if limit and count > limit.value:
            yield _over(
                rule, _place(growth, guest), limit,
                f"guest '{guest}' would have {what.format(said(count))}, and a guest is allowed"
                f" {said(limit.value)}",
                guest=guest,
            )  # fmt: skip


def _over(rule: str, place: Place, limit: Limit, what: str, **facts: str) -> XshmError:
    return refused(rule, place, what, f"{LISTS}; or raise {limit.place}", **facts)


def _place(growth: Growth, guest: str) -> Place:
    new = growth.new_of(guest)
    return growth.after.place_of(new[-1], guest) if new else NOWHERE


def _pairs(holdings: Holdings) -> Iterator[tuple[str, str]]:
    for group in holdings.groups():
        yield from itertools.combinations(sorted(group), 2)


def _has(allowed: Allowed, *guests: str, region: str = "") -> bool:
    return all(_matches(guest, allowed.guests) for guest in guests) and (
        not region or _matches(region, allowed.regions)
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _remedy(allowed: tuple[Allowed, ...]) -> str:
    return f"add a set beside [allow.{allowed[0].name}] in {allowed[0].place.file}"


def _size(nr_frames: int) -> str:
    return human_size(bytes_of(nr_frames))
