# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest costs does not depend on how many there are, nor is anything looked at squared."""

from __future__ import annotations

from statistics import median

from determinism import run
from fakes.world import world
from scale import Cost, Crowd

from xshmd.machine import Arch

FEW, MANY = 8, 24


def _costs(group: int) -> tuple[list[Cost], list[Cost]]:
    """Return what each guest cost, and a restart after few and after many: by a seed, for how often
    a guest is looked at before it has settled is the scheduler's to say."""
    joins: list[Cost] = []
    restarts: list[Cost] = []

    async def main() -> None:
        async with world(Arch.ARM64) as host:
            crowd = Crowd(host, await host.start(), group)
            for number in range(1, MANY + 1):
                joins.append(await crowd.join())
                if number in (FEW, MANY):
                    restarts.append(await crowd.restart())

    run(main)
    return joins, restarts


def test_the_last_guest_costs_no_more_than_the_first() -> None:
    """Each with a region, and so a holder, of its own."""
    joins, restarts = _costs(1)
    _no_dearer(joins[FEW:], joins[:FEW])
    # Its own code looks at every guest a few times: 115 to 121 steps, as the tasks take turns; at
    # every pair it would be 300 for each more.
    a_guest_more = (joins[MANY - 1].steps - joins[FEW].steps) / (MANY - 1 - FEW)
    assert a_guest_more < 150
    few, many = restarts
    assert many.messages <= few.messages * MANY / FEW
    assert many.calls <= few.calls * MANY / FEW


def test_the_last_guest_of_one_region() -> None:
    joins, _ = _costs(MANY)
    _no_dearer(joins[FEW:], joins[1:FEW])


def _no_dearer(later: list[Cost], earlier: list[Cost]) -> None:
    """How many times a guest is looked at until it has settled depends on what else goes on, so
    single ones differ by a few; what grows with each guest shows in the middle ones."""
    assert median(one.calls for one in later) <= 1.1 * median(one.calls for one in earlier)
    assert median(one.messages for one in later) <= 1.1 * median(one.messages for one in earlier)
