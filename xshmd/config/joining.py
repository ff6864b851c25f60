# SPDX-License-Identifier: LGPL-2.1-or-later
"""What several files say of one guest, made one configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from xshmd.config.entry_forms import KEY
from xshmd.declarations import Declarations
from xshmd.errors import ConfigError, Conflict, XshmError, combined
from xshmd.host_policy import NO_POLICY
from xshmd.model import (
    NOWHERE,
    UNPLACED,
    WHOLE_REGION,
    GuestConfig,
    RegionConfig,
    RegionRequest,
    Role,
)


def joined(configs: Sequence[GuestConfig]) -> GuestConfig:
    """Return the first configuration with the requests of all.

    What the guest is (its type, its memory) the first one says.  What two say alike counts once.
    Its memory map is left alone if any one wants that.

    Raises:
        Conflict: two say different things of one region; all such pairs in one error.
    """
    first, *rest = configs
    requests = {request.region_id: request for request in first.requests}
    extra: list[RegionRequest] = []
    errors: list[XshmError] = []
    for config in rest:
        for request in config.requests:
            known = requests.setdefault(request.region_id, request)
            if known is request:
                extra.append(request)
            elif not is_same(known, request):
                errors.append(_conflict(first.name, known, request))
    if errors:
        raise combined(errors)
    uuid = next((config.uuid for config in configs if config.uuid), "")
    return dataclasses.replace(
        first,
        uuid=uuid,
        reserve=all(config.reserve for config in configs),
        extended_regions=all(config.extended_regions for config in configs),
        requests=(*first.requests, *extra),
    )


def agreed(configs: Sequence[GuestConfig], *, decide_in: str) -> GuestConfig:
    """Return the first of some configurations of one guest, of which each is a whole one.

    Args:
        configs: At least one.
        decide_in: The file that would count more than all of them, for the hint.

    Raises:
        ConfigError: they do not say the same of shared memory.
    """
    first = configs[0]
    for other in configs[1:]:
        if not is_same_guest(first, other):
            raise ConfigError(
                f"{first.place.file} and {other.place.file} are both for guest"
                f" '{first.name}' and say different {KEY}",
                hint=f"remove one, or decide in {decide_in}",
                rule="two-files",
                file=first.place.file,
                place=KEY,
                other_file=other.place.file,
            )
    return first


def is_same_guest(one: GuestConfig, other: GuestConfig) -> bool:
    """Return whether two configurations are of one guest and ask for the same."""
    return (
        one.name == other.name
        and len(one.requests) == len(other.requests)
        and all(map(is_same, one.requests, other.requests))
    )


def is_same(one: RegionRequest, other: RegionRequest) -> bool:
    """Return whether two entries say the same, wherever they stand."""
    return dataclasses.replace(one, place=NOWHERE) == dataclasses.replace(other, place=NOWHERE)


def sizes_of(
    configs: Iterable[GuestConfig], regions: Iterable[RegionConfig] = ()
) -> dict[str, int]:
    """Return how many frames each region has that is defined: by an owner, or for the system."""
    sizes = {
        request.region_id: request.nr_frames
        for config in configs
        for request in config.requests
        if request.role is Role.OWNER
    }
    return sizes | {region.region_id: region.nr_frames for region in regions}


def put_together(parts: Iterable[Declarations]) -> Declarations:
    """Return everything that several files say, in their order, guests not joined yet."""
    parts = tuple(parts)
    return Declarations(
        regions=tuple(region for part in parts for region in part.regions),
        guests=tuple(guest for part in parts for guest in part.guests),
        event_channels=tuple(channel for part in parts for channel in part.event_channels),
        policy=next((part.policy for part in parts if part.policy != NO_POLICY), NO_POLICY),
    )


def by_name(configs: Iterable[GuestConfig]) -> Iterator[list[GuestConfig]]:
    """Yield the configurations of each guest, in the order of the first of each."""
    found: dict[str, list[GuestConfig]] = {}
    for config in configs:
        found.setdefault(config.name, []).append(config)
    yield from found.values()


def is_open(config: GuestConfig) -> bool:
    """Return whether a frame or size is left for us to choose or to look up."""
    return any(
        request.first_gfn == UNPLACED or request.nr_frames == WHOLE_REGION
        for request in config.requests
    )


def _conflict(guest: str, one: RegionRequest, other: RegionRequest) -> Conflict:
    return Conflict(
        f"{other.place}: region '{one.region_id}' of guest '{guest}' is said in another way at"
        f" {one.place}",
        hint="leave one of the two out, or make them say the same",
        rule="said-differently",
        region=one.region_id,
        file=other.place.file,
        place=other.place.key,
        line=other.place.line,
    )
