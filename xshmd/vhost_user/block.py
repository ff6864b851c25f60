# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk as a vhost-user back-end: a file, served to whoever speaks virtio-blk (virtio 1.2, 5.2).

    python3 -m xshmd.vhost_user.block --socket PATH --file FILE [--read-only]

It is small on purpose: what a program needs to write a back-end of its own is all in it.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xshmd.units import is_within
from xshmd.vhost_user.backend import Backend
from xshmd.vhost_user.memory import Memory
from xshmd.vhost_user.virtqueue import BrokenQueue, Buffer, Chain, read_all, write_all

SECTOR_BYTES: Final = 512
_F_RO: Final = 1 << 5
_F_FLUSH: Final = 1 << 9
_IN, _OUT, _FLUSH, _GET_ID = 0, 1, 4, 8
_OK, _IO_ERROR, _UNSUPPORTED = b"\0", b"\1", b"\2"
_ID: Final = b"xshmd".ljust(20, b"\0")
_HEADER: Final = struct.Struct("<IIQ")
"""struct virtio_blk_req up to its data: type, reserved, sector."""


class BlockDevice:
    """A :class:`~xshmd.vhost_user.vring.Device` with one queue.

    Args:
        fd: The file, which stays the caller's.
        read_only: Whether writing is refused.
    """

    queue_count = 1

    def __init__(self, fd: int, *, read_only: bool = False) -> None:
        self._fd, self._read_only = fd, read_only
        self._sectors = os.fstat(fd).st_size // SECTOR_BYTES

    @property
    def features(self) -> int:
        return _F_FLUSH | (_F_RO if self._read_only else 0)

    def config(self) -> bytes:
        return struct.pack("<Q", self._sectors)

    def handle(self, memory: Memory, queue: int, chain: Chain) -> int:
        if not chain.writable or not chain.writable[-1].size_bytes:
            raise BrokenQueue("a request has no room for its status")
        request = read_all(memory, chain.readable)
        if len(request) < _HEADER.size:
            raise BrokenQueue(f"a request has {len(request)} bytes")
        kind, _, sector = _HEADER.unpack_from(request)
        # The status is the last byte of what may be written, and data all before it.
        *before, last = chain.writable
        room = (*before, Buffer(last.address, last.size_bytes - 1))
        status, answer = self._answer(
            kind, sector, request[_HEADER.size :], chain.writable_bytes - 1
        )
        write_all(memory, room, answer)
        end = last.address + last.size_bytes - 1
        write_all(memory, (Buffer(end, 1),), status)
        return len(answer) + 1

    def _answer(self, kind: int, sector: int, data: bytes, room: int) -> tuple[bytes, bytes]:
        """Return the status and what goes into the driver's buffers."""
        start, size = sector * SECTOR_BYTES, len(data) if kind == _OUT else room
        if kind in (_IN, _OUT) and (
            size % SECTOR_BYTES or not is_within(sector, size // SECTOR_BYTES, self._sectors)
        ):
            return _IO_ERROR, b""
        try:
            if kind == _IN:
                answer = os.pread(self._fd, size, start)
                return (_OK if len(answer) == size else _IO_ERROR), answer
            if kind == _OUT and not self._read_only:
                return (_OK if os.pwrite(self._fd, data, start) == size else _IO_ERROR), b""
            if kind == _FLUSH:
                os.fdatasync(self._fd)
                return _OK, b""
            if kind == _GET_ID:
                return _OK, _ID[:room]
        except OSError:
            return _IO_ERROR, b""
        return (_IO_ERROR if kind == _OUT else _UNSUPPORTED), b""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a file until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="python3 -m xshmd.vhost_user.block", description="Serve a file as a virtio-blk disk."
    )
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH")
    parser.add_argument("--file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--read-only", action="store_true", help="refuse to write")
    parser.add_argument(
        "--connect", action="store_true", help="connect to the socket instead of listening at it"
    )
    chosen = parser.parse_args(arguments)
    # Each front-end may come to hold some seventy descriptors.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    fd = os.open(chosen.file, os.O_CLOEXEC | (os.O_RDONLY if chosen.read_only else os.O_RDWR))
    device = BlockDevice(fd, read_only=chosen.read_only)
    backend = Backend(lambda: device, lambda text: print(text, file=sys.stderr, flush=True))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: backend.stop())
    if chosen.connect:
        backend.connect(chosen.socket)
    else:
        backend.listen(chosen.socket)
    print(f"serving {chosen.file} at {chosen.socket}", flush=True)
    try:
        backend.run()
    finally:
        if not chosen.connect:
            chosen.socket.unlink(missing_ok=True)
        os.close(fd)
    return 0


if __name__ == "__main__":
    sys.exit(main())
