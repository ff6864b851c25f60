# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make scale``: many regions and guests on the model, and how costs go with their number.

Calls of Xen, messages to xenstored and steps of our own code (a function entered, or a generator
resumed) are counted: they are the same on every machine.  Run in ``tests``: ``python3 -m scale``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio
from fakes.toolstack import Made
from fakes.world import Daemon, World, world
from flat import exponent
from trio.testing import MockClock

import xshmd
from xshmd.changes import AddRegion
from xshmd.machine import Arch
from xshmd.model import GuestConfig, RegionConfig, RegionRequest
from xshmd.ports import Store

OURS = str(Path(xshmd.__file__).parent)
FRAMES = 2
IDLE_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What something took."""

    calls: int
    """Of Xen, by the daemon and by the fake xl: always as many."""
    messages: int
    steps: int
    """Of our own code."""


class Crowd:
    """Guests that come one after the other.

    Args:
        host: Where.
        daemon: Who serves them.
        group: How many guests have one region together.
    """

    def __init__(self, host: World, daemon: Daemon, group: int) -> None:
        self._host, self._group = host, group
        self.daemon = daemon
        self.guests: list[Made] = []

    def _request(self, number: int) -> RegionRequest:
        region = f"r{number // self._group}"
        if number % self._group == 0:
            return self._host.request(region, FRAMES)
        return self._host.borrow(region, FRAMES)

    async def join(self) -> Cost:
        """Let the next guest come; return what that cost."""
        number = len(self.guests)
        name = f"g{number}"
        config = GuestConfig(name=name, memory_mib=1, requests=(self._request(number),))
        self._host.finder.files[name] = config

        async def create() -> None:
            made = await self._host.tools.create(config)
            self.guests.append(made)
            await self._host.until(lambda: self._host.running(made))
            await trio.sleep(IDLE_S)

        return await cost(self._host, self.daemon.store, create)

    async def restart(self) -> Cost:
        """Start the daemon anew; return what its recovery cost."""
        await self.daemon.kill()
        calls = _calls(self._host)
        with counted_steps() as steps:
            self.daemon = await self._host.start()
        return Cost(_calls(self._host) - calls, self.daemon.store.messages_sent, len(steps))


def _calls(host: World) -> int:
    return sum(host.xen.counts.values())


async def cost(host: World, store: Store, action: Callable[[], Awaitable[None]]) -> Cost:
    """Return what an action of the daemon's costs."""
    calls, messages = _calls(host), store.messages_sent
    with counted_steps() as steps:
        await action()
    return Cost(_calls(host) - calls, store.messages_sent - messages, len(steps))


@contextmanager
def counted_steps() -> Iterator[list[None]]:
    """Have as many entries in a list as there were steps of our own code."""
    steps: list[None] = []

    def see(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            steps.append(None)

    sys.setprofile(see)
    try:
        yield steps
    finally:
        sys.setprofile(None)


def without_checks(host: World) -> None:
    """Leave out the model's checks, which look at every domain at every call."""
    host.xen._check_conservation = lambda: None  # type: ignore[method-assign]


def measure(regions: int, guests: int, group: int) -> None:
    """Print what the k-th region, the k-th guest and a recovery of k records cost."""

    async def main() -> None:
        async with world(Arch.ARM64, total_pages=1 << 22) as host:
            without_checks(host)
            crowd = Crowd(host, await host.start(), group)
            sizes, recoveries, joins = [], [], []
            for number in range(1, guests + 1):
                joins.append(await crowd.join())
                if number in (guests // 16, guests // 8, guests // 4, guests // 2, guests):
                    sizes.append(number)
                    recoveries.append(await crowd.restart())
            _say("k-th guest", list(range(1, guests + 1)), joins, skip=guests // 20)
            _say("recovery of k guests", sizes, recoveries)
            adds = []
            for number in range(regions - guests // group):
                change = AddRegion(config=RegionConfig(region_id=f"n{number}", nr_frames=1))

                async def add(change: AddRegion = change) -> None:
                    await crowd.daemon.engine.apply([change])

                adds.append(await cost(host, crowd.daemon.store, add))
            if adds:
                _say("k-th region", list(range(1, len(adds) + 1)), adds, skip=len(adds) // 20)
            host.ran.clear()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def _say(what: str, ks: list[int], costs: list[Cost], skip: int = 0) -> None:
    ks, costs = ks[skip:], costs[skip:]
    for name in ("calls", "messages", "steps"):
        figures = [float(getattr(one, name)) for one in costs]
        print(
            f"{what}: {name} from {figures[0]:.6g} (k={ks[0]}) to {figures[-1]:.6g} (k={ks[-1]}), "
            f"as k to the power of {exponent(ks, figures):.3f}",
            flush=True,
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="scale", description=__doc__)
    parser.add_argument("--regions", type=int, default=1000)
    parser.add_argument("--guests", type=int, default=500)
    parser.add_argument("--group", type=int, default=1, help="guests that share a region")
    options = parser.parse_args()
    measure(options.regions, options.guests, options.group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
