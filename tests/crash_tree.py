# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make crashes``: a power cut at every step of every sequence of up to three operations.

A sequence is played once for all of its cuts: at every boundary the process forks, the child's
daemon is cut off there, is started again, and must bring the host to where it would have been; the
parent goes on to the next boundary.  A child may fork once more in the recovery from its cut.  What
is cut is the last operation of a sequence, as cuts of those before it are those of shorter ones.

Run in ``tests``: ``python3 -m crash_tree --seconds N [--jobs N] [--seed N]``.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio
from crash import Boundary, Cut, Guard, Lives, When, is_power_cut
from fakes.in_memory import sockets_in_memory
from fakes.world import World, world
from operations import Play, configure
from trio.testing import MockClock

from xshmd.model import Arch

LENGTH: Final = 3
IDLE_S: Final = 3.0
"""How long after an operation the daemon has nothing to do any more."""
HANGS_S: Final = 60
"""A child that lives for so long has failed."""


# -- forks -----------------------------------------------------------------------------------------


class Tally:
    """What all processes of a run have done, in memory that they share."""

    NAMES: Final = ("sequences", "cuts", "second cuts", "failures")

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
        share: Of the boundaries in a first life and in a recovery, how many are cut.
    """

    def __init__(self, rng: random.Random, deadline: float, share: tuple[float, float]) -> None:
        self.tally = Tally()
        self.path: list[str] = []
        self.cuts = 0
        self.armed = False
        """Whether the operation under way is the one that is cut."""
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

    def cuts_here(self, boundary: str, whens: Sequence[When], generation: int) -> When | None:
        """Fork for every way to be cut off here; in a child, return which it is."""
        if not self.armed or generation != self.cuts or generation >= len(self._share):
            return None
        for when in whens:
            chosen = self._rng.random() < self._share[generation]
            if chosen and self.fork(f"{when.value} {boundary}"):
                self.cuts += 1
                return when
        return None

    def end(self, error: BaseException | None = None) -> None:
        """End a child; what failed is said."""
        if error is not None:
            self._fail("".join(traceback.format_exception(error, limit=-4)))
        names = ("sequences", "cuts", "second cuts")
        self.tally.add(names[self.cuts])
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


class BranchingGuard(Guard):
    """Ends a life at every boundary, each time in a process of its own."""

    def __init__(self, branches: Branches, generation: int, seen: list[Boundary]) -> None:
        super().__init__(None, seen)
        self._branches, self._generation = branches, generation

    def enter(self, what: str, *, divisible: bool = False) -> int:
        self.check()
        # Recovery counts a guest's pauses by taking all that Xen allows: twice is enough of each.
        if self._cut is None and sum(one.what == what for one in self._seen) < 2:
            whens = [when for when in When if when is not When.DURING or divisible]
            when = self._branches.cuts_here(what, whens, self._generation)
            if when is not None:
                self._cut = Cut(len(self._seen) + 1, when)
        return super().enter(what, divisible=divisible)


class BranchingLives(Lives):
    """The daemon, which is started again in whichever process it was cut off."""

    def __init__(self, host: World, branches: Branches) -> None:
        super().__init__(host, (), {})
        self._branches = branches

    def _guard(self, seen: list[Boundary]) -> Guard:
        return BranchingGuard(self._branches, len(self.seen), seen)


# -- the tree ----------------------------------------------------------------------------------


async def _grow(play: Play, branches: Branches, length: int, mine: Callable[[str], bool]) -> None:
    """Play every operation that is possible now, each in a process of its own, and go on there."""
    for name, operation in list(play.operations()):
        if not mine(" > ".join([*branches.path, name])) or not branches.fork(name):
            continue
        branches.armed = True
        await operation()
        await trio.sleep(IDLE_S)
        branches.armed = False
        await play.verify()
        if not branches.cuts and length > 1:
            await _grow(play, branches, length - 1, mine)
        await play.finish()
        branches.end()


async def _tree(arch: Arch, branches: Branches, length: int, mine: Callable[[str], bool]) -> None:
    async with world(arch) as host:
        try:
            await _forest(host, branches, length, mine)
        except BaseException as error:
            if branches.path:  # a child must not clear away what is its parent's
                branches.end(host.escaped or error)
            raise


async def _forest(
    host: World, branches: Branches, length: int, mine: Callable[[str], bool]
) -> None:
    async with trio.open_nursery() as nursery:
        with sockets_in_memory(host.server, nursery):
            configure(host)
            lives = BranchingLives(host, branches)
            host.tolerate = is_power_cut
            nursery.start_soon(lives.run)
            await host.until(lambda: lives.daemon is not None)
            await lives.settled()
            gc.freeze()
            await _grow(Play(host, lives), branches, length, mine)
            await lives.stop()
            nursery.cancel_scope.cancel()


def grow(
    arch: Arch,
    branches: Branches,
    *,
    length: int = LENGTH,
    mine: Callable[[str], bool] = lambda path: True,
) -> None:
    """Play the whole tree, or those of its branches that are ``mine``."""
    trio.run(_tree, arch, branches, length, mine, clock=MockClock(autojump_threshold=0))


def main() -> int:
    """Run for a while, side by side; return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="crash_tree", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--first", type=float, default=1.0, help="share of first lives' cuts")
    parser.add_argument("--second", type=float, default=0.02, help="share of recoveries' cuts")
    parser.add_argument("--only", metavar="PATH", help="one sequence: 'create a > end a'")
    parser.add_argument("--arch", choices=[arch.value for arch in Arch])
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is None:
        return _side_by_side(options.jobs, sys.argv[1:])
    arches = [Arch(options.arch)] if options.arch else list(Arch)
    deadline = time.monotonic() + options.seconds
    totals = dict.fromkeys(Tally.NAMES, 0)
    for place, arch in enumerate(arches):
        left = (deadline - time.monotonic()) / (len(arches) - place)
        branches = Branches(
            random.Random(f"{options.seed} {options.job} {arch}"),
            time.monotonic() + left,
            (options.first, options.second),
        )
        mine = _every(options.job, options.jobs)
        if options.only:
            mine = options.only.startswith
        grow(arch, branches, length=options.length, mine=mine)
        for name in totals:
            totals[name] += branches.tally[name]
    print(f"COUNTS {' '.join(str(totals[name]) for name in Tally.NAMES)}", flush=True)
    return 1 if totals["failures"] else 0


def _every(job: int, jobs: int) -> Callable[[str], bool]:
    """Share branches out by their first two operations."""
    seen: dict[str, int] = {}

    def mine(path: str) -> bool:
        depth = path.count(" > ")
        if depth == 0:
            return job == 0 or LENGTH > 1
        if depth == 1:
            return seen.setdefault(path, sum(map(ord, path))) % jobs == job
        return True

    return mine


def _side_by_side(jobs: int, arguments: list[str]) -> int:
    began = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "crash_tree", *arguments, "--job", str(job)],
            stdout=subprocess.PIPE, text=True,
        )
        for job in range(jobs)
    ]  # fmt: skip
    totals = dict.fromkeys(Tally.NAMES, 0)
    for process in running:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("COUNTS "):
                for name, word in zip(Tally.NAMES, line.split()[1:], strict=True):
                    totals[name] += int(word)
            else:
                print(line, end="", flush=True)
        process.wait()
    ended_well = all(process.returncode == 0 for process in running)
    words = ", ".join(f"{count} {name}" for name, count in totals.items())
    print(f"{words} in {time.monotonic() - began:.0f} s")
    return 0 if ended_well and totals["cuts"] and not totals["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
