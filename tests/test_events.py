# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every listener hears everything in order, or knows that it did not."""

from __future__ import annotations

import trio

from xshmd.engine.events import EventHub
from xshmd.events import Event, EventKind


def event(number: int) -> Event:
    return Event(kind=EventKind.PEER_JOINED, region=str(number))


async def test_everybody_hears_everything_from_when_he_came() -> None:
    hub = EventHub()
    hub.emit(event(0))
    async with hub.listen() as one:
        hub.emit(event(1))
        async with hub.listen() as two:
            hub.emit(event(2))
            assert (await two.receive()).region == "2"
        hub.emit(event(3))
        assert [(await one.receive()).region for _ in range(3)] == ["1", "2", "3"]
    hub.emit(event(4))
    assert hub.counts[EventKind.PEER_JOINED] == 5
    assert hub.dropped == 0


async def test_a_listener_that_is_too_slow_is_cut_off() -> None:
    hub = EventHub(backlog=2)
    async with hub.listen() as slow, hub.listen() as quick:
        for number in range(4):
            hub.emit(event(number))
            assert (await quick.receive()).region == str(number)
        heard = [one.region async for one in slow]
        assert heard == ["0", "1"]
    assert hub.dropped == 1


async def test_a_listener_that_went_away_holds_nobody_up() -> None:
    hub = EventHub(backlog=1)
    async with hub.listen() as gone, hub.listen() as other:
        await gone.aclose()
        hub.emit(event(0))
        assert (await other.receive()).region == "0"
        hub.emit(event(1))
        assert (await other.receive()).region == "1"
    assert hub.dropped == 0


async def test_a_listener_may_be_cancelled() -> None:
    hub = EventHub()
    with trio.move_on_after(0):
        async with hub.listen() as events:
            await events.receive()
    hub.emit(event(0))
    assert hub.dropped == 0
