# SPDX-License-Identifier: LGPL-2.1-or-later
"""Log entries reach the journal with their fields, and a journal that is away holds nobody up."""

from __future__ import annotations

import io
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from xshmd.daemon import journal, logs
from xshmd.daemon.journal import Journal, encode, field_name, leads_to_journal


class Journald:
    """The other end, which reads entries as journald does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(5)

    def receive(self) -> list[tuple[str, str]]:
        data, fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        for fd in fds:
            with os.fdopen(fd, "rb") as file:
                file.seek(0)
                data = file.read()
        return decode(data)

    def is_empty(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(5)
        return False

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()


def decode(data: bytes) -> list[tuple[str, str]]:
    """Read an entry by the letter of the protocol's page."""
    fields = []
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        fields.append((name.decode(), value.decode()))
        data = rest
    return fields


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    other = Journald(tmp_path / "socket")
    yield other
    if other.path.exists():
        other.close()


@pytest.fixture
def to_journal(journald: Journald) -> Iterator[Journal]:
    sender = Journal(journald.path, max_waiting=3)
    yield sender
    sender.close()


@pytest.fixture
def configured(to_journal: Journal) -> Iterator[Journal]:
    logs.set_up("info", journal=to_journal)
    yield to_journal
    structlog.reset_defaults()


@given(st.lists(st.tuples(st.sampled_from(["MESSAGE", "XSHM_WHY"]), st.text())))
def test_every_value_survives(fields: list[tuple[str, str]]) -> None:
    safe = [(name, text.encode(errors="backslashreplace").decode()) for name, text in fields]
    assert decode(encode(fields)) == safe


@given(st.text())
def test_field_names_are_ones_the_journal_takes(word: str) -> None:
    name = field_name(word)
    assert name.startswith("XSHM_")
    assert len(name) <= 64
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


def test_short_and_long(journald: Journald, to_journal: Journal) -> None:
    for text in ("short", "a line\nand another", "x" * (1 << 20)):
        to_journal.send([("MESSAGE", text)])
        assert journald.receive() == [("MESSAGE", text)]


def test_a_log_line_is_an_entry(journald: Journald, configured: Journal) -> None:
    structlog.get_logger().warning(
        "memory granted", message_id="0" * 32, guest="ctl", domid=7, regions=["a", "b"], none=None
    )
    entry = journald.receive()
    assert dict(entry[:3]) == {
        "MESSAGE": "memory granted guest='ctl' domid=7 regions=['a', 'b'] none=None",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "xshmd",
    }
    assert entry[3:] == [
        ("MESSAGE_ID", "0" * 32), ("XSHM_GUEST", "ctl"), ("XSHM_DOMID", "7"),
        ("XSHM_REGIONS", "a"), ("XSHM_REGIONS", "b"),
    ]  # fmt: skip


def test_a_traceback_is_part_of_the_message(journald: Journald, configured: Journal) -> None:
    try:
        raise ValueError("odd")
    except ValueError:
        structlog.get_logger().exception("connection failed")
    message = dict(journald.receive())["MESSAGE"]
    assert message.startswith("connection failed\nTraceback ")
    assert message.endswith("ValueError: odd")


def test_what_a_client_is_goes_along(journald: Journald, configured: Journal) -> None:
    with structlog.contextvars.bound_contextvars(client_uid=0, client_pid=99):
        structlog.get_logger().info("client asked")
    entry = dict(journald.receive())
    assert (entry["XSHM_CLIENT_UID"], entry["XSHM_CLIENT_PID"]) == ("0", "99")


def test_entries_wait_for_a_journal_that_is_away(tmp_path: Path, journald: Journald) -> None:
    """They come in order once it is back; those that were too many are counted."""
    journald.close()
    sender = Journal(journald.path, max_waiting=3)
    for number in range(5):
        sender.send([("MESSAGE", str(number))])
    assert not sender.flush()
    back = Journald(journald.path)
    assert sender.flush()
    sender.send([("MESSAGE", "5")])
    assert [dict(back.receive())["MESSAGE"] for _ in range(3)] == ["0", "1", "2"]
    lost = dict(back.receive())
    assert (lost["XSHM_LOST"], lost["MESSAGE_ID"]) == ("2", journal.LOST_MESSAGE_ID)
    assert dict(back.receive())["MESSAGE"] == "5"
    assert back.is_empty()
    sender.close()
    back.close()


def test_a_journal_that_does_not_read_holds_nobody_up(journald: Journald) -> None:
    """Its queue is full: the rest waits here, and nothing is lost or out of order."""
    sender = Journal(journald.path, max_waiting=10_000)
    count = 2000
    for number in range(count):
        sender.send([("MESSAGE", str(number))])
    assert not sender.flush()
    seen: list[int] = []
    while len(seen) < count:
        seen.append(int(dict(journald.receive())["MESSAGE"]))
        sender.flush()
    assert seen == list(range(count))
    sender.close()


def test_only_the_stream_that_leads_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("w") as file, (tmp_path / "other").open("w") as other:
        about = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{about.st_dev}:{about.st_ino}")
        assert leads_to_journal(file.fileno())
        assert not leads_to_journal(other.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", "nonsense")
        assert not leads_to_journal(file.fileno())


def test_elsewhere_it_is_a_line_of_text() -> None:
    stream = io.StringIO()
    assert logs.set_up("info", stream) is None
    structlog.get_logger().info("memory granted", message_id="0" * 32, guest="ctl", domid=7)
    structlog.reset_defaults()
    assert stream.getvalue() == "<6>memory granted guest='ctl' domid=7\n"
