# SPDX-License-Identifier: LGPL-2.1-or-later
"""What members do to their holder is noticed, and told once."""

from __future__ import annotations

import trio
from fakes.world import world
from trio.testing import MockClock

from xshmd.changes import AddRegion, RemoveRegion
from xshmd.engine.holders import enlarge_paging_pool
from xshmd.events import Event, EventKind
from xshmd.model import RegionConfig
from xshmd.units import Gfn

ELSEWHERE = Gfn(0x90000)


def suspicions(events: trio.MemoryReceiveChannel[Event]) -> list[str]:
    found = []
    while events.statistics().current_buffer_used:
        event = events.receive_nowait()
        found += [event.reason] if event.kind is EventKind.HOLDER_SUSPECT else []
    return found


async def test_who_mapped_a_page_by_itself_keeps_it_and_that_is_told(
    autojump_clock: MockClock,
) -> None:
    """As a member of an open group can; the page is wiped, and nobody else gets it."""
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r"), host.request("s", at=64)))
        b = await host.tools.create(host.config("b", host.borrow("r")))
        await host.until(lambda: host.running(b))
        for name in ("a", "b"):
            host.config(name)  # from here on nothing that was written counts
        (holder,) = host.holders()
        region = next(one for one in daemon.engine.snapshot().regions if one.region_id == "r")
        enlarge_paging_pool(host.xen, b.domid, [2])
        host.xen.map_foreign(b.domid, ELSEWHERE, holder, region.holder_first_gfn, 2)
        host.xen.guest_write(b.domid, ELSEWHERE, 0, b"mine")
        async with daemon.engine.monitor() as events:
            await daemon.engine.apply([AddRegion(config=RegionConfig(region_id="t", nr_frames=1))])
            assert suspicions(events) == [], "all is as it should be"
            await daemon.engine.apply([RemoveRegion(region_id="r", force=True)])
            await daemon.engine.apply([RemoveRegion(region_id="t")])
            await trio.sleep(1)
            (told,) = suspicions(events)
        assert told.startswith("8 KiB of regions that were freed is still there: a guest has")
        assert host.xen.guest_read(b.domid, ELSEWHERE, 0, 4) == bytes(4)
        for made in (a, b):
            await host.tools.end(made)
        await host.check_clean()
