# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make races``: at every step of every operation, something happens to the guest it is about.

It is destroyed, crashes, reboots or is renamed while the daemon is in the middle of something.  The
other guests keep what they have, and when all have ended nothing is left.  Run in ``tests``:
``python3 -m races --seconds N [--length N] [--share X] [--only PATH]``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio
from crash import Boundary, Guard, Lives
from fakes.in_memory import sockets_in_memory
from fakes.objects import Domain
from fakes.toolstack import Made, XlFailed
from fakes.world import World, world
from forks import Branches, Tally
from operations import EXTRA, Play, configure
from trio.testing import MockClock

from xshmd.changes import RemoveRegion
from xshmd.errors import XshmError
from xshmd.machine import SHUTDOWN_CRASH, SHUTDOWN_REBOOT, Arch
from xshmd.model import GuestConfig
from xshmd.policy.identity import is_holder_uuid

OVER_S: Final = 90.0
"""After which an operation that was disturbed has ended, well or not, and all that came of it."""
Event = Callable[[World, Made], Awaitable[None]]


async def destroyed(host: World, made: Made) -> None:
    """The domain goes first, whoever holds its lock; its nodes when libxl gets to them."""
    host.xen.destroy(made.domid)
    await trio.sleep(1)
    for path in (f"/vm/{made.config.uuid}", f"/local/domain/{made.domid}", f"/libxl/{made.domid}"):
        if path in host.server.nodes:
            host.server.remove(path)
    host.locks.finished.discard((made.domid, made.config.uuid))


async def crashed(host: World, made: Made) -> None:
    host.tools.shut_down(made, SHUTDOWN_CRASH)
    await trio.sleep(1)
    await destroyed(host, made)


async def rebooted(host: World, made: Made) -> None:
    host.tools.shut_down(made, SHUTDOWN_REBOOT)
    await destroyed(host, made)
    await trio.sleep(2)
    with contextlib.suppress(XlFailed):
        await host.tools.create(made.config)


async def renamed(host: World, made: Made) -> None:
    path = f"/local/domain/{made.domid}/name"
    if path in host.server.nodes:
        host.server.write(path, "another")


EVENTS: Final[tuple[Event, ...]] = (destroyed, crashed, rebooted, renamed)


class RacingGuard(Guard):
    """Lets something happen at every boundary, each time in a process of its own."""

    def __init__(self, race: Race, seen: list[Boundary]) -> None:
        super().__init__(None, seen)
        self._race = race

    def enter(self, what: str, *, divisible: bool = False) -> int:
        self._race.come_to(what)
        return super().enter(what, divisible=divisible)


class RacingLives(Lives):
    """The daemon, which nobody kills."""

    def __init__(self, host: World, race: Race) -> None:
        super().__init__(host, (), {})
        self._race = race

    def _guard(self, seen: list[Boundary]) -> Guard:
        return RacingGuard(self._race, seen)


@dataclasses.dataclass(slots=True)
class Race:
    """What goes on beside an operation."""

    host: World
    branches: Branches
    nursery: trio.Nursery
    subject: str = ""
    """The name of the guest that the operation is about."""

    def come_to(self, boundary: str) -> None:
        domain = self._subject()
        if domain is None:
            return
        ways = {f"{event.__name__} at {boundary}": event for event in EVENTS}
        way = self.branches.branch(ways)
        if way:
            self.nursery.start_soon(self._strike, ways[way], self.made(domain))

    async def _strike(self, event: Event, made: Made) -> None:
        with contextlib.suppress(XshmError):  # of Xen: it is gone already
            await event(self.host, made)

    def _subject(self) -> Domain | None:
        config = self.host.finder.files.get(self.subject)
        named = [
            domain
            for domain in self.guests()
            if self.host.server.read(f"/local/domain/{domain.domid}/name") == self.subject
        ]
        return named[-1] if named and isinstance(config, GuestConfig) else None

    def guests(self) -> list[Domain]:
        """Return every domain that is a guest, and not on its way out."""
        return [
            domain
            for domain in self.host.xen.by_domid.values()
            if domain.domid and not domain.dying and not is_holder_uuid(domain.uuid)
        ]

    def made(self, domain: Domain) -> Made:
        config = self.host.finder.files[self.subject]
        assert isinstance(config, GuestConfig)
        return Made(domain.domid, dataclasses.replace(config, uuid=domain.uuid))


async def _disturbed(play: Play, race: Race, operation: Callable[[], Awaitable[None]]) -> None:
    """Go on with an operation during which something happened, and clear away what came of it."""
    host = race.host
    with contextlib.suppress(XlFailed, XshmError, AssertionError, KeyError):
        await operation()
    await trio.sleep(OVER_S)
    play.made.pop(race.subject, None)
    if play.extra is not None:
        play.extra.discard(race.subject)
    play.written = False
    await play.verify()
    for domain in race.guests():
        await host.tools.destroy(race.made(domain))
    daemon = await play.lives.settled()
    if any(region.region_id == EXTRA for region in daemon.engine.snapshot().regions):
        await play.lives.apply(RemoveRegion(region_id=EXTRA, force=True))
    host.ran.clear()  # a guest that was renamed is no more the one of its file
    await host.check_clean()


async def _grow(play: Play, race: Race, length: int, only: str) -> None:
    for name, operation in list(play.operations()):
        path = " > ".join([*race.branches.path, name])
        if (only and not only.startswith(path)) or not race.branches.fork(name):
            continue
        race.subject = name.rpartition(" ")[2]
        race.branches.armed = True
        await _played(play, race, operation)
        race.branches.armed = False
        await play.verify()
        if length > 1:
            await _grow(play, race, length - 1, only)
        await play.finish()
        race.branches.end()


async def _played(play: Play, race: Race, operation: Callable[[], Awaitable[None]]) -> None:
    async def go_on() -> None:
        await operation()
        await trio.sleep(3)

    if not race.branches.cuts:
        try:
            await go_on()
        except Exception:
            if not race.branches.cuts:
                raise
    if race.branches.cuts:
        await _disturbed(play, race, trio.lowlevel.checkpoint)
        race.branches.end()


async def _forest(host: World, branches: Branches, length: int, only: str) -> None:
    async with trio.open_nursery() as nursery:
        with sockets_in_memory(host.server, nursery):
            configure(host)
            race = Race(host, branches, nursery)
            lives = RacingLives(host, race)
            nursery.start_soon(lives.run)
            await host.until(lambda: lives.daemon is not None)
            await lives.settled()
            await _grow(Play(host, lives), race, length, only)
            await lives.stop()
            nursery.cancel_scope.cancel()


async def _tree(arch: Arch, branches: Branches, length: int, only: str) -> None:
    async with world(arch) as host:
        try:
            await _forest(host, branches, length, only)
        except BaseException as error:
            if branches.path:  # a child must not clear away what is its parent's
                branches.end(host.escaped or error)
            raise


def main() -> int:
    """Race for a while; return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="races", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="of the places there are")
    parser.add_argument("--only", default="", metavar="PATH")
    parser.add_argument("--arch", choices=[arch.value for arch in Arch])
    options = parser.parse_args()
    arches = [Arch(options.arch)] if options.arch else list(Arch)
    began, totals = time.monotonic(), dict.fromkeys(Tally.NAMES, 0)
    for place, arch in enumerate(arches):
        left = (began + options.seconds - time.monotonic()) / (len(arches) - place)
        rng = random.Random(f"{options.seed} {arch}")
        branches = Branches(rng, time.monotonic() + left, (options.share,))
        trio.run(
            _tree, arch, branches, options.length, options.only,
            clock=MockClock(autojump_threshold=0),
        )  # fmt: skip
        for name in totals:
            totals[name] += branches.tally[name]
    print(
        f"{totals['sequences']} sequences, {totals['disturbed']} races, "
        f"{totals['failures']} failures in {time.monotonic() - began:.0f} s"
    )
    return 1 if totals["failures"] or not totals["disturbed"] else 0


if __name__ == "__main__":
    sys.exit(main())
