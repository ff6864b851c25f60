# SPDX-License-Identifier: LGPL-2.1-or-later
"""What differs between what the configuration files say now and what exists, as changes.

Only what files of ours said is ever taken away: a region that an administrator attached by hand,
or that an xl configuration gave a guest, is not theirs to withdraw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final

from xshmd.changes import AttachRegion, Change, DetachRegion, RemoveRegion
from xshmd.declarations import Declarations
from xshmd.errors import Conflict
from xshmd.model import (
    UNPLACED,
    WHOLE_REGION,
    Guest,
    GuestConfig,
    GuestState,
    Lifetime,
    Region,
    RegionConfig,
    RegionRequest,
    Snapshot,
)
from xshmd.policy import kept_terms
from xshmd.policy.kept_terms import Difference
from xshmd.units import human_size

_NOBODY: Final[Mapping[str, int]] = {}


def differences(
    now: Declarations,
    before: Declarations,
    snapshot: Snapshot,
    strangers: Mapping[str, int] = _NOBODY,
) -> tuple[tuple[Change, ...], Mapping[str, Lifetime]]:
    """Return what makes running guests and the system's regions as the files say.

    Args:
        now: What the files say.
        before: What they said when they were last read; where nothing is known of that, empty.
        snapshot: What exists.
        strangers: The domids of running guests that have no record, by name: files may give them
            regions for the first time.

    Returns:
        The changes, and the regions that get another lifetime: one that is defined no more and
        has members still stays until they end.

    Raises:
        Conflict: a region that has members is to have another size, or other terms.
    """
    changes: list[Change] = []
    for guest in snapshot.guests:
        if guest.state is GuestState.ATTACHED:
            changes += _of_guest(guest, now, before)
    for config in now.guests:
        if config.name in strangers:
            said = str(strangers[config.name])
            changes += [AttachRegion(guest=said, request=one) for one in config.requests]
    defined = {config.region_id: config for config in now.regions}
    lifetimes: dict[str, Lifetime] = {}
    for region in snapshot.regions:
        if not region.from_file:
            continue
        definition = defined.get(region.region_id)
        members = _members_left(region, snapshot, changes)
        if definition is not None and _is_as_defined(region, definition):
            lifetime = definition.terms.lifetime or Lifetime.SYSTEM
        elif not members:
            changes.append(RemoveRegion(region_id=region.region_id))
            continue
        elif definition is not None:
            raise _not_as_defined(definition, region, members)
        else:
            lifetime = Lifetime.MEMBERS
        if lifetime is not region.lifetime:
            lifetimes[region.region_id] = lifetime
    return tuple(changes), lifetimes


def _of_guest(guest: Guest, now: Declarations, before: Declarations) -> Iterator[Change]:
    config = _config_of(guest, now)
    if config is None and _config_of(guest, before) is None:
        return
    wanted = config.requests if config else ()
    ours = {
        request.place.file
        for said in (now, before)
        for other in said.guests
        for request in other.requests
    }
    for request in guest.requests:
        if request.place.file in ours and not any(_is_same(request, one) for one in wanted):
            yield DetachRegion(guest=str(guest.domid), region_id=request.region_id)
    for request in wanted:
        if not any(_is_same(one, request) for one in guest.requests):
            yield AttachRegion(guest=str(guest.domid), request=request)


def _config_of(guest: Guest, said: Declarations) -> GuestConfig | None:
    for config in said.guests:
        if config.name == guest.name or (config.uuid and config.uuid == guest.uuid):
            return config
    return None


def _is_same(has: RegionRequest, said: RegionRequest) -> bool:
    return (
        has.region_id == said.region_id
        and has.offset_frames == said.offset_frames
        and said.first_gfn in (UNPLACED, has.first_gfn)
        and said.nr_frames in (WHOLE_REGION, has.nr_frames)
    )


def _members_left(region: Region, snapshot: Snapshot, changes: list[Change]) -> list[str]:
    taken = {(one.guest, one.region_id): True for one in changes if isinstance(one, DetachRegion)}
    given = [
        one.guest
        for one in changes
        if isinstance(one, AttachRegion) and one.request.region_id == region.region_id
    ]
    leased = [
        f"process {lease.process.pid}"
        for lease in snapshot.leases
        if lease.region_id == region.region_id
    ]
    return [
        *given,
        *leased,
        *(
            guest.name
            for guest in snapshot.guests
            if any(request.region_id == region.region_id for request in guest.requests)
            and (str(guest.domid), region.region_id) not in taken
        ),
    ]


def _other_terms(config: RegionConfig, region: Region) -> tuple[Difference, ...]:
    # Its lifetime is the one term that a region that exists can change.
    said = dataclasses.replace(config.terms, lifetime=region.lifetime)
    return kept_terms.differences(said, region, lifetime=region.lifetime)


def _is_as_defined(region: Region, config: RegionConfig) -> bool:
    return config.nr_frames == region.nr_frames and not _other_terms(config, region)


def _not_as_defined(config: RegionConfig, region: Region, members: list[str]) -> Conflict:
    at = f"{config.place}: " if config.place.file else ""
    kept = " and ".join(one.kept for one in _other_terms(config, region))
    exists, say = kept, kept
    if config.nr_frames != region.nr_frames:
        exists, say = human_size(region.size_bytes), f"size={region.size_bytes:#x}"
    return Conflict(
        f"{at}region {region.region_id} exists with {exists} and has "
        f"members: {', '.join(sorted(members))}",
        hint=f"say {say}, or end its members first",
        region=region.region_id,
    )
