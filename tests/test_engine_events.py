# SPDX-License-Identifier: LGPL-2.1-or-later
"""What observers hear of guests, regions and members: in order, and of what is undone too."""

from __future__ import annotations

import errno

import pytest
from fakes.world import world
from hot_changes import add, attach, frames, guest, remove
from trio.testing import MockClock

from xshmd.errors import (
    HypercallFailed,
)
from xshmd.events import EventKind

# -- events and figures ---------------------------------------------------------------------------


async def test_events_of_a_guests_life(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        async with daemon.engine.monitor() as events:
            a = await guest(host, "a", host.request("r", 3))
            await daemon.engine.apply([add("n", 2), attach("a", host.borrow("n", 2, at=64))])
            await daemon.engine.apply([remove("n", force=True)])
            await host.tools.end(a)
            await host.check_clean()
            heard = []
            while events.statistics().current_buffer_used:
                heard.append(events.receive_nowait())
        assert [(one.kind, one.region, one.reason) for one in heard] == [
            (EventKind.HOLDER_CREATED, "", ""),
            (EventKind.REGION_CREATED, "r", "guest created"),
            (EventKind.PEER_JOINED, "r", "guest created"),
            (EventKind.REGION_CREATED, "n", "admin"),
            (EventKind.PEER_JOINED, "n", "admin"),
            (EventKind.PEER_LEFT, "n", "admin"),
            (EventKind.REGION_REMOVED, "n", "admin"),
            (EventKind.PEER_LEFT, "r", "guest ended"),
            (EventKind.HOLDER_DESTROYED, "", ""),
            (EventKind.REGION_REMOVED, "r", "its last member ended"),
        ]
        figures = daemon.engine.statistics()
        assert (figures["attaches"], figures["detaches"], figures["refusals"]) == (2, 2, 0)
        assert (figures["regions"], figures["guests"], figures["bytes_shared"]) == (0, 0, 0)
        assert figures["messages_sent"] > 10
        assert figures["uptime_seconds"] > 0


async def test_what_is_undone_is_said_too(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        b = await guest(host, "b", host.borrow("r", 3))
        host.xen.fail("map_foreign", errno.ENOMEM, nth=2)
        async with daemon.engine.monitor() as events:
            wanted = host.borrow("n", 2, at=64)
            with pytest.raises(HypercallFailed):
                await daemon.engine.apply([add("n", 2), attach("a", wanted), attach("b", wanted)])
            heard = []
            while events.statistics().current_buffer_used:
                heard.append(events.receive_nowait())
        kinds = [one.kind for one in heard if one.guest == "a"]
        assert kinds == [EventKind.PEER_JOINED, EventKind.PEER_LEFT]
        assert frames(host, a) == frames(host, b)
