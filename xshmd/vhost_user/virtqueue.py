# SPDX-License-Identifier: LGPL-2.1-or-later
"""A split virtqueue as the device sees it (virtio 1.2, section 2.7), in memory nobody here trusts.

The driver may change any byte of it at any time.  So each number is read once, checked and then
used; and nothing it can write makes the device loop, wrap or reach outside the memory table.
"""

from __future__ import annotations

import dataclasses
import struct
import threading
from contextlib import AbstractContextManager
from typing import Final

from xshmd.units import PAGE_SHIFT
from xshmd.vhost_user.memory import Memory
from xshmd.vhost_user.payloads import VringAddress

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1
MAX_SIZE: Final = 32768
MAX_CHAIN_BYTES: Final = 64 << 20
"""What one request may be long: the device has it in memory."""
_DESCRIPTOR: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")


class BrokenQueue(Exception):
    """What the driver put into the queue cannot be meant; the queue is not looked at again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer of a request: a guest address and a size in bytes."""

    address: int
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """A request: what the device may read, and then what it may write."""

    head: int
    readable: tuple[Buffer, ...]
    writable: tuple[Buffer, ...]

    @property
    def writable_bytes(self) -> int:
        return sum(buffer.size_bytes for buffer in self.writable)

    @property
    def weight(self) -> int:
        """What it costs to answer, in buffers and pages."""
        buffers = (*self.readable, *self.writable)
        return len(buffers) + (sum(buffer.size_bytes for buffer in buffers) >> PAGE_SHIFT)


class Virtqueue:
    """The device's end of a queue that is started.

    Synchronization: none.

    Args:
        memory: What the addresses are of; it may change while the queue lives.
        size: Of the queue: a power of two.
        where: User addresses of its parts.
        next_available: Where in the available ring to go on.
    """

    def __init__(
        self, memory: Memory, size: int, where: VringAddress, next_available: int = 0
    ) -> None:
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise BrokenQueue(f"a queue is to have {size} entries")
        self._memory, self._size, self._where = memory, size, where
        self.next_available = next_available
        self._next_used = self._u16(where.used, 2)

    def pop(self) -> Chain | None:
        """Take the next request; None if there is none.

        Raises:
            BrokenQueue, OutsideMemory, CannotMap: The driver's doing makes no sense.
        """
        available = self._u16(self._where.available, 2)
        waiting = (available - self.next_available) & 0xFFFF
        if waiting > self._size:
            raise BrokenQueue(f"{waiting} requests wait in a queue of {self._size}")
        if not waiting:
            return None
        fence()
        head = self._u16(self._where.available, 4 + 2 * (self.next_available % self._size))
        chain = self._chain(head)
        self.next_available = (self.next_available + 1) & 0xFFFF
        return chain

    def push(self, chain: Chain, written_bytes: int) -> bool:
        """Give a request back; return whether the driver wants to be notified.

        Args:
            chain: The request.
            written_bytes: How much of its writable part was written, from its start.
        """
        slot = self._where.used + 4 + 8 * (self._next_used % self._size)
        with self._ring(slot, _USED.size) as view:
            _USED.pack_into(view, 0, chain.head, written_bytes)
        self._next_used = (self._next_used + 1) & 0xFFFF
        fence()
        with self._ring(self._where.used + 2, 2) as view:
            view.cast("H")[0] = self._next_used
        fence()
        return not self._u16(self._where.available, 0) & AVAIL_F_NO_INTERRUPT

    # -- the driver's memory --------------------------------------------------------------------

    def _chain(self, head: int) -> Chain:
        readable: list[Buffer] = []
        writable: list[Buffer] = []
        table, size, index, left = self._where.descriptors, self._size, head, self._size
        indirect = False
        total = 0
        while True:
            if index >= size:
                raise BrokenQueue(f"descriptor {index} of {size}")
            if not left:
                raise BrokenQueue("a chain of descriptors has no end")
            left -= 1
            address, length, flags, following = self._descriptor(table, index, indirect=indirect)
            if flags & DESC_F_INDIRECT:
                if indirect or flags & DESC_F_NEXT or not length or length % _DESCRIPTOR.size:
                    raise BrokenQueue("an indirect table where there can be none")
                table, indirect, index = address, True, 0
                size = left = min(length // _DESCRIPTOR.size, MAX_SIZE)
                continue
            if writable and not flags & DESC_F_WRITE:
                raise BrokenQueue("a buffer to read comes after one to write")
            (writable if flags & DESC_F_WRITE else readable).append(Buffer(address, length))
            total += length
            if total > MAX_CHAIN_BYTES:
                raise BrokenQueue(f"a request of more than {MAX_CHAIN_BYTES} bytes")
            if not flags & DESC_F_NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = following

    def _descriptor(self, table: int, index: int, *, indirect: bool) -> tuple[int, int, int, int]:
        at = table + index * _DESCRIPTOR.size
        # An indirect table is where the driver says, the queue's own where the front-end does.
        access = self._memory.access if indirect else self._memory.access_user
        with access(at, _DESCRIPTOR.size) as view:
            raw = bytes(view)
        address, length, flags, following = _DESCRIPTOR.unpack(raw)
        return address, length, flags, following

    def _u16(self, start: int, offset: int) -> int:
        with self._ring(start + offset, 2) as view:
            return view.cast("H")[0]

    def _ring(self, user_address: int, size_bytes: int) -> AbstractContextManager[memoryview]:
        return self._memory.access_user(user_address, size_bytes)


_fence: Final = threading.Lock()
_fence.acquire()
_fence_turn: Final = threading.Lock()


def fence() -> None:
    """Let all that was read and written before be so before anything after it.

    Python has no name for that.  Letting go of a lock orders what comes before, taking one what
    comes after, and the two of one lock keep their order.
    """
    with _fence_turn:
        _fence.release()
        _fence.acquire()


def read_all(memory: Memory, buffers: tuple[Buffer, ...]) -> bytes:
    """Return the bytes of buffers, one after the other.

    Raises:
        OutsideMemory, CannotMap: Some of them are not there.
    """
    data = bytearray()
    for buffer in buffers:
        for address, size_bytes in memory.pieces(buffer.address, buffer.size_bytes):
            with memory.access(address, size_bytes) as view:
                data += view
    return bytes(data)


def write_all(memory: Memory, buffers: tuple[Buffer, ...], data: bytes) -> None:
    """Write bytes into buffers, from the start of the first on.

    Raises:
        OutsideMemory, CannotMap: Some of them are not there; others may have been written.
    """
    left = memoryview(data)
    for buffer in buffers:
        for address, size_bytes in memory.pieces(buffer.address, buffer.size_bytes):
            if not left:
                return
            size = min(size_bytes, len(left))
            with memory.access(address, size) as view:
                view[:] = left[:size]
            left = left[size:]
