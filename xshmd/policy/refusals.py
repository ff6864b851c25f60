# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a set of changes cannot be made: each reason with its words and its remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xshmd.errors import ConfigError, Conflict, NoSuchGuest, NoSuchRegion, Refused
from xshmd.model import Guest, GuestState, Lease, Region, RegionConfig, RegionRequest
from xshmd.units import DOMID_0, DomId


def _at(config: RegionConfig) -> str:
    return f"{config.place}: " if config.place.file else ""


def _names(guests: Iterable[Guest]) -> str:
    names = sorted({guest.name for guest in guests})
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def added_twice(config: RegionConfig) -> Conflict:
    """One set defines a region twice."""
    return Conflict(
        f"{_at(config)}region {config.region_id} is added twice",
        hint="leave one of them out",
        region=config.region_id,
    )


def freed_at_once(config: RegionConfig) -> ConfigError:
    """Its lifetime would be over when it begins."""
    return ConfigError(
        f"{_at(config)}region {config.region_id} has lifetime=members and no member: it would be "
        "freed at once",
        hint="say lifetime=system, or attach it to a guest in the same set of changes",
        region=config.region_id,
    )


def exists_already(config: RegionConfig, region: Region) -> Conflict:
    """A region of that id is there."""
    whose = f"guest {region.owner}'s" if region.owner else "the system's"
    return Conflict(
        f"{_at(config)}region {config.region_id} exists already and is {whose}",
        hint="choose another id, or remove that one first",
        region=config.region_id,
    )


def no_region(region_id: str) -> NoSuchRegion:
    """No region of that id is there."""
    return NoSuchRegion(
        f"there is no region {region_id}", hint="`xshmctl list` names those there are",
        region=region_id,
    )  # fmt: skip


def processes_of(leases: Iterable[Lease]) -> str:
    """Name the processes that hold some leases."""
    pids = sorted({(lease.process.pid, lease.process.name) for lease in leases})
    return ", ".join(f"process {pid}" + (f" ({name})" if name else "") for pid, name in pids)


def has_members(region_id: str, members: Sequence[Guest], leases: Sequence[Lease] = ()) -> Conflict:
    """Guests or processes have it, and nobody said that they shall lose it."""
    names = [_names(members)] if members else []
    names += [processes_of(leases)] if leases else []
    return Conflict(
        f"region {region_id} has members: {' and '.join(names)}",
        hint="detach it from them or end them first; or say --force to have it withdrawn from them",
        region=region_id,
    )


def keeps_it_mapped(region_id: str, leases: Sequence[Lease]) -> Conflict:
    """A process was asked to let go and did not; nobody can take it from its address space."""
    return Conflict(
        f"region {region_id} is still mapped by {processes_of(leases)} of the control domain",
        hint="end that process; it was told that the region is wanted back",
        region=region_id,
        pid=leases[0].process.pid,
    )


def not_now(guest: Guest) -> Conflict:
    """The guest comes or goes at this moment."""
    if guest.state is GuestState.REBOOTING:
        what = "is rebooting"
    elif guest.state is GuestState.DOOMED:
        what = "is being destroyed"
    else:
        what = "is being created"
    return Conflict(
        f"guest {guest.name} {what}",
        hint=f"try again in a moment; `xshmctl wait {guest.name}` waits for a guest's regions",
        guest=guest.name,
    )


def no_guest(said: str) -> NoSuchGuest:
    """Nobody is called so."""
    return NoSuchGuest(
        f"there is no guest {said}", hint="`xl list` names those that run", guest=said
    )


def no_guest_at_all(said: str, domid: DomId) -> Refused:
    """What is called so is a domain, but no guest."""
    what = "dom0" if domid == DOMID_0 else "a holder of xshmd's"
    return Refused(
        f"{said} is {what}, which no region can be given to", hint="name a guest", guest=said
    )


def has_not(guest: Guest, region_id: str) -> NoSuchRegion:
    """The guest has no such region."""
    had = ", ".join(sorted({one.region_id for one in guest.requests})) or "none"
    return NoSuchRegion(
        f"guest {guest.name} has no region {region_id}",
        hint=f"its regions are: {had}",
        guest=guest.name,
        region=region_id,
    )


def has_already(guest: Guest, request: RegionRequest) -> Conflict:
    """The guest has the region, and has it once."""
    return Conflict(
        f"guest {guest.name} has region {request.region_id} already, or would have it twice",
        hint="detach it first to have it elsewhere",
        guest=guest.name,
        region=request.region_id,
    )


def comes_and_goes(region_id: str) -> Conflict:
    """One set gives a region and removes it."""
    return Conflict(
        f"region {region_id} is to be attached and removed in one set of changes",
        hint="make them two sets",
        region=region_id,
    )
