# SPDX-License-Identifier: LGPL-2.1-or-later
"""One client gone wrong: it is held to its share, and nobody else has to wait for it.

Times are not asserted, they are the machine's; what is counted are turns.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing
from test_varlink_server import PING, Peer, Served, served
from varlink_fakes import limits

from xshmd.model import Snapshot
from xshmd.varlink import wire
from xshmd.varlink.admission import Limits

LIST = b'{"method":"io.xshmd.Regions.ListGuests"}\0'
MONITOR = b'{"method":"io.xshmd.Regions.Monitor","more":true}\0'
HEAVY = 10_000
"""So many values that a process has to pause after a call with them."""

# Another process that connects as often as it is told, and hands the connections over.
STRANGER = """
import socket, sys
hand = socket.socket(fileno=int(sys.argv[1]))
for _ in range(int(sys.argv[3])):
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(sys.argv[2])
    socket.send_fds(hand, [b"x"], [stream.fileno()])
sys.stdin.read()
"""


class Stranger:
    """Another process, which has connections of its own."""

    def __init__(self, server: Served, count: int) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, "-SE", "-c", STRANGER, str(theirs.fileno())]
            self._process = subprocess.Popen(
                [*command, str(server.path), str(count)],
                stdin=subprocess.PIPE, pass_fds=[theirs.fileno()],
            )  # fmt: skip
            self.peers = [self._received(ours) for _ in range(count)]

    @staticmethod
    def _received(hand: socket.socket) -> Peer:
        _, fds, _, _ = socket.recv_fds(hand, 1, 1)
        stream = trio.socket.from_stdlib_socket(socket.socket(fileno=fds[0]))
        return Peer(trio.SocketStream(stream))

    def close(self) -> None:
        for peer in self.peers:
            peer.stream.socket.close()
        self._process.communicate()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path / "socket", limits()) as running:
        yield running


async def connected(server: Served, everything: AsyncExitStack) -> Peer:
    """Return a connection that has its seat."""
    peer = await everything.enter_async_context(server.peer())
    await peer.send(PING)
    assert await peer.reply() == {}
    return peer


@pytest.mark.parametrize(
    "caps",
    [{"max_connections": 3}, {"max_connections_per_uid": 3}, {"max_connections_per_process": 3}],
    ids=lambda caps: next(iter(caps)),
)
async def test_a_newcomer_has_the_seat_that_was_silent_longest(
    tmp_path: Path, caps: dict[str, int]
) -> None:
    few = Limits(allowed_uids=frozenset({os.getuid()}), **caps)
    async with served(tmp_path / "socket", few) as server, AsyncExitStack() as all_of_them:
        first, second, third = [await connected(server, all_of_them) for _ in range(3)]
        await first.send(PING)
        assert await first.reply() == {}
        fourth = await connected(server, all_of_them)
        await second.assert_closed()
        for peer in (first, third, fourth):
            await peer.send(PING)
            assert await peer.reply() == {}


async def test_half_a_call_does_not_keep_a_seat(tmp_path: Path) -> None:
    few = Limits(allowed_uids=frozenset({os.getuid()}), max_connections=2)
    async with served(tmp_path / "socket", few) as server, AsyncExitStack() as all_of_them:
        slow = await connected(server, all_of_them)
        other = await connected(server, all_of_them)
        await slow.send(PING[:-1])
        await trio.testing.wait_all_tasks_blocked()
        await connected(server, all_of_them)
        await slow.assert_closed()
        await other.send(PING)
        assert await other.reply() == {}


async def test_who_is_being_answered_keeps_his_seat(tmp_path: Path) -> None:
    few = Limits(allowed_uids=frozenset({os.getuid()}), max_connections=2)
    async with served(tmp_path / "socket", few) as server, AsyncExitStack() as all_of_them:
        listeners = [await all_of_them.enter_async_context(server.peer()) for _ in range(2)]
        for peer in listeners:
            await peer.send(MONITOR)
            assert "state" in (await peer.reply())["parameters"]
        with structlog.testing.capture_logs() as logs:
            third = await all_of_them.enter_async_context(server.peer())
            await third.assert_closed()
        assert [entry["event"] for entry in logs] == ["connection refused, too many"]
        await listeners[0].stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        await connected(server, all_of_them)


async def test_a_process_takes_the_seats_of_its_own_first(tmp_path: Path) -> None:
    few = Limits(
        allowed_uids=frozenset({os.getuid()}), max_connections=6, max_connections_per_process=4
    )
    async with served(tmp_path / "socket", few) as server, AsyncExitStack() as all_of_them:
        ours = await connected(server, all_of_them)
        stranger = Stranger(server, 20)
        all_of_them.callback(stranger.close)
        await trio.testing.wait_all_tasks_blocked()
        for peer in stranger.peers[:16]:
            await peer.assert_closed()
        await ours.send(PING)
        assert await ours.reply() == {}


async def test_many_connections_of_a_process_have_one_turn_in_a_round(server: Served) -> None:
    """Sixteen that never stop asking must not make another wait sixteen times as long."""
    asked = 0

    now = server.api.now

    def snapshot() -> Snapshot:
        nonlocal asked
        asked += 1
        return now

    server.api.snapshot = snapshot  # type: ignore[method-assign]
    stranger = Stranger(server, 16)
    try:
        async with server.peer() as ours:
            await ours.send(PING)
            assert await ours.reply() == {}
            for peer in stranger.peers:
                await peer.send(LIST * 60)
            waited = []
            for _ in range(10):
                before = asked
                await ours.send(PING)
                assert await ours.reply() == {}
                waited.append(asked - before)
            assert asked > 0
            assert max(waited) <= 8, waited
    finally:
        stranger.close()


def heavy() -> bytes:
    """Return a call that is short, and costs much to read."""
    unknown = {"unknown": [0] * HEAVY}
    call = wire.encode_call(wire.Call("io.xshmd.Regions.Ping", unknown))
    assert len(call) < wire.MAX_CALL_BYTES
    return call


async def test_after_a_heavy_call_its_process_pauses_and_no_other(
    server: Served, autojump_clock: trio.testing.MockClock
) -> None:
    stranger = Stranger(server, 2)
    try:
        async with server.peer() as ours:
            before = trio.current_time()
            await stranger.peers[0].send(heavy())
            assert "InvalidParameter" in (await stranger.peers[0].reply())["error"]
            await ours.send(PING)
            assert await ours.reply() == {}
            assert trio.current_time() == before
            await stranger.peers[1].send(PING)
            assert await stranger.peers[1].reply() == {}
            assert trio.current_time() - before > 0.5
    finally:
        stranger.close()


async def test_leaving_does_not_end_the_pause(
    server: Served, autojump_clock: trio.testing.MockClock
) -> None:
    async with server.peer() as peer:
        before = trio.current_time()
        await peer.send(heavy())
        await peer.reply()
    await trio.testing.wait_all_tasks_blocked()
    async with server.peer() as again:
        await again.send(PING)
        assert await again.reply() == {}
        assert trio.current_time() - before > 0.5


async def test_a_process_has_one_large_call_at_a_time(server: Served) -> None:
    """However many connections fill up, the memory is that of one; small calls go on."""
    large = b'{"method":"io.xshmd.Regions.DeclareGuest","parameters":{"file":"a.cfg","text":"'
    large += b"#" * (wire.MAX_LARGE_CALL_BYTES - 200)
    stranger = Stranger(server, 4)
    try:
        async with server.peer() as ours, trio.open_nursery() as nursery:
            sent = []

            async def send(peer: Peer) -> None:
                with suppress(trio.BrokenResourceError):
                    await peer.send(large)
                    sent.append(peer)

            for peer in stranger.peers:
                nursery.start_soon(send, peer)
            await trio.testing.wait_all_tasks_blocked()
            assert len(sent) == 1
            await ours.send(large + b'"}}\0')
            assert "parameters" in await ours.reply()
            nursery.cancel_scope.cancel()
    finally:
        stranger.close()


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


async def test_descriptors_that_are_sent_along_are_closed(server: Served) -> None:
    reading, writing = os.pipe()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(server.path))
        before = descriptors()
        for _ in range(3):
            socket.send_fds(stream, [PING], [writing] * 10)
            await trio.testing.wait_all_tasks_blocked()
            assert stream.recv(64) == b"{}\0"
        # The first of them is the server's side of the connection, new since.
        assert len(descriptors() - before) <= 1
        os.close(writing)
        assert os.read(reading, 1) == b""
    os.close(reading)


async def test_what_clients_do_wrong_does_not_fill_the_journal(
    server: Served, autojump_clock: trio.testing.MockClock
) -> None:
    async def wrong() -> None:
        async with server.peer() as peer:
            await peer.send(b"nonsense\0")
            await peer.assert_closed()

    with structlog.testing.capture_logs() as logs:
        for _ in range(200):
            await wrong()
        assert len(logs) == 10
        await trio.sleep(60)
        await wrong()
    assert [entry["count"] for entry in logs if "count" in entry] == [190]


async def test_a_thousand_connections_leave_nothing_behind(server: Served) -> None:
    async with server.peer() as ours:
        await ours.send(PING)
        await ours.reply()
        before = len(descriptors())
        for _ in range(20):
            Stranger(server, 50).close()
            await trio.testing.wait_all_tasks_blocked()
        assert len(descriptors()) == before
        await ours.send(PING)
        assert await ours.reply() == {}
