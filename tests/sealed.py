# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sealed groups, for the tests of what they keep: fails a test at the moment a page could be taken.

What a member might do by itself is tried at every moment at which one runs: :func:`watch` fails the
test if then anything is in a sealed holder that could be mapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fakes.machine import Call
from fakes.toolstack import Made
from fakes.world import Daemon, World, world

from xshmd.engine.holders import ANCHOR_GFN
from xshmd.events import Event, EventKind
from xshmd.machine import Arch
from xshmd.model import Isolation, Lifetime, RegionRequest, RegionTerms
from xshmd.policy.identity import is_holder_uuid
from xshmd.units import DomId

SEALED = RegionTerms(isolation=Isolation.SEALED, lifetime=Lifetime.MEMBERS)
ARCHES = pytest.mark.parametrize("arch", list(Arch), ids=str)


def own(host: World, region_id: str, frames: int = 3, *, at: int = 0) -> RegionRequest:
    return dataclasses.replace(host.request(region_id, frames, at=at), terms=SEALED)


def exposed(host: World) -> list[int]:
    """Return the frames of holders that a member could map now, but for the anchor."""
    return [
        gfn
        for domain in host.xen.by_domid.values()
        if is_holder_uuid(domain.uuid) and not domain.dying
        for gfn in domain.p2m
        if gfn != ANCHOR_GFN
    ]


def members_that_run(host: World) -> list[DomId]:
    return [one.domid for one in host.xen.by_domid.values() if one.target and one.running]


def watch(host: World) -> None:
    """Fail at once if a guest with a target runs while pages are in a holder."""

    def look(call: Call) -> None:
        running = members_that_run(host)
        assert not (running and exposed(host)), (call.kind, running)

    host.xen.after = look


@asynccontextmanager
async def a_host(arch: Arch = Arch.X86_64, **options: Any) -> AsyncIterator[tuple[World, Daemon]]:
    async with world(arch) as host:
        watch(host)
        daemon = await host.start(**options)
        yield host, daemon
        await host.check_clean()
        await daemon.kill()


async def make(host: World, name: str, *requests: RegionRequest) -> Made:
    """Make a guest, whose file then does not matter any more."""
    made = await host.tools.create(host.config(name, *requests))
    await host.until(lambda: host.running(made), f"{name} running")
    assert host.missing(made.domid, made.config) == ""
    host.config(name)
    return made


def write(host: World, made: Made, request: RegionRequest, data: bytes) -> None:
    host.xen.guest_write(made.domid, request.first_gfn, 0, data)


def read(host: World, made: Made, request: RegionRequest, count: int = 6) -> bytes:
    return host.xen.guest_read(made.domid, request.first_gfn, 0, count)


def pauses_of(events: list[Event]) -> list[Event]:
    return [event for event in events if event.kind is EventKind.GROUP_PAUSED]
