# SPDX-License-Identifier: LGPL-2.1-or-later
"""Declarations as settings for guests' xl configurations, and what those cannot say of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from xshmd.config import static_shm, xlcfg
from xshmd.config.guest import EXTENDED_REGIONS_KEY, MEMORY_MAP_KEY
from xshmd.config.xlcfg import shown
from xshmd.declarations import Declarations
from xshmd.model import Backing, GuestConfig, RegionConfig, RegionRequest

_ID: Final = re.compile(r"[_a-zA-Z0-9][_a-zA-Z0-9@-]*")


def render_xl(declarations: Declarations) -> tuple[str, tuple[str, ...]]:
    """Write a block for each guest's configuration, with a comment that names the guest.

    Args:
        declarations: What to write; it need not be placed.

    Returns:
        The text; and the losses, each a sentence that names what the text does not say and why.
    """
    losses = [_lost_region(region) for region in declarations.regions]
    losses += [
        f"event channel {channel.local_port} of '{shown(channel.guest)}' is left out: xl makes none"
        for channel in declarations.event_channels
    ]
    blocks = [_block(guest, losses) for guest in declarations.guests]
    return "\n".join(block for block in blocks if block), tuple(losses)


def _block(guest: GuestConfig, losses: list[str]) -> str:
    if not guest.name or not guest.name.isprintable():
        losses.append(f"guest {guest.name!a} is left out: xl has no such name")
        return ""
    entries = []
    for request in guest.requests:
        lost = _cannot_be_said(request)
        if lost:
            losses.append(f"region '{shown(request.region_id)}' of guest '{guest.name}': {lost}")
        if _ID.fullmatch(request.region_id):
            entries.append(static_shm.render_entry(request))
    settings: dict[str, xlcfg.Plain] = dict(_traits(guest))
    settings[static_shm.KEY] = entries
    return f"# for the configuration of guest '{guest.name}'\n" + xlcfg.render(settings)


def _traits(guest: GuestConfig) -> Iterator[tuple[str, str]]:
    yield "name", guest.name
    if guest.uuid:
        yield "uuid", guest.uuid
    yield "type", guest.guest_type
    for key, mebibytes in (("memory", guest.memory_mib), ("maxmem", guest.maxmem_mib)):
        if mebibytes:
            yield key, str(mebibytes)
    if not guest.hap:
        yield "hap", "0"
    if guest.altp2m:
        yield "altp2m", "mixed"
    if guest.nestedhvm:
        yield "nestedhvm", "1"
    if not guest.reserve:
        yield MEMORY_MAP_KEY, "leave"
    if not guest.extended_regions:
        yield EXTENDED_REGIONS_KEY, "unused"


def _cannot_be_said(request: RegionRequest) -> str:
    if not _ID.fullmatch(request.region_id):
        return "it is left out: to xl an id has only a-z A-Z 0-9 _ - @"
    if request.terms.backing is Backing.HOST:
        return "that it is memory of the host is left out: xl has no word for it"
    if request.terms.is_lent:
        return "that it is dom0's own memory is left out: xl has no word for it"
    return ""


def _lost_region(region: RegionConfig) -> str:
    return (
        f"region '{shown(region.region_id)}' belongs to the system: an xl configuration cannot"
        " define it, so keep its definition in a file in regions.d"
    )
