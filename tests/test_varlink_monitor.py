# SPDX-License-Identifier: LGPL-2.1-or-later
"""Monitor: the state first, then every change, and a clean end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from test_varlink_server import GUARD_S, Peer
from test_varlink_service import CONTRACT
from varlink_fakes import FakeRegions, limits, request

from xshmd.daemon import service
from xshmd.events import Event, EventKind
from xshmd.units import DomId
from xshmd.varlink.server import open_listener, serve
from xshmd.varlink.wire import Call, Flag, Reply

JOINED = Event(
    kind=EventKind.PEER_JOINED,
    region="r0",
    guest="ctl",
    domid=DomId(5),
    holder_uuid="u",
    request=request(),
    size_bytes=1 << 20,
    reason="guest created",
)
RELOADED = Event(kind=EventKind.RELOADED)


class Listener:
    """Collects replies, each checked against the contract."""

    def __init__(self) -> None:
        self._send, self.replies = trio.open_memory_channel[Reply](16)

    async def send(self, reply: Reply) -> None:
        if not reply.error:
            CONTRACT.check(CONTRACT.methods["Monitor"].gives, reply.parameters)
        await self._send.send(reply)


async def monitor(api: FakeRegions, listener: Listener, **parameters: Any) -> None:
    flag = parameters.pop("flag", Flag.MORE)
    call = Call(f"{CONTRACT.name}.Monitor", parameters, flag)
    await service.dispatcher(api).handle(call, listener.send)


async def test_state_then_events(nursery: trio.Nursery) -> None:
    api, listener = FakeRegions(), Listener()
    nursery.start_soon(monitor, api, listener)
    first = await listener.replies.receive()
    assert first.continues
    assert [region["id"] for region in first.parameters["state"]["regions"]] == ["r0"]
    assert [guest["name"] for guest in first.parameters["state"]["guests"]] == ["ctl", "log"]
    assert first.parameters["resync"] is None
    await api.monitors[0].send(JOINED)
    await api.monitors[0].send(RELOADED)
    event = (await listener.replies.receive()).parameters["event"]
    assert event["kind"] == "peer_joined"
    assert (event["region"], event["guest"], event["domainId"]) == ("r0", "ctl", 5)
    assert event["entry"]["firstFrame"] == 0x38000
    assert (event["sizeBytes"], event["reason"]) == (1 << 20, "guest created")
    event = (await listener.replies.receive()).parameters["event"]
    assert event == dict.fromkeys(event) | {"kind": "reloaded"}


async def test_who_was_too_slow_gets_the_state_again(nursery: trio.Nursery) -> None:
    api, listener = FakeRegions(), Listener()
    api.to_come = [[JOINED], [RELOADED]]
    nursery.start_soon(monitor, api, listener)
    replies = [(await listener.replies.receive()).parameters for _ in range(4)]
    assert ["state" in reply for reply in replies] == [True, False, True, False]
    assert replies[2]["resync"] is True


@pytest.mark.usefixtures("autojump_clock")
async def test_it_ends_when_its_time_is_over() -> None:
    listener = Listener()
    await monitor(FakeRegions(), listener, timeoutSeconds=5)
    assert trio.current_time() >= 5
    assert (await listener.replies.receive()).continues
    assert await listener.replies.receive() == Reply({})


@pytest.mark.parametrize("timeout_s", [-1, 86401])
async def test_nobody_listens_for_longer_than_a_day(timeout_s: int) -> None:
    listener = Listener()
    await monitor(FakeRegions(), listener, timeoutSeconds=timeout_s)
    assert (await listener.replies.receive()).parameters == {"parameter": "timeoutSeconds"}


async def test_it_must_be_called_with_more() -> None:
    listener = Listener()
    await monitor(FakeRegions(), listener, flag=Flag.NONE)
    assert (await listener.replies.receive()).error == "org.varlink.service.ExpectedMore"


async def monitored(nursery: trio.Nursery, path: Path, api: FakeRegions) -> Peer:
    """Serve at a path, and connect somebody who begins to listen there."""
    listener = open_listener(path, environ={})
    dispatcher = service.dispatcher(api)
    await nursery.start(
        lambda task_status: serve(listener, dispatcher, limits=limits(), task_status=task_status)
    )
    peer = Peer(await trio.open_unix_socket(str(path)))
    await peer.send(b'{"method":"io.xshmd.Regions.Monitor","more":true}\0')
    assert "state" in (await peer.reply())["parameters"]
    return peer


async def test_it_says_good_bye_when_the_daemon_stops(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        peer = await monitored(nursery, tmp_path / "socket", FakeRegions())
        nursery.cancel_scope.cancel()
    async with peer.stream:
        assert await peer.reply() == {}
        await peer.assert_closed()


async def test_a_listener_that_leaves_ends_its_monitor(tmp_path: Path) -> None:
    api = FakeRegions()
    async with trio.open_nursery() as nursery:
        peer = await monitored(nursery, tmp_path / "socket", api)
        assert len(api.monitors) == 1
        await peer.stream.aclose()
        with trio.fail_after(GUARD_S):
            while api.monitors:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
