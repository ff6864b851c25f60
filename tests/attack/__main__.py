# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make attack``: how long a good client waits while another has gone wrong, and what that costs.

The daemon's server runs in a process of its own, with a thousand regions and things happening all
the time; so does each attacker.  Before each attack another program keeps as busy, without a
connection: the good client's waits during both are compared.  Run in ``tests``:
``python3 -m attack [--seconds N] [ATTACKER...]``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio
from varlink_fakes import SNAPSHOT, FakeRegions, limits

from attack.attackers import ATTACKERS
from xshmd.daemon import logs, service
from xshmd.engine.events import EventHub
from xshmd.errors import XshmError
from xshmd.events import Event, EventKind
from xshmd.varlink.client import Client
from xshmd.varlink.server import open_listener, serve

MOST_TIMES: Final = 5.0
"""How many times as long as otherwise a client may wait, of a hundred calls the second longest."""
MOST_MIB: Final = 16.0
"""How much an attack may cost of the daemon's memory."""
REGIONS: Final = 1000
EVENTS_PER_S: Final = 200
TURN_S: Final = 0.5


class BusyRegions(FakeRegions):
    """Has many regions, about which there is something to tell all the time."""

    def __init__(self) -> None:
        super().__init__()
        (region,) = SNAPSHOT.regions
        many = tuple(dataclasses.replace(region, region_id=f"region-{at}") for at in range(REGIONS))
        self.now = dataclasses.replace(SNAPSHOT, regions=many)
        self.hub = EventHub()

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        async with self.hub.listen() as events:
            yield events

    async def live(self) -> None:
        while True:
            await trio.sleep(1 / EVENTS_PER_S)
            self.hub.emit(Event(kind=EventKind.RELOADED))


def _serve(path: Path) -> None:
    async def main() -> None:
        api = BusyRegions()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.live)
            await serve(open_listener(path, environ={}), service.dispatcher(api), limits=limits())

    logs.set_up("info")
    trio.run(main)


def _burn() -> None:
    while True:
        pass


@contextlib.contextmanager
def _running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "attack", *words], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _rss_mib(pid: int, kind: str) -> float:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Victim:
    """The good client: it asks on a connection it has, and on a new one each time."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._client = Client(self._path)
        self.failed = 0

    def ask(self, seconds: float, into: dict[str, list[float]]) -> None:
        """Ask for so long; note how long each call took."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            into["kept"].append(self._call(self._client))
            with Client(self._path) as fresh:
                into["new"].append(self._call(fresh))
            time.sleep(0.001)

    def _call(self, client: Client) -> float:
        began = time.perf_counter()
        try:
            client.call("Ping")
        except XshmError:
            self.failed += 1
        return time.perf_counter() - began


def _p99_ms(waits: list[float]) -> float:
    return sorted(waits)[len(waits) * 99 // 100] * 1e3


def _attacked(name: str, seconds: float, folder: Path) -> bool:
    path = folder / name
    with _running("--serve", str(path)) as daemon:
        while not path.is_socket():
            time.sleep(0.05)
        victim = Victim(path)
        victim.ask(1, {"kept": [], "new": []})
        before = _rss_mib(daemon.pid, "VmRSS")
        waits: list[dict[str, list[float]]] = [{"kept": [], "new": []} for _ in range(2)]
        for _ in range(max(1, int(seconds / TURN_S))):
            for words, into in (
                (("--burn",), waits[0]),
                (("--attacker", name, str(path)), waits[1]),
            ):
                with _running(*words):
                    time.sleep(0.3)  # until it is under way
                    victim.ask(TURN_S, into)
        grown = _rss_mib(daemon.pid, "VmHWM") - before
        alive = daemon.poll() is None
    good = alive and not victim.failed and grown <= MOST_MIB
    said = []
    for kind in ("kept", "new"):
        calm, rough = (_p99_ms(one[kind]) for one in waits)
        good = good and rough <= MOST_TIMES * calm
        said.append(f"{calm:7.2f} {rough:7.2f} {rough / calm:5.1f}")
    count = len(waits[1]["kept"])
    print(
        f"{name:26} {count:6} {said[0]}   {said[1]} {victim.failed:6} {grown:6.1f}"
        f"   {'' if good else 'TOO MUCH' if alive else 'DIED'}",
        flush=True,
    )
    return good


def main() -> int:
    """Attack in every way; return how many of them did too much."""
    parser = argparse.ArgumentParser(prog="attack", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="for each attack")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--burn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--attacker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("attackers", nargs="*", metavar="ATTACKER", help=", ".join(ATTACKERS))
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve)
    if options.burn:
        _burn()
    if options.attacker:
        name, path = options.attacker
        while True:
            with contextlib.suppress(OSError):
                ATTACKERS[name](path)
    print(f"load {os.getloadavg()[0]:.1f}; p99 of a call in ms: otherwise, attacked, times")
    print(
        f"{'':26} {'calls':>6} {'on one connection':>21}   {'each on a new one':>21} failed   +MiB"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = [
            _attacked(each, options.seconds, Path(folder))
            for each in options.attackers or ATTACKERS
        ]
    return done.count(False)


if __name__ == "__main__":
    sys.exit(main())
