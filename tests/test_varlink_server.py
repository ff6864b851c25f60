# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server on real UNIX sockets: limits, timeouts, peers, and nobody in another's way."""

from __future__ import annotations

import json
import math
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing
from varlink_fakes import OWNER, FakeRegions, limits

from xshmd.daemon import service
from xshmd.errors import Conflict, Refused
from xshmd.model import Guest
from xshmd.varlink import wire
from xshmd.varlink.admission import Limits
from xshmd.varlink.server import open_listener, serve

PING = b'{"method":"io.xshmd.Regions.Ping"}\0'
WAIT = b'{"method":"io.xshmd.Regions.WaitGuest","parameters":{"name":"ctl"}}\0'


GUARD_S = 30


def real_clock() -> bool:
    return not isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)


class Peer:
    """A client that sends bytes and takes them apart again."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._decoder = wire.Decoder(wire.MAX_REPLY_BYTES)

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def reply(self) -> Any:
        while (message := self._decoder.next_message()) is None:
            data = await self.stream.receive_some(4096)
            assert data, "the server closed the connection"
            self._decoder.feed(data)
        return json.loads(message)

    async def assert_closed(self) -> None:
        assert not self._decoder.pending
        # It is broken rather than ended if it was closed with bytes of ours unread.
        with suppress(trio.BrokenResourceError):
            assert await self.stream.receive_some(1) == b""


class Served:
    """A server under test and the way to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.api = FakeRegions()

    @asynccontextmanager
    async def peer(self) -> AsyncIterator[Peer]:
        async with await trio.open_unix_socket(str(self.path)) as stream:
            yield Peer(stream)


@asynccontextmanager
async def served(path: Path, limits: Limits) -> AsyncIterator[Served]:
    server = Served(path)
    async with trio.open_nursery() as nursery:

        async def start(
            task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
        ) -> None:
            dispatcher = service.dispatcher(server.api)
            listener = open_listener(path, environ={})
            await serve(listener, dispatcher, limits=limits, task_status=task_status)

        await nursery.start(start)
        with trio.fail_after(GUARD_S if real_clock() else math.inf):
            yield server
        nursery.cancel_scope.cancel()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path / "socket", limits()) as running:
        yield running


async def test_messages_may_be_split_anywhere(server: Served) -> None:
    async with server.peer() as peer:
        for byte in PING:
            await peer.send(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
        assert await peer.reply() == {}


async def test_many_messages_in_one_write_are_answered_in_order(server: Served) -> None:
    async with server.peer() as peer:
        asked = b'{"method":"io.xshmd.Regions.ShowRegion","parameters":{"id":"x%d"}}\0'
        await peer.send(b"".join(asked % at for at in range(50)))
        ids = [(await peer.reply())["parameters"]["facts"]["id"] for _ in range(50)]
        assert ids == [f"x{at}" for at in range(50)]


async def test_oneway_gets_no_reply_and_keeps_the_order(server: Served) -> None:
    async with server.peer() as peer:
        await peer.send(
            b'{"method":"io.xshmd.Regions.WithdrawGuest","parameters":{"name":"a"},"oneway":true}\0'
            b'{"method":"no.such.Thing","oneway":true}\0' + PING
        )
        assert await peer.reply() == {}
        assert server.api.withdrawn == ["a"]


@pytest.mark.parametrize(
    "message",
    [
        b"\0",
        b"nonsense\0",
        b'{"method":"io.xshmd.Regions.Ping","more":true,"oneway":true}\0',
        b'{"method":"io.xshmd.Regions.Ping","more":1}\0',
        b'{"method":"io.xshmd.Regions.Ping","unknown":1}\0',
        b'{"method":"io.xshmd.Regions.Ping \xff"}\0',
        b"[" * 100_000 + b"\0",
        b'{"method":"io.xshmd.Regions.Ping"' + b" " * wire.MAX_CALL_BYTES + b"}\0",
        b" " * (wire.MAX_LARGE_CALL_BYTES + 1),
    ],
    ids=lambda message: repr(message[:50]),
)
async def test_a_violation_closes_that_connection_only(server: Served, message: bytes) -> None:
    async with server.peer() as bystander, server.peer() as peer:
        await peer.send(PING)
        assert await peer.reply() == {}
        with structlog.testing.capture_logs() as logs:
            with suppress(trio.BrokenResourceError):
                await peer.send(message)
            await peer.assert_closed()
        assert [entry["log_level"] for entry in logs] == ["warning"]
        await bystander.send(PING)
        assert await bystander.reply() == {}


async def test_good_messages_before_a_bad_one_are_still_answered(server: Served) -> None:
    async with server.peer() as peer:
        await peer.send(PING + b"nonsense\0" + PING)
        assert await peer.reply() == {}
        await peer.assert_closed()


async def test_a_configuration_file_may_be_large(server: Served) -> None:
    text = 'name = "big"\n' + "# padding\n" * 20_000
    assert len(text) > wire.MAX_CALL_BYTES
    call = wire.Call("io.xshmd.Regions.DeclareGuest", {"file": "big.cfg", "text": text})
    async with server.peer() as peer:
        await peer.send(wire.encode_call(call))
        assert await peer.reply() == {"parameters": {"name": "big", "regions": []}}


async def test_a_file_that_no_guest_has_is_refused_with_a_reason(server: Served) -> None:
    text = "#" * (wire.MAX_CONFIG_BYTES + 1)
    call = wire.Call("io.xshmd.Regions.DeclareGuest", {"file": "big.cfg", "text": text})
    async with server.peer() as peer:
        await peer.send(wire.encode_call(call))
        said = await peer.reply()
        assert said["error"] == "io.xshmd.Regions.UnreadableConfiguration"
        assert said["parameters"]["message"].startswith("big.cfg: 256 KiB")


async def test_a_waiting_client_blocks_nobody(server: Served) -> None:
    server.api.wait_outcome = None
    async with server.peer() as waiting, server.peer() as half, server.peer() as peer:
        await waiting.send(WAIT)
        await half.send(PING[:5])
        await server.api.waiting.wait()
        await peer.send(PING)
        assert await peer.reply() == {}


async def test_a_client_that_does_not_read_blocks_nobody(server: Served) -> None:
    describe = (
        b'{"method":"org.varlink.service.GetInterfaceDescription",'
        b'"parameters":{"interface":"io.xshmd.Regions"}}\0'
    )
    async with server.peer() as deaf, server.peer() as peer:
        await deaf.send(describe * 200)
        await trio.testing.wait_all_tasks_blocked()
        await peer.send(PING)
        assert await peer.reply() == {}


async def test_a_client_that_does_not_read_is_dropped(
    server: Served, autojump_clock: trio.testing.MockClock
) -> None:
    describe = (
        b'{"method":"org.varlink.service.GetInterfaceDescription",'
        b'"parameters":{"interface":"io.xshmd.Regions"}}\0'
    )
    async with server.peer() as deaf:
        await deaf.send(describe * 200)
        await trio.sleep(Limits().send_timeout_s + 1)
        received = b""
        while data := await deaf.stream.receive_some(65536):
            received += data
        assert 0 < received.count(b"\0") < 100


@pytest.mark.parametrize(
    ("data", "after_s"), [(b"", Limits().idle_timeout_s), (PING[:5], Limits().request_timeout_s)]
)
async def test_silence_ends_a_connection(
    server: Served, autojump_clock: trio.testing.MockClock, data: bytes, after_s: float
) -> None:
    async with server.peer() as peer:
        await peer.send(PING)
        assert await peer.reply() == {}
        before = trio.current_time()
        await peer.send(data)
        with trio.fail_after(after_s + 1):
            await peer.assert_closed()
        assert trio.current_time() - before >= after_s - 1


async def test_a_trickle_does_not_keep_a_connection(
    server: Served, autojump_clock: trio.testing.MockClock
) -> None:
    async with server.peer() as peer:
        before = trio.current_time()
        with suppress(trio.BrokenResourceError):
            for _ in range(100):
                await peer.send(b" ")
                await trio.sleep(Limits().request_timeout_s / 4)
        assert trio.current_time() - before <= 2 * Limits().request_timeout_s


async def test_a_call_may_take_longer_than_any_timeout(
    server: Served, autojump_clock: trio.testing.MockClock
) -> None:
    server.api.wait_outcome = None
    async with server.peer() as peer:
        await peer.send(WAIT)
        await server.api.waiting.wait()
        with trio.move_on_after(Limits().idle_timeout_s * 2) as scope:
            await peer.reply()
        assert scope.cancelled_caught


async def test_a_wait_ends_when_its_client_goes_away(server: Served) -> None:
    server.api.wait_outcome = None
    async with server.peer() as peer:
        await peer.send(WAIT)
        await server.api.waiting.wait()
    await server.api.wait_cancelled.wait()


async def test_a_client_that_has_only_ended_its_side_gets_its_reply(server: Served) -> None:
    go_on = trio.Event()

    async def slow_wait(name: str, timeout_s: float) -> Guest:
        await go_on.wait()
        return OWNER

    server.api.wait_guest = slow_wait  # type: ignore[method-assign]
    async with server.peer() as peer:
        await peer.send(WAIT)
        await peer.stream.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        assert (await peer.reply())["parameters"]["guest"]["name"] == "ctl"
        await peer.assert_closed()


async def test_a_change_is_not_cut_short_by_its_client_going_away(server: Served) -> None:
    begun, go_on, done = trio.Event(), trio.Event(), trio.Event()

    async def slow_withdraw(name: str) -> None:
        begun.set()
        await go_on.wait()
        done.set()

    server.api.withdraw = slow_withdraw  # type: ignore[method-assign]
    async with server.peer() as peer:
        await peer.send(b'{"method":"io.xshmd.Regions.WithdrawGuest","parameters":{"name":"a"}}\0')
        await begun.wait()
    await trio.testing.wait_all_tasks_blocked()
    go_on.set()
    await done.wait()


async def test_a_bug_is_an_error_for_that_call_and_the_connection_goes_on(server: Served) -> None:
    server.api.wait_outcome = KeyError("bug")
    async with server.peer() as peer:
        with structlog.testing.capture_logs() as logs:
            await peer.send(WAIT + PING)
            assert (await peer.reply())["error"] == "io.xshmd.Regions.Failed"
        assert [entry["event"] for entry in logs] == ["method failed"]
        assert await peer.reply() == {}


async def test_others_get_permission_denied(tmp_path: Path) -> None:
    nobody = Limits(allowed_uids=frozenset({os.getuid() + 1}))
    async with served(tmp_path / "socket", nobody) as server, server.peer() as peer:
        await peer.send(PING)
        assert await peer.reply() == {"error": "org.varlink.service.PermissionDenied"}
        await peer.assert_closed()


async def test_the_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "run" / "socket"
    before = os.umask(0)
    try:
        listener = open_listener(path, environ={})
    finally:
        os.umask(before)
    async with listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    await open_listener(path, environ={}).aclose()
    assert path.is_socket()
    async with open_listener(path, environ={}):
        inode = path.stat().st_ino
        with pytest.raises(Conflict, match="another daemon"):
            open_listener(path, environ={})
        assert path.stat().st_ino == inode


async def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.write_text("precious")
    with pytest.raises(Conflict, match="no socket"):
        open_listener(path, environ={})
    assert path.read_text() == "precious"


async def test_a_directory_others_may_write_in_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(Refused, match="others may write"):
        open_listener(directory / "socket", environ={})
    assert list(directory.iterdir()) == []


ACTIVATED = """
import os, sys
from pathlib import Path
from xshmd.errors import XshmError
from xshmd.varlink.server import open_listener

os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[2]))
try:
    listener = open_listener(Path(sys.argv[1]))
except XshmError as exc:
    print(type(exc).__name__)
else:
    print(listener.socket.getsockname(), os.get_inheritable(listener.socket.fileno()))
    print(sorted(name for name in os.environ if name.startswith("LISTEN")))
"""


def activate(tmp_path: Path, sockets: list[socket.socket], pid_off_by: int = 0, **env: str) -> str:
    """Start a program with these sockets as its descriptors 3 and up, as systemd would."""
    copies = [os.dup(each.fileno()) for each in sockets]
    moves = "".join(f" {3 + at}<&{fd}" for at, fd in enumerate(copies))
    done = subprocess.run(
        [
            "/bin/bash",
            "-c",
            f'exec "$@"{moves}',
            "bash",
            sys.executable,
            "-c",
            ACTIVATED,
            str(tmp_path / "own"),
            str(pid_off_by),
        ],
        pass_fds=copies,
        env={**os.environ, "LISTEN_FDS": str(len(sockets)), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    for fd in copies:
        os.close(fd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def passed(tmp_path: Path) -> list[socket.socket]:
    found = []
    for name in ("a", "b"):
        each = socket.socket(socket.AF_UNIX)
        each.bind(str(tmp_path / name))
        each.listen()
        found.append(each)
    return found


def test_the_only_passed_socket_is_taken(tmp_path: Path, passed: list[socket.socket]) -> None:
    with passed[0], passed[1]:
        assert activate(tmp_path, passed[:1]) == f"{tmp_path / 'a'} False\n[]\n"


def test_of_several_the_one_called_varlink(tmp_path: Path, passed: list[socket.socket]) -> None:
    with passed[0], passed[1]:
        out = activate(tmp_path, passed, LISTEN_FDNAMES="other:varlink")
        assert out.startswith(str(tmp_path / "b"))
        assert activate(tmp_path, passed, LISTEN_FDNAMES="one:two") == "Refused\n"


def test_sockets_for_another_process_are_ignored(
    tmp_path: Path, passed: list[socket.socket]
) -> None:
    with passed[0], passed[1]:
        assert activate(tmp_path, passed, pid_off_by=1).startswith(str(tmp_path / "own"))
        out = activate(tmp_path, passed[:1], LISTEN_PIDFDID="1")
        assert out.startswith(str(tmp_path / "own"))


def test_a_passed_socket_must_be_listening(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert activate(tmp_path, [ours]) == "Refused\n"
