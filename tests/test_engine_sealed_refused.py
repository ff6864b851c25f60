# SPDX-License-Identifier: LGPL-2.1-or-later
"""What would leave a sealed group open, or lose its memory, is refused before anything is done."""

from __future__ import annotations

import pytest
from fakes.toolstack import XlFailed
from fakes.world import Daemon
from sealed import a_host, make, own, read, write
from trio.testing import MockClock

from xshmd.changes import AddRegion, AttachRegion, DetachRegion
from xshmd.errors import Conflict, OutOfMemory
from xshmd.model import RegionConfig
from xshmd.units import Gfn


async def test_sealed_and_open_regions_are_not_mixed(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        a = await make(host, "a", own(host, "r"))
        with pytest.raises(XlFailed):
            await host.tools.create(
                host.config("b", host.borrow("r", 3), host.request("open", 2, at=16))
            )
        host.config("b")
        open_one = AddRegion(config=RegionConfig(region_id="o", nr_frames=2))
        attach = AttachRegion(guest="a", request=host.borrow("o", 2, at=32))
        with pytest.raises(Conflict, match="r, which is sealed, and o, which is not"):
            await daemon.engine.apply([open_one, attach])
        await host.tools.end(a)


async def test_without_a_keeper_nothing_is_sealed(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        host.keeper.runs = False
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("a", own(host, "r")))
        refused = await _failure(daemon, "a")
        assert "xshmd-keeper does not run" in refused
        host.config("a")
        host.keeper.runs = True


async def _failure(daemon: Daemon, name: str) -> str:
    with pytest.raises(Conflict) as caught:
        await daemon.engine.wait_guest(name, 1.0)
    return caught.value.one_line()


async def test_a_keeper_that_was_ended_takes_joining_with_it(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        r = own(host, "r")
        a = await make(host, "a", r)
        write(host, a, r, b"before")
        host.keeper.end()
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("b", host.borrow("r", 3)))
        assert "cannot be reached any more" in await _failure(daemon, "b")
        host.config("b")
        assert read(host, a, r) == b"before"
        await daemon.engine.apply([DetachRegion(guest="a", region_id="r")])
        assert host.xen.foreign_frames(a.domid) == {}
        await host.tools.end(a)
        host.xen.unwiped_frees = 0  # nobody could reach them to wipe them


async def test_too_little_memory_for_both(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        r = own(host, "r", 4)
        a, b = await make(host, "a", r), await make(host, "b")
        hog = host.xen.make_domain("00000000-0000-4000-8000-000000000009")
        host.xen.set_max_pages(hog.domid, 1 << 20)
        host.xen.populate(hog.domid, Gfn(0), host.xen.free_pages - 4098)
        with pytest.raises(OutOfMemory, match="for a moment twice"):
            await daemon.engine.apply([AttachRegion(guest="b", request=host.borrow("r"))])
        host.xen.destroy(hog.domid)
        await host.tools.end(a)
        await host.tools.end(b)
