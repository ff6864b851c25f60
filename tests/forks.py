# SPDX-License-Identifier: LGPL-2.1-or-later
"""A play that goes on in every way it could: at each place the process forks, one child a way.

What led there is played once for all of them.  A parent waits for its child, so that there is one
process at work at a time; the loop of trio that is forked must have no sockets but its own.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any, Final

import trio

HANGS_S: Final = 60
"""A child that lives for so long has failed."""


class Tally:
    """What all processes of a run have done, in memory that they share."""

    NAMES: Final = ("sequences", "disturbed", "disturbed twice", "failures")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))

    def __getitem__(self, name: str) -> int:
        (value,) = struct.unpack_from("<Q", self._memory, 8 * self.NAMES.index(name))
        return int(value)

    def add(self, name: str) -> None:
        struct.pack_into("<Q", self._memory, 8 * self.NAMES.index(name), self[name] + 1)


class Branches:
    """Where the run forks, and where in the tree this process is.

    Args:
        rng: Which of the places are taken.
        deadline: When to stop, on the monotonic clock.
        share: How many of the places are taken, for a first disturbance and for a second.
    """

    def __init__(self, rng: random.Random, deadline: float, share: tuple[float, ...]) -> None:
        self.tally = Tally()
        self.path: list[str] = []
        self.cuts = 0
        self.mine = True
        """Whether it is for this run to disturb the operation under way, or for one beside it."""
        self.armed = False
        """Whether that operation is the last of its sequence, the one that is disturbed."""
        self._rng, self._deadline, self._share = rng, deadline, share

    def fork(self, what: str) -> bool:
        """Return True in the child, and False in its parent once the child has ended."""
        if time.monotonic() > self._deadline:
            return False
        sys.stdout.flush()
        child = os.fork()
        if child:
            left = signal.alarm(0)
            _, status = os.waitpid(child, 0)
            signal.alarm(left)
            if os.waitstatus_to_exitcode(status) < 0:
                self._fail(f"{what}: ended by signal {-os.waitstatus_to_exitcode(status)}")
            return False
        gc.disable()
        signal.alarm(HANGS_S)
        self.path.append(what)
        _own_event_loop()
        return True

    def branch(self, words: Iterable[str], generation: int = 0) -> str:
        """Fork for each of these ways to be disturbed; in a child, return which it is."""
        if not self.armed or generation != self.cuts or generation >= len(self._share):
            return ""
        for word in words:
            if self._rng.random() < self._share[generation] and self.fork(word):
                self.cuts += 1
                return word
        return ""

    def end(self, error: BaseException | None = None) -> None:
        """End a child; what failed is said."""
        if error is not None:
            self._fail("".join(traceback.format_exception(error, limit=-4)))
        if self.cuts or self.mine:
            self.tally.add(Tally.NAMES[self.cuts])
        os._exit(0)

    def _fail(self, words: str) -> None:
        self.tally.add("failures")
        print(f"FAILED {' > '.join(self.path)}: {words}", flush=True)


def _own_event_loop() -> None:
    """Give a forked trio an epoll and wake-up sockets of its own, in place of its parent's."""
    runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
    manager = runner.io_manager
    fresh = select.epoll()
    os.dup2(fresh.fileno(), manager._epoll.fileno(), inheritable=False)
    fresh.close()
    for pair in (manager._force_wakeup, runner.entry_queue.wakeup):
        ours, theirs = socket.socketpair()
        for one, other in ((ours, pair.wakeup_sock), (theirs, pair.write_sock)):
            one.setblocking(False)
            os.dup2(one.fileno(), other.fileno(), inheritable=False)
            one.close()
        pair.write_sock.send(b"\0")  # whatever was on its way
    manager._epoll.register(manager._force_wakeup.wakeup_sock, select.EPOLLIN)
    for fd, waiters in manager._registered.items():
        if waiters.current_flags:
            manager._epoll.register(fd, waiters.current_flags | select.EPOLLONESHOT)
