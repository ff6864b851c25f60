# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGTERM at every step of every task, and clients that leave at any: cancels, and looks after.

Other than at a power cut, what unwinds still does things: takes back pauses, closes maps, records.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from crash import Lives, Scenario, is_power_cut
from determinism import Steps, run
from fakes.world import World, world

from xshmd.errors import XshmError
from xshmd.machine import Arch

DAEMON = "Daemon.run"


class _Stop:
    """Ends the daemon's life, once."""

    def __init__(self) -> None:
        self.lives: Lives | None = None
        self.done = False

    def __call__(self) -> None:
        # trio switches an instrument off that raises: nothing here may go wrong unseen.
        if self.lives is not None and self.lives.daemon is not None:
            self.lives.daemon.scope.cancel()
            self.done = True


@asynccontextmanager
async def _lives(host: World, stop: _Stop) -> AsyncIterator[Lives]:
    host.tolerate = is_power_cut
    stop.lives = running = Lives(host, (), {})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        await host.until(lambda: running.daemon is not None)
        yield running
        await running.stop()


def play(scenario: Scenario, at: int = 0, *, arch: Arch = Arch.X86_64) -> int:
    """Play a scenario, the daemon told to stop before its ``at``-th step, and started again.

    Returns:
        How many steps the daemon made until all was done.

    Raises:
        AssertionError: something was lost.
    """
    stop = _Stop()
    steps = Steps(DAEMON, at, stop)

    async def main() -> None:
        async with world(arch) as host, _lives(host, stop) as running:
            await scenario(host, running)
            await running.settled()
            steps.counting = False
            await host.check_clean()

    run(main, instruments=[steps])
    assert stop.done == bool(at), "it was not stopped"
    return steps.count


def sweep(scenario: Scenario, step: int, *, arch: Arch = Arch.X86_64) -> tuple[int, list[str]]:
    """Play a scenario once for every ``step``-th step; return how often, and what failed."""
    failed = []
    places = range(1, play(scenario, arch=arch) + 1, step)
    for at in places:
        try:
            play(scenario, at, arch=arch)
        except Exception as error:
            failed.append(f"stopped before step {at}: {error!r}")
    return len(places), failed


Request = Callable[[World, Lives], Awaitable[object]]


def leave(
    request: Request,
    prepare: Callable[[World], Awaitable[object]],
    after: Callable[[World, Lives], Awaitable[None]],
    at: int = 0,
) -> int:
    """Have a client ask for something and leave before the daemon's ``at``-th step after that.

    Args:
        request: What is asked for; an answer of xshmd is as good as a result.
        prepare: What comes before.
        after: Looks at what came of it, and clears up.
        at: When the client leaves; 0: never.

    Returns:
        How many steps of the daemon it took.
    """
    scope = trio.CancelScope()
    steps = Steps(DAEMON, at, scope.cancel)
    steps.counting = False

    async def main() -> None:
        stop = _Stop()
        async with world() as host, _lives(host, stop) as running:
            await running.settled()
            await prepare(host)
            steps.counting = True
            with scope, contextlib.suppress(XshmError):
                await request(host, running)
            steps.counting = False
            life = await running.settled()
            await life.engine.ping()  # what it was at is over
            assert len(running.seen) == 1, "a client that leaves ends the daemon"
            await after(host, running)
            await host.check_clean()

    run(main, instruments=[steps])
    return steps.count
