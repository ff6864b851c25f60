# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make soak-simulated``: weeks of guests coming and going, daemons restarted, a store that drops.

Simulated time costs nothing: the daemon does not wake up by itself.  Each simulated day is a sample
of what the process holds.  Run in ``tests``: ``python3 -m soak --days 30 [--seed N]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable

import structlog
import trio
from crash import Lives, lives
from fakes.world import World, world
from flat import slope
from operations import Play, configure
from trio.testing import MockClock

from xshmd.machine import Arch

DAY_S = 86400.0
EVERY_S = 1200.0
"""How long until something happens again, on average."""
CALM_S = 600.0
"""After which nothing is on its way any more."""
WARM_DAYS = 2
"""What is allocated once is, by then."""
MAY_RISE = {"objects": 20.0, "descriptors": 0.0, "tasks": 0.0, "nodes": 0.0, "free_pages": 0.0}
"""A day.  The interpreter's objects go up and down by some hundred."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """What the process holds at midnight, with no guest there."""

    objects: int
    descriptors: int
    tasks: int
    nodes: int
    """Of xenstore."""
    free_pages: int


def _forget_instruments(host: World) -> None:
    """The fakes' own logs grow as they are meant to."""
    host.xen.log.clear()
    host.server.log.clear()
    host.ran.clear()
    for processor in structlog.get_config()["processors"]:
        if isinstance(processor, structlog.testing.LogCapture):
            processor.entries.clear()


def _sample(host: World, running: Lives) -> Sample:
    _forget_instruments(host)
    del running.seen[:-1]
    gc.collect()
    return Sample(
        objects=len(gc.get_objects()),
        descriptors=len(os.listdir("/proc/self/fd")),
        tasks=trio.lowlevel.current_statistics().tasks_living,
        nodes=len(host.server.nodes),
        free_pages=host.xen.free_pages,
    )


class Churn:
    """Something happens every now and then, by the seed."""

    def __init__(self, host: World, running: Lives, seed: int) -> None:
        self._host, self._running, self._rng = host, running, random.Random(seed)
        self.done = 0
        self.lately: deque[str] = deque(maxlen=12)
        """What was done last, and what happened to the daemon before."""

    async def day(self) -> None:
        """Let a day pass, and have everything ended at its end."""
        play = Play(self._host, self._running)
        ends = trio.current_time() + DAY_S
        while True:
            await trio.sleep(self._rng.uniform(0, 2 * EVERY_S))
            if trio.current_time() > ends:
                break
            disturbance = await self._disturb()
            name, operation = self._rng.choice(list(play.operations()))
            self.lately.append(f"{disturbance}, {name}")
            await operation()
            await trio.sleep(5)
            await play.verify()
            self.done += 1
        await play.finish()
        await trio.sleep(CALM_S)

    async def _disturb(self) -> str:
        kind = self._rng.choice(("nothing", "nothing", "restart", "drop", "reload"))
        daemon = await self._running.settled()
        if kind == "restart":
            await daemon.kill()
            await self._running.settled()
        elif kind == "drop":
            self._host.server.drop()
        elif kind == "reload":
            await daemon.engine.reload()
        return kind


def soak(
    days: int,
    seed: int,
    *,
    arch: Arch = Arch.ARM64,
    say: Callable[[int, Sample], None] = lambda day, sample: None,
) -> tuple[list[Sample], int]:
    """Return a sample of every midnight, and how much has been done in all."""
    samples: list[Sample] = []

    async def main() -> int:
        async with world(arch) as host, lives(host) as running:
            configure(host)
            churn = Churn(host, running, seed)
            for day in range(1, days + 1):
                try:
                    await churn.day()
                except BaseException as error:
                    error.add_note(f"day {day}: {'; '.join(churn.lately)}")
                    raise
                samples.append(_sample(host, running))
                say(day, samples[-1])
            return churn.done

    done = trio.run(main, clock=MockClock(autojump_threshold=0))
    return samples, done


def growth(samples: list[Sample]) -> dict[str, float]:
    """Return by how much each figure rises a day, once all is warm."""
    warm = [dataclasses.asdict(sample) for sample in samples[WARM_DAYS:]]
    days = list(range(len(warm)))
    return {name: slope(days, [sample[name] for sample in warm]) for name in warm[0]}


def main() -> int:
    """Soak and report; return 1 if anything grows."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    samples, done = soak(
        options.days, options.seed, say=lambda day, sample: print(f"day {day}: {sample}")
    )
    grown = growth(samples)
    for name, a_day in grown.items():
        print(f"{name}: {a_day:+.3f} a day")
    print(f"{options.days} days, {done} operations in {time.monotonic() - began:.0f} s")
    return 1 if any(abs(a_day) > MAY_RISE[name] for name, a_day in grown.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
