# SPDX-License-Identifier: LGPL-2.1-or-later
"""A driver's side of a virtqueue, in any shared memory: what a guest would do, for the tests."""

from __future__ import annotations

import os
import select
import struct
import time

from xshmd.vhost_user.frontend import Queue
from xshmd.vhost_user.payloads import VringAddress
from xshmd.vhost_user.virtqueue import DESC_F_NEXT, DESC_F_WRITE

PAGE = 4096
DATA = 3 * PAGE
"""Where in the memory the requests' own data begins: after the three parts of the queue."""


class Driver:
    """Uses the first frames of some memory for one queue and its requests.

    Args:
        memory: All of it.
        guest_address: Where it begins for descriptors.
        user_address: Where it begins for the addresses of rings.
        size: Of the queue.
        already: How many requests it is to have had before.
    """

    def __init__(
        self,
        memory: memoryview,
        guest_address: int,
        user_address: int,
        size: int = 8,
        already: int = 0,
    ) -> None:
        self.memory, self._guest, self._user, self.size = memory, guest_address, user_address, size
        self._available, self._used = PAGE, 2 * PAGE
        self._sent = already
        for ring in (self._available, self._used):
            struct.pack_into("<H", memory, ring + 2, already)
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)

    def queue(self, index: int = 0, *, events: bool = True) -> Queue:
        """Say where the queue is, as a front-end does."""
        where = VringAddress(
            index=index, descriptors=self._user, available=self._user + self._available,
            used=self._user + self._used,
        )  # fmt: skip
        kick, call = (self.kick, self.call) if events else (-1, -1)
        return Queue(size=self.size, where=where, kick=kick, call=call)

    def at(self, page: int) -> int:
        """Return the guest address of a page for requests' data."""
        return self._guest + DATA + page * PAGE

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        struct.pack_into("<QIHH", self.memory, 16 * index, address, length, flags, following)

    def offer(self, head: int) -> None:
        """Put a chain into the available ring."""
        slot = self._available + 4 + 2 * (self._sent % self.size)
        struct.pack_into("<H", self.memory, slot, head)
        self._sent += 1
        struct.pack_into("<H", self.memory, self._available + 2, self._sent & 0xFFFF)

    @property
    def used(self) -> int:
        """How many requests have come back, modulo 65536."""
        count: int = struct.unpack_from("<H", self.memory, self._used + 2)[0]
        return count

    def place(self, request: bytes, room: int) -> None:
        """Write a request of one buffer to read and one to write into the ring, and offer it."""
        self.memory[DATA : DATA + len(request)] = request
        self.descriptor(0, self.at(0), len(request), DESC_F_NEXT, 1)
        self.descriptor(1, self.at(1), room, DESC_F_WRITE, 0)
        self.offer(0)

    def answer(self, room: int) -> bytes:
        """Return what the device wrote into the buffer of :meth:`place`."""
        slot = self._used + 4 + 8 * ((self._sent - 1) % self.size)
        head, written = struct.unpack_from("<II", self.memory, slot)
        assert head == 0
        assert written <= room
        return bytes(self.memory[DATA + PAGE : DATA + PAGE + room])

    def ask(self, request: bytes, room: int, timeout_s: float = 60.0) -> bytes:
        """Have the device answer a request, woken by the queue's events."""
        self.place(request, room)
        os.eventfd_write(self.kick, 1)
        self.wait(timeout_s)
        return self.answer(room)

    def wait(self, timeout_s: float = 60.0) -> None:
        """Wait until everything that was offered has come back, woken by the queue's event."""
        deadline = time.monotonic() + timeout_s
        while self.used != self._sent & 0xFFFF:
            left = deadline - time.monotonic()
            assert left > 0, "the device does not answer"
            if select.select([self.call], [], [], left)[0]:
                os.eventfd_read(self.call)
