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
import dataclasses
import gc
import os
import random
import subprocess
import sys
import time
import zlib
from typing import Final

import trio
from crash import Boundary, Cut, Guard, Lives, When, is_power_cut
from fakes.in_memory import sockets_in_memory
from fakes.world import World, world
from forks import Branches, Tally
from operations import Play, configure
from trio.testing import MockClock

from xshmd.machine import Arch

LENGTH: Final = 3
IDLE_S: Final = 3.0
"""How long after an operation the daemon has nothing to do any more."""


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
            ways = {f"{when.value} {what}": when for when in whens}
            if way := self._branches.branch(ways, self._generation):
                self._cut = Cut(len(self._seen) + 1, ways[way])
        return super().enter(what, divisible=divisible)


class BranchingLives(Lives):
    """The daemon, which is started again in whichever process it was cut off."""

    def __init__(self, host: World, branches: Branches) -> None:
        super().__init__(host, (), {})
        self._branches = branches

    def _guard(self, seen: list[Boundary]) -> Guard:
        return BranchingGuard(self._branches, len(self.seen), seen)


# -- the tree ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Which of the tree's sequences are played."""

    length: int = LENGTH
    only: str = ""
    """One sequence, as it is said when it fails; empty: all."""
    job: int = 0
    jobs: int = 1
    """How many runs share the sequences, and which of them this is."""

    def plays(self, path: str) -> bool:
        return not self.only or self.only.startswith(path)

    def cuts(self, path: str) -> bool:
        return zlib.crc32(path.encode()) % self.jobs == self.job


async def _grow(play: Play, branches: Branches, part: Part, length: int) -> None:
    """Play every operation that is possible now, each in a process of its own, and go on there."""
    for name, operation in list(play.operations()):
        path = " > ".join([*branches.path, name])
        if not part.plays(path) or not branches.fork(name):
            continue
        branches.mine = branches.armed = part.cuts(path)
        await operation()
        await trio.sleep(IDLE_S)
        branches.armed = False
        await play.verify()
        if not branches.cuts and length > 1:
            await _grow(play, branches, part, length - 1)
        await play.finish()
        branches.end()


async def _tree(arch: Arch, branches: Branches, part: Part) -> None:
    async with world(arch) as host:
        try:
            await _forest(host, branches, part)
        except BaseException as error:
            if branches.path:  # a child must not clear away what is its parent's
                branches.end(host.escaped or error)
            raise


async def _forest(host: World, branches: Branches, part: Part) -> None:
    async with trio.open_nursery() as nursery:
        with sockets_in_memory(host.server, nursery):
            configure(host)
            lives = BranchingLives(host, branches)
            host.tolerate = is_power_cut
            nursery.start_soon(lives.run)
            await host.until(lambda: lives.daemon is not None)
            await lives.settled()
            gc.freeze()
            await _grow(Play(host, lives), branches, part, part.length)
            await lives.stop()
            nursery.cancel_scope.cancel()


def grow(arch: Arch, branches: Branches, part: Part) -> None:
    """Play this part of the tree."""
    trio.run(_tree, arch, branches, part, clock=MockClock(autojump_threshold=0))


def main() -> int:
    """Run for a while, side by side; return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="crash_tree", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--first", type=float, default=1.0, help="share of first lives' cuts")
    parser.add_argument("--second", type=float, default=0.02, help="share of recoveries' cuts")
    parser.add_argument("--only", default="", metavar="PATH", help="'create a > end a'")
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
        part = Part(options.length, options.only, options.job, options.jobs)
        grow(arch, branches, part)
        for name in totals:
            totals[name] += branches.tally[name]
    print(f"COUNTS {' '.join(str(totals[name]) for name in Tally.NAMES)}", flush=True)
    return 1 if totals["failures"] else 0


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
    return 0 if ended_well and totals["disturbed"] and not totals["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
