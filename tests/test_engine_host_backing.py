# SPDX-License-Identifier: LGPL-2.1-or-later
"""A region of the machine's own memory from its first guest to its last, through the engine."""

from __future__ import annotations

import dataclasses

import pytest
from fakes.machine import PLAIN_BAR
from fakes.toolstack import XlFailed
from fakes.world import World, world
from trio.testing import MockClock

from xshmd.changes import AttachRegion, DetachRegion
from xshmd.errors import Refused
from xshmd.machine import Arch
from xshmd.model import Backing, GuestConfig, Lifetime, RegionConfig, RegionTerms, Role

FRAMES = 8


def define(there: World, first_mfn: int) -> None:
    terms = RegionTerms(backing=Backing.HOST, host_first_mfn=first_mfn, lifetime=Lifetime.MEMBERS)
    there.finder.defined = [RegionConfig(region_id="bar", nr_frames=FRAMES, terms=terms)]


def member(there: World, name: str) -> GuestConfig:
    return there.config(name, there.request("bar", FRAMES, role=Role.BORROWER))


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_it_takes_no_memory_and_none_is_cleared(
    arch: Arch, autojump_clock: MockClock
) -> None:
    async with world(arch) as there:
        daemon = await there.start()
        define(there, PLAIN_BAR.first_mfn + 4)
        config = member(there, "a")
        (request,) = config.requests
        made = await there.tools.create(config)
        wanted = {request.first_gfn + index: PLAIN_BAR.first_mfn + 4 + index for index in range(8)}
        assert there.xen.by_domid[made.domid].direct == wanted
        assert there.xen.by_domid[made.domid].target is None
        (holder,) = there.holders()
        assert len(there.xen.by_domid[holder].pages) == 1, "nothing but the anchor"
        assert daemon.engine.snapshot().regions[0].nr_frames == FRAMES
        await there.tools.end(made)
        await there.check_clean()
        assert not {"populate", "zero"} & {
            call.kind for call in there.xen.log if call.arguments[-1:] == (FRAMES,)
        }


async def test_the_holder_keeps_what_others_have_in_it(autojump_clock: MockClock) -> None:
    """Its record names frames of the holder, as any region's does, but it has none there."""
    async with world() as there:
        daemon = await there.start()
        define(there, PLAIN_BAR.first_mfn)
        fresh = there.request("r", FRAMES, at=FRAMES)
        bar = there.request("bar", FRAMES, role=Role.BORROWER)
        a = await there.tools.create(there.config("a", bar, fresh))
        lent = dataclasses.replace(fresh, role=Role.BORROWER)
        b = await there.tools.create(there.config("b", lent))
        there.xen.guest_write(b.domid, fresh.first_gfn, 0, b"stays")
        await there.tools.end(a)
        await there.until(lambda: len(daemon.engine.snapshot().regions) == 1)
        assert there.xen.guest_read(b.domid, fresh.first_gfn, 0, 5) == b"stays"
        (holder,) = there.holders()
        assert len(there.xen.by_domid[holder].pages) == 1 + FRAMES
        await there.tools.end(b)
        await there.check_clean()


async def test_more_than_the_host_has_free_is_no_reason(autojump_clock: MockClock) -> None:
    async with world() as there:
        huge = 1 << 22
        assert huge > there.xen.total_pages
        there.xen.host_memory = (dataclasses.replace(PLAIN_BAR, nr_frames=huge),)
        terms = RegionTerms(
            backing=Backing.HOST, host_first_mfn=PLAIN_BAR.first_mfn, lifetime=Lifetime.MEMBERS
        )
        there.finder.defined = [RegionConfig(region_id="bar", nr_frames=huge, terms=terms)]
        await there.start()
        made = await there.tools.create(member(there, "a"))
        assert len(there.xen.by_domid[made.domid].direct) == FRAMES
        await there.tools.end(made)
        await there.check_clean()


async def test_what_is_not_kept_apart_is_refused_before_anything_is_made(
    autojump_clock: MockClock,
) -> None:
    """All of the region must be, even where nobody asks for all of it."""
    async with world() as there:
        daemon = await there.start()
        define(there, PLAIN_BAR.end_mfn - FRAMES + 1)
        request = there.request("bar", FRAMES // 2, role=Role.BORROWER)
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("a", request))
        with pytest.raises(Refused, match="nothing there is known"):
            await daemon.engine.wait_guest("a", 1.0)
        assert "map_host_range" not in there.xen.counts
        assert daemon.engine.snapshot().regions == ()
        await there.check_clean()


async def test_it_is_attached_to_and_detached_from_a_guest_that_runs(
    autojump_clock: MockClock,
) -> None:
    async with world() as there:
        daemon = await there.start()
        define(there, PLAIN_BAR.first_mfn)
        a = await there.tools.create(member(there, "a"))
        b = await there.tools.create(there.config("b", file=False))
        domain = there.xen.by_domid[b.domid]
        request = there.request("bar", 4, role=Role.BORROWER, offset=2)
        await daemon.engine.apply([AttachRegion(guest="b", request=request)])
        assert list(domain.direct.values()) == [PLAIN_BAR.first_mfn + 2 + n for n in range(4)]
        node = there.server.read(f"/local/domain/{b.domid}/xshm/bar") or ""
        assert node.endswith("offset=0x2000 backing=host cache=none memory_map=unchanged peer=1")
        await daemon.engine.apply([DetachRegion(guest="b", region_id="bar")])
        assert (domain.direct, domain.iomem) == ({}, set())
        assert len(there.xen.by_domid[a.domid].direct) == FRAMES
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()
