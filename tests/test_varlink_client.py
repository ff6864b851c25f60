# SPDX-License-Identifier: LGPL-2.1-or-later
"""The synchronous client: against the real server, and against everything else."""

from __future__ import annotations

import _socket
import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from varlink_fakes import FakeRegions, daemon

from xshmd import errors
from xshmd.varlink import wire
from xshmd.varlink.client import Client, error_of
from xshmd.varlink.wire import Reply


@pytest.fixture
def api() -> FakeRegions:
    return FakeRegions()


@pytest.fixture
def path(tmp_path: Path, api: FakeRegions) -> Iterator[str]:
    with daemon(tmp_path / "socket", api):
        yield str(tmp_path / "socket")


@contextlib.contextmanager
def answering(path: Path, answers: list[bytes]) -> Iterator[str]:
    """Be a server that sends each of ``answers`` after one received piece, then hangs up."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def body() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            with connection:
                for answer in answers:
                    connection.recv(65536)
                    connection.sendall(answer)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield str(path)
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        listening.close()


def test_it_waits_in_line_where_many_connect(tmp_path: Path) -> None:
    """A full backlog is no reason to say that there is no daemon."""
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as others:
        listening.bind(str(tmp_path / "socket"))
        listening.listen(0)
        first = others.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(tmp_path / "socket"))

        def answer() -> None:
            listening.accept()[0].close()  # the first one's, which makes room
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"{}\0")

        late = threading.Timer(0.1, answer)
        late.start()
        with Client(str(tmp_path / "socket"), timeout_s=20) as client:
            assert client.call("Ping") == {}
        late.join()


def test_it_does_not_wait_in_line_for_ever(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as first:
        listening.bind(str(tmp_path / "socket"))
        listening.listen(0)
        first.connect(str(tmp_path / "socket"))
        client = Client(str(tmp_path / "socket"), timeout_s=0.05)
        with client, pytest.raises(errors.TimedOut):
            client.call("Ping")


def test_what_says_too_much_at_once_is_not_sent(path: str) -> None:
    with Client(path) as client, pytest.raises(errors.UsageError, match="too much at once"):
        client.call("Apply", changes=[{}] * wire.MAX_WEIGHT)


def test_many_calls_on_one_connection(path: str) -> None:
    with Client(path) as client:
        assert client.call("Ping") == {}
        assert client.call("ShowRegion", id="r0")["region"]["sizeBytes"] == 1 << 20
        info = client.call("org.varlink.service.GetInfo")
        assert info["interfaces"] == ["io.xshmd.Regions", "org.varlink.service"]


def test_none_is_left_out(path: str, api: FakeRegions) -> None:
    with Client(path) as client:
        client.call("WaitGuest", name="ctl", timeoutSeconds=None)
    assert api.waited == [("ctl", 60.0)]


def test_an_error_reply_is_raised_as_what_it_was(path: str, api: FakeRegions) -> None:
    api.wait_outcome = errors.Refused("no room", hint="make some", region="r0")
    with Client(path) as client:
        with pytest.raises(errors.Refused) as caught:
            client.call("WaitGuest", name="ctl")
        assert client.call("Ping") == {}
    assert (caught.value.message, caught.value.hint) == ("no room", "make some")
    assert caught.value.facts == {"region": "r0"}


def test_a_late_reply_is_not_taken_for_the_next_one(path: str, api: FakeRegions) -> None:
    api.wait_outcome = None
    with Client(path) as client:
        with pytest.raises(errors.TimedOut, match="WaitGuest"):
            client.call_within(0.05, "WaitGuest", name="ctl")
        assert client.call("ListGuests")["guests"]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(errors.DaemonUnreachable, match="No such file") as caught:
        Client(str(tmp_path / "none")).call("Ping")
    assert "systemctl status xshmd" in caught.value.hint


def test_a_socket_nobody_listens_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "stale"))
    with pytest.raises(errors.DaemonUnreachable, match="Connection refused") as caught:
        Client(str(tmp_path / "stale")).call("Ping")
    assert "systemctl status xshmd" in caught.value.hint


def test_a_path_too_long_for_any_socket() -> None:
    with pytest.raises(errors.DaemonUnreachable, match="too long"):
        Client("/" + "x" * 200).call("Ping")


def test_not_allowed_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(_socket.socket):
        def connect(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("xshmd.varlink.client.socket.socket", Refusing)
    with pytest.raises(errors.DaemonUnreachable) as caught:
        Client("/run/x").call("Ping")
    assert caught.value.hint == "run it as root"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed the connection"),
        (b'{"parameters":', "closed the connection"),
        (b"HTTP/1.1 400\r\n\0", "does not speak Varlink"),
        (b'{"error":"a.B","continues":true}\0', "does not speak Varlink"),
    ],
)
def test_what_is_no_daemon_of_ours(tmp_path: Path, answer: bytes, words: str) -> None:
    with (
        answering(tmp_path / "s", [answer]) as path,
        Client(path) as client,
        pytest.raises(errors.DaemonUnreachable, match=words),
    ):
        client.call("Ping")


def test_a_reply_may_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xshmd.varlink.client._RECEIVE_BYTES", 1)
    with answering(tmp_path / "s", [b'{"parameters":{"a":1}}\0']) as path, Client(path) as client:
        assert client.call("Ping") == {"a": 1}


def test_a_call_too_long_is_not_even_begun(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="too many"):
        Client(str(tmp_path / "none")).call(
            "DeclareGuest", file="a", text="x" * wire.MAX_LARGE_CALL_BYTES
        )


@pytest.mark.parametrize(
    ("reply", "cls", "words"),
    [
        (Reply({}, "org.varlink.service.PermissionDenied"), errors.DaemonUnreachable, "this user"),
        (
            Reply({"parameter": "id"}, "org.varlink.service.InvalidParameter"),
            errors.UsageError,
            "does not accept id",
        ),
        (Reply({}, "org.varlink.service.MethodNotFound"), errors.XshmError, "MethodNotFound"),
        (Reply({"a": 1}, "io.xshmd.Regions.FromTheFuture"), errors.XshmError, "FromTheFuture"),
        (Reply({}, "io.xshmd.Regions.Conflict"), errors.XshmError, "Conflict"),
        (Reply({"message": "m", "facts": 1}, "io.xshmd.Regions.Conflict"), errors.Conflict, "m"),
    ],
)
def test_replies_that_are_not_quite_ours(
    reply: Reply, cls: type[errors.XshmError], words: str
) -> None:
    error = error_of(reply, method="X")
    assert type(error) is cls
    assert words in error.message


def test_a_fact_cannot_stand_in_for_an_argument() -> None:
    facts = {"message": "other", "hint": "other", "self": "other", "list": [1], "good": 1}
    error = error_of(
        Reply({"message": "m", "facts": facts}, "io.xshmd.Regions.Conflict"), method=""
    )
    assert (error.message, error.hint, error.facts) == ("m", "", {"good": 1})


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import xshmd.varlink.client\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['xshmd']\n"


def test_a_stream_yields_every_reply_and_then_ends(tmp_path: Path) -> None:
    replies = b'{"parameters":{"a":1},"continues":true}\0{"parameters":{"a":2},"continues":true}\0'
    with answering(tmp_path / "s", [replies + b"{}\0"]) as path, Client(path) as client:
        assert list(client.stream("Monitor")) == [{"a": 1}, {"a": 2}, {}]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (b"", errors.DaemonUnreachable),
        (b"nonsense\0", errors.DaemonUnreachable),
        (b'{"error":"io.xshmd.Regions.Refused","parameters":{"message":"no"}}\0', errors.Refused),
    ],
)
def test_a_stream_that_breaks_is_an_error(
    tmp_path: Path, end: bytes, expected: type[errors.XshmError]
) -> None:
    first = b'{"parameters":{"a":1},"continues":true}\0'
    with answering(tmp_path / "s", [first + end]) as path, Client(path) as client:
        stream = client.stream("Monitor")
        assert next(stream) == {"a": 1}
        with pytest.raises(expected):
            next(stream)
