# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections to the fake xenstored without a socket: none that a forked process would share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from fakes.xenstored import FakeXenstored


class _Pipe:
    """Bytes on their way from one end to the other."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self.changed = trio.lowlevel.ParkingLot()

    def end(self) -> None:
        self.ended = True
        self.changed.unpark_all()


class _Stream:
    """One end, with what the client and the server use of a trio.SocketStream."""

    def __init__(self, inbound: _Pipe, outbound: _Pipe) -> None:
        self._in, self._out = inbound, outbound
        self._closed = False
        self.socket = self

    def close(self) -> None:
        self._closed = True
        self._in.end()
        self._out.end()

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("this end is closed")
        if self._out.ended:
            raise trio.BrokenResourceError("the other end is closed")
        self._out.data += data
        self._out.changed.unpark_all()

    async def receive_some(self, max_bytes: int) -> bytes:
        while not self._in.data and not self._in.ended:
            await self._in.changed.park()
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("this end is closed")
        data = bytes(self._in.data[:max_bytes])
        del self._in.data[:max_bytes]
        return data


@contextmanager
def sockets_in_memory(server: FakeXenstored, nursery: trio.Nursery) -> Iterator[None]:
    """Let trio.open_unix_socket() reach this server without a socket."""
    real = trio.open_unix_socket

    async def open_unix_socket(path: str) -> Any:
        await trio.lowlevel.checkpoint()
        if path != str(server.path):
            raise FileNotFoundError(2, "no such server here", path)
        there, back = _Pipe(), _Pipe()
        server.serve(_Stream(there, back), nursery)
        return _Stream(back, there)

    trio.open_unix_socket = open_unix_socket  # type: ignore[assignment]
    try:
        yield
    finally:
        trio.open_unix_socket = real
