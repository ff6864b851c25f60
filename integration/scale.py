# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many tiny guests on real Xen, and how costs go with their number: `make scale-on-xen`.

    python3 -m integration.scale --arch arm64 [--guests 100] [--group N]

Calls of Xen and messages to xenstored are counted inside the daemon, as tests/scale.py counts them
on the model: exact, and the same on a machine of any speed.  At the end all are destroyed, and the
machine must be as it was.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from integration.arch import ARCHES
from integration.scenarios.guest import FILLED, PAGE, Entry, Guest, filled
from integration.soak.watched import WatchedHost, booted

SIZE: Final = 4 * PAGE
MEMORY_MIB: Final = 4
"""Of a guest."""
SPARE_PAGES: Final = 8192
"""Free memory of the host below which no further guest is made: each takes a third of it."""
MAY_GO_AS: Final = {"k-th guest": 0.05, "recovery of k guests": 1.05}
"""Exponents that are good enough."""
SKIPPED: Final = 1 / 20
"""Share of the first guests that is left out: what is done once is in what they cost."""
KEPT_PAGES_A_GUEST: Final = 0.1
"""What Xen may keep for itself, as in the soak: one that leaks costs thirty."""
COUNTS: Final = ("calls", "messages")


@dataclass(frozen=True)
class Cost:
    """What something took, of the k-th of its kind or of k things."""

    k: int
    calls: int
    messages: int


class Crowd:
    """Guests that come one after the other.

    Args:
        host: where.
        group: how many guests have one region together.
    """

    def __init__(self, host: WatchedHost, group: int) -> None:
        self._host, self._group = host, group
        self.guests: list[Guest] = []
        self.regions: list[str] = []

    def join(self) -> Cost:
        """Let the next guest come; return what that cost."""
        host, number = self._host, len(self.guests)
        is_owner = number % self._group == 0
        if is_owner:
            self.regions.append(host.unique("r"))
        region = self.regions[-1]
        entry = Entry(region, host.at, SIZE, "owner" if is_owner else "borrower")
        guest = host.guest(
            "g", entry, do="fill,stay" if is_owner else "stay", memory_mib=MEMORY_MIB
        )
        before = self._settled()
        host.create(guest)
        self.guests.append(guest)
        if is_owner:
            host.wait(lambda: host.peek(region, 0, FILLED) == filled(guest.seed), "it has filled")
        after = self._settled()
        return Cost(number + 1, *(after[name] - before[name] for name in COUNTS))

    def restart(self) -> Cost:
        """Start the daemon anew; return what its recovery cost."""
        self._host.stop_daemon()
        self._host.start_next()
        held = self._settled()
        assert len(self._host.guests()) == len(self.guests)
        return Cost(len(self.guests), *(held[name] for name in COUNTS))

    def _settled(self) -> dict[str, int]:
        """What the daemon holds as soon as it asks for nothing any more."""
        last: dict[str, int] = {}

        def still() -> bool:
            nonlocal last
            earlier, last = last, self._host.held()
            return bool(earlier) and all(earlier[name] == last[name] for name in COUNTS)

        self._host.wait(still, "the daemon is idle")
        return last

    def leave(self) -> None:
        """End all of them."""
        self._host.destroy(*self.guests)
        self._host.clean_up()
        self._host.wait(lambda: not self._host.regions(), "the regions are gone")


def said(what: str, costs: Sequence[Cost]) -> tuple[list[str], bool]:
    """What it costs, a line a figure, and whether that goes with the number as it may."""
    lines, well = [], True
    ks = [one.k for one in costs]
    for name in COUNTS:
        figures = [getattr(one, name) for one in costs]
        power = exponent(ks, figures)
        well = well and power <= MAY_GO_AS[what]
        lines.append(
            f"{what}: {name} from {figures[0]} (k={ks[0]}) to {figures[-1]} (k={ks[-1]}), "
            f"as k to the power of {power:.3f}"
        )
    return lines, well


def exponent(ks: Sequence[float], figures: Sequence[float]) -> float:
    """The k by which figures go as a power: 0 for what is flat, 1 for what is linear."""
    logs = [math.log(k) for k in ks], [math.log(figure) for figure in figures]
    return float(statistics.linear_regression(*logs).slope)


def play(host: WatchedHost, guests: int, group: int) -> bool:
    """Let guests come, restart now and then, and end them all; whether all was as it must be."""
    wanted, began = host.state(), time.monotonic()
    crowd = Crowd(host, group)
    joins: list[Cost] = []
    recoveries: list[Cost] = []
    sizes = {guests // 8, guests // 4, guests // 2}
    while len(joins) < guests and host.ask("free_pages") > SPARE_PAGES:
        joins.append(crowd.join())
        if len(joins) in sizes:
            recoveries.append(crowd.restart())
    recoveries.append(crowd.restart())
    crowd.leave()
    kept_pages = math.ceil(len(joins) * KEPT_PAGES_A_GUEST)
    difference = host.wait_state(wanted, kept_pages=kept_pages)
    lacking = wanted.free_pages - host.ask("free_pages")
    joined, flat = said("k-th guest", joins[int(len(joins) * SKIPPED) :])
    recovered, linear = said("recovery of k guests", recoveries)
    print(*joined, *recovered, difference, sep="\n")
    each = "each with a region" if group == 1 else f"{group} to a region"
    seconds = time.monotonic() - began
    print(f"{len(joins)} guests, {each}: {lacking} pages lacking at the end, {seconds:.0f} s")
    sys.stdout.flush()
    return flat and linear and not difference


def main() -> int:
    """Boot and count."""
    parser = argparse.ArgumentParser(prog="python3 -m integration.scale", description=__doc__)
    parser.add_argument("--arch", choices=tuple(ARCHES), default="arm64")
    parser.add_argument("--guests", type=int, default=100)
    parser.add_argument(
        "--group", type=int, action="append", help="guests that share a region (default: 1, all)"
    )
    parser.add_argument("--seconds", type=float, default=7200, help="at the most")
    options = parser.parse_args()
    with booted(options.arch, "scale", options.seconds) as host:
        groups = options.group or [1, options.guests]
        well = [play(host, options.guests, group) for group in groups]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
