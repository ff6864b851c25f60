# SPDX-License-Identifier: LGPL-2.1-or-later
"""The clients gone wrong: each does one thing over and over, as fast as it can, until killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import socket
import time
from collections.abc import Callable, Iterable
from typing import Final

PING: Final = b'{"method":"io.xshmd.Regions.Ping"}\0'
LIST: Final = b'{"method":"io.xshmd.Regions.ListRegions"}\0'
MONITOR: Final = b'{"method":"io.xshmd.Regions.Monitor","more":true}\0'
CALL_BYTES: Final = 64 << 10
LARGE_CALL_BYTES: Final = 1 << 20
AT_ONCE: Final = 64
"""Connections that an attacker tries to have."""


def _connected(path: str, timeout_s: float = 1.0) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(timeout_s)
    while True:
        with contextlib.suppress(BlockingIOError):  # the backlog is full
            stream.connect(path)
            return stream


def _say(path: str, messages: Iterable[bytes]) -> None:
    """Send each on a connection of its own and wait for what comes of it, an end mostly."""
    for message in messages:
        with _connected(path) as stream, contextlib.suppress(OSError):
            stream.sendall(message)
            stream.recv(4096)


def _for_ever(*messages: bytes) -> Callable[[str], None]:
    return lambda path: _say(path, itertools.cycle(messages))


def _parameters(value: object) -> bytes:
    call = {"method": "io.xshmd.Regions.Ping", "parameters": {"x": value}}
    return json.dumps(call, separators=(",", ":")).encode() + b"\0"


def _declared(text: str) -> bytes:
    call = {"method": "io.xshmd.Regions.DeclareGuest", "parameters": {"file": "a", "text": text}}
    return json.dumps(call).encode() + b"\0"


def no_end(path: str) -> None:
    """Send without ever a NUL."""
    _say(path, itertools.repeat(b"a" * (LARGE_CALL_BYTES + 1)))


def a_byte_a_second(path: str) -> None:
    """Send a byte a second on as many connections as there may be, and come back when closed."""
    streams = [_connected(path) for _ in range(AT_ONCE)]
    for byte in itertools.cycle(PING[:-1]):
        for at, stream in enumerate(streams):
            try:
                stream.sendall(bytes([byte]))
            except OSError:
                stream.close()
                streams[at] = _connected(path)
        time.sleep(1)


def ten_thousand_connections(path: str) -> None:
    """Connect ten thousand times without a word, and keep what is kept; then again."""
    while True:
        streams = []
        for _ in range(10_000):
            streams.append(_connected(path))
            if len(streams) > 500:
                streams.pop(0).close()
        for stream in streams:
            stream.close()


def never_read(path: str) -> None:
    """Ask on many connections at once, and read no answer."""
    while True:
        _flood([_connected(path) for _ in range(16)], LIST * 100)


def only_ask(path: str) -> None:
    """Ask on many connections at once as fast as it is answered."""
    while True:
        streams = [_connected(path) for _ in range(16)]
        for stream in streams:
            stream.setblocking(False)
        with contextlib.suppress(OSError):
            for _ in range(1000):
                for stream in streams:
                    with contextlib.suppress(BlockingIOError):
                        stream.send(PING * 50)
                    with contextlib.suppress(BlockingIOError):
                        if not stream.recv(65536):
                            raise ConnectionResetError
        for stream in streams:
            stream.close()


def monitors(path: str) -> None:
    """Listen to all that happens on many connections, and read none of it."""
    while True:
        _flood([_connected(path) for _ in range(16)], MONITOR)


def _flood(streams: list[socket.socket], data: bytes) -> None:
    """Write to all of them until each is closed or takes no more for ten seconds."""
    waiting = dict.fromkeys(streams, data)
    for stream in streams:
        stream.setblocking(False)
    while waiting:
        _, ready, _ = select.select([], list(waiting), [], 10)
        if not ready:
            break
        for stream in ready:
            try:
                waiting[stream] = waiting[stream][stream.send(waiting[stream]) :] or data
            except OSError:
                del waiting[stream]
    for stream in streams:
        stream.close()


ATTACKERS: Final[dict[str, Callable[[str], None]]] = {
    "no-end": no_end,
    "a-byte-a-second": a_byte_a_second,
    "ten-thousand-connections": ten_thousand_connections,
    "half-closed": _for_ever(PING[:-1]),
    "deep": _for_ever(_parameters(0)[:-3] + b"[" * 60_000, b"[" * (LARGE_CALL_BYTES - 1) + b"\0"),
    "wide": _for_ever(_parameters([{"": 0}] * 9000), _parameters([[]] * 20_000)),
    "wide-and-large": _for_ever(_parameters([{"": 0}] * 20_000), _parameters([0] * 65_000)),
    "too-wide": _for_ever(_parameters([0] * 500_000)),
    "surrogates": _for_ever(b'{"method":"\\ud800"}\0', b'{"method":"\xed\xa0\x80"}\0'),
    "flags": _for_ever(
        b'{"method":"a.b","more":1}\0', b'{"method":"a.b","more":true,"oneway":true}\0',
        b'{"method":"a.b","unknown":1}\0', b'{"method":"a.b","method":"c.d"}\0', b"\0",
    ),
    "large": _for_ever(_declared("#" * (LARGE_CALL_BYTES - 200))),
    "hard-configuration": _for_ever(
        _declared("\n".join(f'k{at} = ["a", {at}]' for at in range(2000))),
        _declared("name='a'\nstatic_shm=[" + "'id=r,begin=1',\n" * 3000 + "]"),
    ),
    "never-read": never_read,
    "only-ask": only_ask,
    "monitors": monitors,
}  # fmt: skip
