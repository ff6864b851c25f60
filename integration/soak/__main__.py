# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boots once and plays rounds of guests and regions that come and go: `make soak`.

    python3 -m integration.soak --arch arm64 --seconds 7200 [--seed N] [--first N] [--rounds N]

In the first half of the time the daemon is also restarted, and killed; in the second it stays, so
that what it takes more and more of is seen.  A round depends on the seed and its number alone: one
that failed is played again by `--seed`, `--first` and `--rounds 1`, and `--calm` if it says so.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from integration.arch import ARCHES
from integration.dom0 import Dom0Error
from integration.soak.churn import Churn, told
from integration.soak.rests import COUNTS, Rest, growth, longest_life, risen
from integration.soak.watched import WatchedHost, booted

OPERATIONS: Final = 30
"""In a round."""
KEPT_PAGES: Final = 4
"""What Xen may keep for itself of hundreds of domains; one that leaks costs thirty."""
STEADY_S: Final = 12.0
"""For so long the counts must be as at the start: trio keeps an idle thread for 10 s."""
XEN_ARGS: Final = {"arm64": ("xsm=dummy",), "x86_64": ()}
"""With SILO, Debian's default on Arm, there are no grants from a holder."""


class Soak:
    """All rounds of one boot.

    Args:
        host: the machine.
        seed: what they depend on.
    """

    def __init__(self, host: WatchedHost, seed: int) -> None:
        self._host, self._seed = host, seed
        self._played: list[str] = []
        with self._told(0, calm=False):
            self._play(0, calm=False)  # what Xen and dom0 allocate once is there after it
        host.wait_state_still()
        self._wanted = host.state()
        self._doctor = self._diagnosis()
        self._counts: dict[str, int] | None = None
        self._began = time.monotonic()
        self.rests: list[Rest] = []
        self.done = 0
        self.refused = 0

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._began

    def round(self, number: int, *, calm: bool) -> None:
        """Play a round and look at what is left of it.

        Raises:
            AssertionError: something is not as it must be; its notes say how to see it again.
        """
        began = self.seconds
        with self._told(number, calm):
            churn = self._play(number, calm=calm)
            rest = self._rest()
        self.done += churn.done
        self.refused += churn.refused
        self.rests.append(rest)
        words = f"{churn.done} operations, {churn.refused} refused, {self.seconds - began:.0f} s"
        print(f"round {number}{' (calm)' * calm}: {words}; {rest}", flush=True)

    @contextmanager
    def _told(self, number: int, calm: bool) -> Iterator[None]:
        """Add to a failure what had been played, and how it is played again."""
        try:
            yield
        except (AssertionError, Dom0Error) as problem:
            again = f"--seed {self._seed} --first {number} --rounds 1" + " --calm" * calm
            problem.add_note(f"to play it again: {again}\nplayed:\n{told(self._played)}")
            raise

    def _play(self, number: int, *, calm: bool) -> Churn:
        host, mark, life, heard = self._host, self._host.mark, self._host.life, self._host.heard
        self._played = []
        rng = random.Random(f"{self._seed}/{number}")
        churn = Churn(host, rng, None if calm else host.start_next, self._played.append)
        for _ in range(OPERATIONS):
            churn.operate()
        churn.finish()
        errors = _errors(host.log(mark), churn.expected_errors)
        assert not errors, "\n".join(["the daemon says errors:", *errors])
        assert host.life != life or host.heard > heard, "the listener heard nothing"
        return churn

    def _rest(self) -> Rest:
        host = self._host
        difference = host.wait_state(self._wanted, kept_pages=KEPT_PAGES)
        assert not difference, f"the machine is not as it was:\n{difference}"
        assert self._diagnosis() == self._doctor, "xshmctl doctor finds something else"
        held = self._steady()
        lacking = self._wanted.free_pages - host.ask("free_pages")
        return Rest(self.seconds, host.life, lacking, held)

    def _steady(self) -> dict[str, int]:
        """What the daemon holds as soon as what can be counted has settled, as at the start."""
        seen: list[tuple[float, dict[str, int], dict[str, int]]] = []

        def settled() -> dict[str, int] | None:
            held = self._host.held()
            counts = {name: held[name] for name in COUNTS}
            seen.append((time.monotonic(), counts, held))
            now = seen[-1][0]
            lately = [one for at, one, _ in seen if now - at <= STEADY_S]
            is_steady = now - seen[0][0] > STEADY_S and all(one == counts for one in lately)
            return held if is_steady and counts == (self._counts or counts) else None

        try:
            held = self._host.wait(settled, "")
        except AssertionError:
            raise AssertionError(f"it held {self._counts}, and now {seen[-1][1]}") from None
        self._counts = {name: held[name] for name in COUNTS}
        return held

    def _diagnosis(self) -> str:
        """What xshmctl doctor says, but for figures that change as free memory does."""
        return re.sub(r"\d+", "N", self._host.xshmctl("doctor", check=False).text)

    def summary(self) -> tuple[str, list[str]]:
        """The last line, and what has grown by more than it may."""
        measured = longest_life(self.rests)
        grown = growth(measured)
        first, last = self.rests[0], self.rests[-1]
        parts = [f"{max(rest.lacking_pages for rest in self.rests)} pages, 0 nodes"]
        for name, unit, size in (("rss_kib", "RSS", 1024), ("pss_kib", "PSS", 1024)):
            if name in grown:
                an_hour = grown[name].an_hour / size
                parts.append(f"{unit} {an_hour:+.2f} MiB/h ({24 * an_hour:+.1f} a day)")
        if "objects" in grown:
            parts.append(f"objects {grown['objects'].an_hour:+.0f}/h")
        parts += [
            f"{word} {last.held[name] - first.held[name]:+d}"
            for name, word in (("descriptors", "fds"), ("tasks", "tasks"), ("threads", "threads"))
        ]
        what = f"{self.seconds:.0f} s, {self.done} operations ({self.refused} refused)"
        whose = f"{self._host.life} daemons, the last at {len(measured)} rests"
        text = f"{what}, {len(self.rests)} rests, {whose}: {', '.join(parts)}"
        return text, risen(grown)


def _errors(log: str, expected: list[str]) -> list[str]:
    """What a daemon has said at the level of an error or above, and was not to say."""
    lines = re.findall(r"^<[0-3]>(.*)$|^(Traceback .*)$", log, re.MULTILINE)
    texts = ("".join(pair) for pair in lines)
    return [text for text in texts if not any(text.startswith(start) for start in expected)]


def main() -> int:
    """Boot and play."""
    parser = argparse.ArgumentParser(prog="python3 -m integration.soak", description=__doc__)
    parser.add_argument("--arch", choices=tuple(ARCHES), default="arm64")
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="number of the first round")
    parser.add_argument("--rounds", type=int, help="how many (default: as many as there is time)")
    parser.add_argument("--calm", action="store_true", help="never restart the daemon")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    limit_s = options.seconds + 3600
    with booted(options.arch, "soak", limit_s, xen_args=XEN_ARGS[options.arch]) as host:
        return _play(host, options)


def _play(host: WatchedHost, options: argparse.Namespace) -> int:
    """Play the rounds; the exit status."""
    number = 0
    last = None if options.rounds is None else options.first + options.rounds
    try:
        soak, number = Soak(host, options.seed), options.first
        while soak.seconds < options.seconds and number != last:
            soak.round(number, calm=options.calm or soak.seconds > options.seconds / 2)
            number += 1
    except (AssertionError, Dom0Error) as problem:
        print(f"FAILED, round {number}: {problem}", flush=True)
        print(*getattr(problem, "__notes__", ()), sep="\n", flush=True)
        return 1
    text, grown = soak.summary()
    print(*grown, text, sep="\n", flush=True)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
