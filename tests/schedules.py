# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make schedules``: several people and guests at once, in an order that a number stands for.

The number decides who does what, when, in which order trio runs what is ready, and whether the
daemon is stopped in the middle.  A run that fails is played again by its number:
``python3 -m schedules --first NUMBER --count 1 --trace`` in ``tests``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial

import trio
from crash import Lives, is_power_cut
from determinism import Steps, run
from fakes.toolstack import Made, XlFailed
from fakes.world import World, world

from xshmd.changes import AddRegion, AttachRegion, Change, DetachRegion, RemoveRegion
from xshmd.engine.reconciler import Reconciler
from xshmd.errors import (
    ConfigError,
    Conflict,
    NoSuchGuest,
    NoSuchRegion,
    Refused,
    StoreLost,
    XshmError,
)
from xshmd.machine import SHUTDOWN_CRASH, Arch
from xshmd.model import RegionConfig

TASKS = "Daemon.run"
LONGEST_PAUSE_S = 3.0
EXPECTED = (ConfigError, Conflict, NoSuchGuest, NoSuchRegion, Refused, StoreLost)
"""What may be answered to somebody who was overtaken by another."""


class Cast:
    """Everybody who does something."""

    def __init__(self, host: World, running: Lives, chance: random.Random) -> None:
        self._host, self._running, self._chance = host, running, chance
        self._guests: dict[str, Made] = {}
        self.told: list[str] = []
        """What happened, in order."""

    async def play(self) -> None:
        """Play until everybody is through."""
        parts: list[Callable[[], Awaitable[None]]] = [
            lambda: self._life("a", "r", "s"),
            lambda: self._life("b", "r"),
            lambda: self._life("c", "s"),
            self._admin,
            self._admin,
            self._reader,
            self._listener,
        ]
        async with trio.open_nursery() as nursery:
            for part in parts:
                nursery.start_soon(part)
        await self._running.settled()

    def _say(self, text: str) -> None:
        self.told.append(f"{trio.current_time():.3f} {text}")

    async def _pause(self) -> None:
        await trio.sleep(self._chance.uniform(0, LONGEST_PAUSE_S))

    # -- guests -----------------------------------------------------------------------------------

    async def _life(self, name: str, *regions: str) -> None:
        """A guest is made and ends, in one way or another, some times over."""
        host = self._host
        wanted = [host.borrow(one, 3, at=16 * at) for at, one in enumerate(regions)]
        config = host.config(name, *wanted)
        for _ in range(self._chance.randint(1, 3)):
            await self._pause()
            try:
                made = await host.tools.create(config)
            except XlFailed as failed:
                self._say(f"{name} failed: {failed}")
                continue
            self._say(f"{name} made as {made.domid}")
            self._guests[name] = made
            await self._pause()
            how = self._chance.choice((host.tools.destroy, host.tools.end, self._crash))
            del self._guests[name]
            await how(made)
            self._say(f"{name} gone")

    async def _crash(self, made: Made) -> None:
        self._host.tools.shut_down(made, SHUTDOWN_CRASH)
        await self._pause()
        await self._host.tools.destroy(made)

    # -- people -----------------------------------------------------------------------------------

    async def _ask(self, what: str, question: Callable[[Reconciler], Awaitable[object]]) -> None:
        """Ask the daemon, and leave before the answer now and then."""
        await self._pause()
        daemon = self._running.daemon
        if daemon is None or not daemon.ready.is_set() or daemon.ended.is_set():
            return
        patience_s = self._chance.choice((0.0, 0.01, 1.0, 30.0, 30.0))
        with trio.move_on_after(patience_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._leave_with, daemon.ended, nursery.cancel_scope)
                try:
                    await question(daemon.engine)
                    self._say(f"{what}: done")
                except EXPECTED as refusal:
                    self._say(f"{what}: {refusal.message}")
                except XshmError as error:
                    if not daemon.ended.is_set():
                        raise
                    self._say(f"{what}: {error.message}")
                nursery.cancel_scope.cancel()

    @staticmethod
    async def _leave_with(ended: trio.Event, scope: trio.CancelScope) -> None:
        await ended.wait()
        scope.cancel()

    async def _admin(self) -> None:
        for _ in range(self._chance.randint(2, 5)):
            changes = [self._change() for _ in range(self._chance.choice((1, 1, 2)))]
            dry_run = self._chance.random() < 0.1
            what = " and ".join(type(change).__name__ for change in changes)
            await self._ask(what, partial(Reconciler.apply, changes=changes, dry_run=dry_run))

    def _change(self) -> Change:
        guest = self._chance.choice("abc")
        match self._chance.randrange(4):
            case 0:
                return AddRegion(config=RegionConfig(region_id="n", nr_frames=4))
            case 1:
                return RemoveRegion(region_id="n", force=self._chance.random() < 0.7)
            case 2:
                return AttachRegion(guest=guest, request=self._host.borrow("n", 4, at=64))
            case _:
                return DetachRegion(guest=guest, region_id="n")

    async def _reader(self) -> None:
        for _ in range(3):
            region = self._chance.choice("rsn")
            reading = partial(Reconciler.read_region, region_id=region, offset_bytes=0, nr_bytes=99)
            await self._ask(f"read {region}", reading)
        await self._ask("reload", Reconciler.reload)

    async def _listener(self) -> None:
        async def listen(engine: Reconciler) -> None:
            async with engine.monitor() as events:
                for _ in range(self._chance.randint(0, 20)):
                    await events.receive()

        for _ in range(2):
            with contextlib.suppress(trio.EndOfChannel):
                await self._ask("listen", listen)

    async def end(self) -> None:
        """End everything there is."""
        for name in tuple(self._guests):
            await self._host.tools.destroy(self._guests.pop(name))
        daemon = await self._running.settled()
        with contextlib.suppress(NoSuchRegion):
            await daemon.engine.apply([RemoveRegion(region_id="n", force=True)])
        for region_id in "rs":
            with contextlib.suppress(NoSuchRegion):
                await daemon.engine.apply([RemoveRegion(region_id=region_id, force=True)])


def play(number: int) -> list[str]:
    """Play the schedule that a number stands for; return what happened.

    Raises:
        Exception: an invariant does not hold, or somebody got an answer that cannot be.
    """
    chance = random.Random(number)
    arch = chance.choice(list(Arch))
    stop_at = chance.randrange(1, 1500) if chance.random() < 0.5 else 0
    told: list[str] = []
    lives: list[Lives] = []

    def stop() -> None:
        if lives and lives[0].daemon is not None:
            told.append("the daemon is stopped")
            lives[0].daemon.scope.cancel()

    steps = Steps(TASKS, stop_at, stop)

    async def main() -> None:
        async with world(arch) as host, trio.open_nursery() as nursery:
            host.finder.defined = [RegionConfig(region_id=one, nr_frames=3) for one in "rs"]
            host.tolerate = is_power_cut
            lives.append(Lives(host, (), {}))
            nursery.start_soon(lives[0].run)
            await lives[0].settled()
            cast = Cast(host, lives[0], chance)
            cast.told = told
            await cast.play()
            steps.counting = False
            await cast.end()
            await host.check_clean()
            await lives[0].stop()
            nursery.cancel_scope.cancel()

    run(main, number, [steps])
    return told


def trace(number: int) -> str:
    """Return what stands for all that happened in a run: the same number gives the same."""
    return hashlib.sha256("\n".join(play(number)).encode()).hexdigest()


def main() -> int:
    """Play schedules; return how many failed."""
    parser = argparse.ArgumentParser(prog="schedules", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first number")
    parser.add_argument("--count", type=int, default=1000, help="how many numbers")
    parser.add_argument("--trace", action="store_true", help="say what happens")
    options = parser.parse_args()
    failed = []
    began = time.monotonic()
    for number in range(options.first, options.first + options.count):
        try:
            told = play(number)
        except Exception:
            failed.append(number)
            print(f"schedule {number} failed:\n{traceback.format_exc()}", flush=True)
        else:
            if options.trace:
                print("\n".join(told))
        played = number - options.first + 1
        if played % 1000 == 0:
            seconds = time.monotonic() - began
            print(f"{played} schedules, {len(failed)} failed, {seconds:.0f} s", flush=True)
    print(f"{options.count} schedules from {options.first} on, failed: {failed or 'none'}")
    return min(len(failed), 100)


if __name__ == "__main__":
    sys.exit(main())
