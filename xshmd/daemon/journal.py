# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sends log entries to systemd's journal with every fact as a field of its own.

In the journal's own protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/): a datagram an entry, or
a sealed memfd where one is too long for a datagram.
"""

from __future__ import annotations

import array
import collections
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

SOCKET: Final = Path("/run/systemd/journal/socket")
MAX_WAITING: Final = 2048
"""How many entries wait for a journal that does not take them."""
LOST_MESSAGE_ID: Final = "423edea893b543f6a75216a2c9ecc09d"
_NOT_IN_NAMES: Final = re.compile(r"[^A-Z0-9_]")
_MAX_NAME_LENGTH: Final = 64
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

Field = tuple[str, str]


def leads_to_journal(fd: int) -> bool:
    """Return whether what is written to ``fd`` goes to the journal (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        about = os.fstat(fd)
    except OSError:
        return False
    return (device, inode) == (str(about.st_dev), str(about.st_ino))


def field_name(word: str) -> str:
    """Return the name under which the fact ``word`` is in the journal, e.g. ``XSHM_SIZE_BYTES``."""
    return ("XSHM_" + _NOT_IN_NAMES.sub("_", word.upper()))[:_MAX_NAME_LENGTH]


def encode(fields: Iterable[Field]) -> bytes:
    """Return an entry as it goes over the wire; names must be valid, values may be anything."""
    parts = []
    for name, text in fields:
        value = text.encode(errors="backslashreplace")
        if b"\n" in value:
            parts += [name.encode(), b"\n", struct.pack("<Q", len(value)), value, b"\n"]
        else:
            parts += [name.encode(), b"=", value, b"\n"]
    return b"".join(parts)


class Journal:
    """A journal that never makes its writer wait, and never fails.

    Entries that it does not take at once wait, in order, for the next :meth:`send` or
    :meth:`flush`.  When there are too many the newest are lost, and the journal is told how many.
    """

    def __init__(self, path: Path = SOCKET, *, max_waiting: int = MAX_WAITING) -> None:
        self._address = str(path)
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        self._waiting: collections.deque[bytes] = collections.deque()
        self._max_waiting = max_waiting
        self._lost = 0

    def send(self, fields: Iterable[Field]) -> None:
        """Write an entry, now or as soon as the journal takes it."""
        self.flush()
        entry = encode(fields)
        if self._waiting or self._lost or not self._deliver(entry):
            if len(self._waiting) < self._max_waiting:
                self._waiting.append(entry)
            else:
                self._lost += 1

    def flush(self) -> bool:
        """Write what waits, as far as the journal takes it; return whether nothing waits now."""
        while self._waiting and self._deliver(self._waiting[0]):
            self._waiting.popleft()
        if self._lost and not self._waiting:
            text = f"{self._lost} log entries were lost: the journal did not take them"
            lost = [("MESSAGE", text), ("MESSAGE_ID", LOST_MESSAGE_ID), ("PRIORITY", "4")]
            lost += [("SYSLOG_IDENTIFIER", "xshmd"), ("XSHM_LOST", str(self._lost))]
            if self._deliver(encode(lost)):
                self._lost = 0
        return not self._waiting and not self._lost

    def close(self) -> None:
        """Close the socket; what waits is lost."""
        self._socket.close()

    def _deliver(self, entry: bytes) -> bool:
        try:
            try:
                self._socket.sendto(entry, self._address)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    return False
                self._deliver_in_memory(entry)
        except OSError:
            return False
        return True

    def _deliver_in_memory(self, entry: bytes) -> None:
        fd = os.memfd_create("xshmd-journal-entry", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb") as memory:
            memory.write(entry)
            memory.flush()
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
            self._socket.sendmsg([], [rights], 0, self._address)
