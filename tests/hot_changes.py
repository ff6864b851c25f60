# SPDX-License-Identifier: LGPL-2.1-or-later
"""Words in which the tests of changes to running guests are written."""

from __future__ import annotations

from fakes.toolstack import Made
from fakes.world import Daemon, World

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.model import RegionConfig, RegionRequest, RegionTerms


def add(region_id: str, frames: int = 3, **terms: object) -> AddRegion:
    return AddRegion(
        config=RegionConfig(
            region_id=region_id, nr_frames=frames, terms=RegionTerms(**terms)  # type: ignore[arg-type]
        )
    )  # fmt: skip


def attach(guest: str | int, request: RegionRequest) -> AttachRegion:
    return AttachRegion(guest=str(guest), request=request)


def detach(guest: str | int, region_id: str) -> DetachRegion:
    return DetachRegion(guest=str(guest), region_id=region_id)


def remove(region_id: str, *, force: bool = False) -> RemoveRegion:
    return RemoveRegion(region_id=region_id, force=force)


def frames(host: World, made: Made) -> set[int]:
    return set(host.xen.foreign_frames(made.domid))


def span(request: RegionRequest) -> set[int]:
    return set(range(request.first_gfn, request.end_gfn))


def picture(host: World) -> object:
    """All that a refused set of changes leaves as it was."""
    domains = {
        domid: (domain.pauses, dict(domain.p2m), len(domain.pages), domain.target)
        for domid, domain in host.xen.by_domid.items()
    }
    return domains, host.dump(), host.xen.free_pages


async def guest(host: World, name: str, *requests: RegionRequest) -> Made:
    """Make a guest, whose file then does not matter any more."""
    made = await host.tools.create(host.config(name, *requests))
    host.config(name)
    return made


async def fill(daemon: Daemon, region_id: str, data: bytes) -> None:
    await daemon.engine.write_region(region_id, 4096, data)
