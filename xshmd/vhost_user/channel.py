# SPDX-License-Identifier: LGPL-2.1-or-later
"""vhost-user messages and their file descriptors through a UNIX socket; none of those is lost.

A descriptor exists from the moment the kernel hands it over, before anything is known of the
message it came with.  So whatever goes wrong, what was received is closed here.
"""

from __future__ import annotations

import array
import os
import socket
import time
from typing import Final

from xshmd.vhost_user.wire import MAX_TABLE_REGIONS, Inbox, Message, ProtocolViolation, encode

_ANCILLARY_BYTES: Final = socket.CMSG_SPACE((MAX_TABLE_REGIONS + 1) * 4)
"""Room for one more than a message may have, so that it is seen to have too many."""


class Disconnected(Exception):
    """The peer closed the connection, or did not take what was sent."""


class Channel:
    """One end of a connection.  Owns its socket.

    Synchronization: none.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._inbox = Inbox()

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait on."""
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether part of a message has been received."""
        return self._inbox.pending

    def close(self) -> None:
        """Close the socket, and what came of a message that is not whole."""
        for fd in self._inbox.abandon():
            os.close(fd)
        self._socket.close()

    def receive_some(self) -> Message | None:
        """Receive without waiting; return the message if one is whole now.

        Raises:
            Disconnected: Nothing more will come.
            ProtocolViolation: What came can be no message.
        """
        while True:
            try:
                data, fds = self._receive_bytes()
            except BlockingIOError:
                return None
            message = self._inbox.feed(data, fds)
            if message is not None:
                return message

    def receive(self, timeout_s: float) -> Message:
        """Receive one message.

        Raises:
            TimeoutError: It was not whole in time; the connection cannot be used any more.
            Disconnected: Nothing more will come.
            ProtocolViolation: What came can be no message.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))
                data, fds = self._receive_bytes()
                if (message := self._inbox.feed(data, fds)) is not None:
                    return message
        finally:
            self._socket.setblocking(False)

    def send(self, message: Message) -> None:
        """Send a message; its descriptors stay the caller's.

        Raises:
            Disconnected: The peer is gone, or so slow that its messages fill the socket.
        """
        data = encode(message)
        rights = array.array("i", message.fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if message.fds else []
        try:
            sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise Disconnected(f"the peer does not take {message.name}: {error}") from error
        if sent != len(data):
            raise Disconnected(f"the peer took {sent} of {len(data)} bytes of {message.name}")

    def _receive_bytes(self) -> tuple[bytes, list[int]]:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                self._inbox.wanted, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, TimeoutError):
            raise
        except OSError as error:
            raise Disconnected(f"the connection broke: {error}") from error
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
        if flags & socket.MSG_CTRUNC or not data:
            for fd in fds:
                os.close(fd)
            if data:
                raise ProtocolViolation("a message came with too many file descriptors")
            raise Disconnected("the peer closed the connection")
        return data, list(fds)
