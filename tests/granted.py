# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that map their regions themselves, for the tests of several parts of the engine."""

from __future__ import annotations

import dataclasses

from fakes.grants import GrantedMap
from fakes.toolstack import Made
from fakes.world import World

from xshmd.model import Lifetime, Prot, RegionRequest, RegionTerms, Transport

FRAMES = 5


def owned(there: World, region_id: str = "g", frames: int = FRAMES) -> RegionRequest:
    """An owner's entry of a region that its members map themselves."""
    there.xen.command_line = "xsm=dummy"
    terms = RegionTerms(transport=Transport.GRANT, lifetime=Lifetime.MEMBERS)
    return dataclasses.replace(there.request(region_id, frames), terms=terms)


def lent(there: World, region_id: str = "g", frames: int = FRAMES, **more: int) -> RegionRequest:
    return there.borrow(region_id, frames, at=4096, **more)


def readable(request: RegionRequest) -> RegionRequest:
    return dataclasses.replace(request, prot=Prot.RO)


def mapped(
    there: World, made: Made, region_id: str = "g", *, writable: bool = True
) -> list[GrantedMap]:
    """Map a region as its guest does: by what its node says."""
    return [
        there.xen.guest_map_grants(made.domid, holder, first, count, writable=writable)
        for holder, first, count in there.grants_told(made.domid, region_id)
    ]


def entries_of(there: World, made: Made) -> list[int]:
    """The references with which this domain may map something."""
    return [
        ref
        for holder in there.holders()
        for ref, entry in there.xen.by_domid[holder].grants.items()
        if entry.valid and entry.domid == made.domid
    ]
