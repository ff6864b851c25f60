# SPDX-License-Identifier: LGPL-2.1-or-later
"""A queue as a front-end has set it up so far: its events, and the requests that wait in it."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from typing import Final, Protocol

from xshmd.vhost_user.memory import CannotMap, Memory, OutsideMemory
from xshmd.vhost_user.payloads import VringAddress
from xshmd.vhost_user.virtqueue import BrokenQueue, Chain, Virtqueue
from xshmd.vhost_user.wire import ProtocolViolation

_BROKEN: Final = (BrokenQueue, OutsideMemory, CannotMap)
"""What a driver can make happen."""
_ONE: Final = (1).to_bytes(8, sys.byteorder)
_EVENTFD: Final = "anon_inode:[eventfd]"
TURN_WEIGHT: Final = 1 << 14
"""How much a queue may have done before others have their turn: see :attr:`Chain.weight`."""


class Device(Protocol):
    """What a back-end is for; one for each connection, or one for all."""

    @property
    def features(self) -> int:
        """Bits of virtio's features beyond those of the transport."""
        ...

    @property
    def queue_count(self) -> int:
        """How many queues it has: 1 to 256."""
        ...

    def config(self) -> bytes:
        """Return its configuration space, as far as it says anything."""
        ...

    def handle(self, memory: Memory, queue: int, chain: Chain) -> int:
        """Do what a request of the driver asks for; return how many bytes were written.

        Raises:
            OutsideMemory, CannotMap, BrokenQueue: The request makes no sense; the queue is given
                up.
        """
        ...


class Vring:
    """A queue as the front-end has set it up so far."""

    def __init__(self) -> None:
        self.size = 0
        self.where: VringAddress | None = None
        self.base = 0
        self.enabled = False
        self.polled = False
        """Whether nobody will say that there is something in it: it must be looked at."""
        self.more = False
        """Whether requests were left for the next time, for others' sake."""
        self.kick = self.call = self.error = -1
        self.queue: Virtqueue | None = None
        """Once it is started."""
        self.broken = False

    @property
    def is_polled(self) -> bool:
        """Whether to look into it now and then."""
        return self.polled and self.enabled and not self.broken

    def replace(self, name: str, fd: int) -> None:
        """Put another descriptor in the place of ``kick``, ``call`` or ``error``."""
        before = getattr(self, name)
        setattr(self, name, fd)
        if before >= 0:
            os.close(before)

    def stop(self) -> None:
        """Forget where it is; the next start begins where it was."""
        if self.queue is not None:
            self.base = self.queue.next_available
            self.queue = None
        self.broken = self.polled = self.more = False
        self.replace("kick", -1)

    def close(self) -> None:
        """Close every descriptor."""
        for name in ("kick", "call", "error"):
            self.replace(name, -1)

    def process(self, device: Device, memory: Memory, index: int) -> int:
        """Answer what waits in the queue, as much as is one turn; return how many requests it was.

        A queue in which the driver put what makes no sense is not looked at again until it is set
        up anew; its error descriptor, if it has one, says so.

        Args:
            device: What answers.
            memory: What the addresses are of.
            index: Which queue of the device it is.
        """
        done = weight = 0
        notify = self.more = False
        try:
            if self.broken or not self.enabled:
                return 0
            queue = self._started(memory)
            while queue is not None and (chain := queue.pop()) is not None:
                written = device.handle(memory, index, chain)
                notify |= queue.push(chain, written)
                done += 1
                weight += chain.weight
                # A driver that adds on and on, a request that writes into the ring, or requests
                # that are long must not keep other front-ends waiting.
                if done >= self.size or weight >= TURN_WEIGHT:
                    self.more = True
                    break
        except _BROKEN:
            self.broken = True
            _signal(self.error)
        finally:
            if notify:
                _signal(self.call)
        return done

    def _started(self, memory: Memory) -> Virtqueue | None:
        if self.queue is None and self.where is not None and self.size:
            self.queue = Virtqueue(memory, self.size, self.where, self.base)
        return self.queue


def check_event(fd: int) -> None:
    """Raise unless reading and writing this can do nothing but wake somebody."""
    # Only its name tells an eventfd from others of its kind, such as an epoll or an inotify.
    if not stat.S_ISFIFO(os.fstat(fd).st_mode) and os.readlink(f"/proc/self/fd/{fd}") != _EVENTFD:
        raise ProtocolViolation("a queue's event is neither an eventfd nor a pipe")
    os.set_blocking(fd, False)


def _signal(fd: int) -> None:
    if fd >= 0:
        # One that is full has not been read yet, and one without a reader needs no waking.
        with contextlib.suppress(OSError):
            os.write(fd, _ONE)
