# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients of dom0 trigger and watch places of a region; what they read about peers is declared."""

from __future__ import annotations

import trio
from test_varlink_service import CONTRACT, call
from varlink_fakes import FakeRegions

from xshmd.daemon import service
from xshmd.errors import Refused
from xshmd.varlink.wire import Call, Flag, Reply

PLACE = {"id": "r0", "offsetBytes": 64}


async def watch(api: FakeRegions, replies: trio.MemorySendChannel[Reply], flag: Flag) -> None:
    async def send(reply: Reply) -> None:
        if not reply.error:
            CONTRACT.check(CONTRACT.methods["Watch"].gives, reply.parameters)
        await replies.send(reply)

    asked = Call(f"{CONTRACT.name}.Watch", {**PLACE, "counterOffsetBytes": 8}, flag)
    await service.dispatcher(api).handle(asked, send)


async def test_a_watch_says_when_it_is_there_and_then_each_trigger(nursery: trio.Nursery) -> None:
    api = FakeRegions()
    send, replies = trio.open_memory_channel[Reply](8)
    nursery.start_soon(watch, api, send, Flag.MORE)
    first = await replies.receive()
    assert (first.parameters, first.continues) == ({"triggered": False}, True)
    assert [place for place, _ in api.watched] == [("r0", 64, 8)]
    for _ in range(2):
        assert (await call(api, "Trigger", **PLACE)).parameters == {"woken": 1}
        assert (await replies.receive()).parameters == {"triggered": True}
    nursery.cancel_scope.cancel()


async def test_a_watch_is_a_stream() -> None:
    send, replies = trio.open_memory_channel[Reply](8)
    await watch(FakeRegions(), send, Flag.NONE)
    assert (await replies.receive()).error == "org.varlink.service.ExpectedMore"


async def test_what_cannot_be_watched_is_an_error() -> None:
    api = FakeRegions()
    api.refusal = Refused("region r0 has no doorbells, so nobody can watch it")
    send, replies = trio.open_memory_channel[Reply](8)
    await watch(api, send, Flag.MORE)
    assert (await replies.receive()).error == "io.xshmd.Regions.Refused"
    assert (await call(api, "Trigger", **PLACE)).error == "io.xshmd.Regions.Refused"
