#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What passing a ring on costs, measured in dom0 next to a C program that does only that.

    bells_in_dom0.py PAIRS
    bells_in_dom0.py relay PORT PORT

One process rings at a port of its own and waits for another; what rings there is the relay.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from xshmd.units import DOMID_0
from xshmd.xen.event_channels import XenEventChannels

if TYPE_CHECKING:
    from integration.bench.in_dom0 import HERE, Series, note, turned
else:  # beside this file, in dom0
    sys.path.insert(0, str(Path(__file__).parent))
    from in_dom0 import HERE, Series, note, turned

ROUNDS: Final = 2000
LOOP: Final = str(HERE / "bell_loop")


async def relay(one: int, other: int) -> None:
    """What the daemon does with two ports, for ever."""
    with XenEventChannels() as channels:
        lines = channels.bind(DOMID_0, one), channels.bind(DOMID_0, other)
        channels.pass_on(lines[0], lines[1])
        channels.pass_on(lines[1], lines[0])
        print("ready", flush=True)
        await channels.run()


@contextlib.contextmanager
def relaying(name: str, ports: list[str]) -> Iterator[None]:
    """Have the daemon's relay, or the C program, between two ports."""
    words = [LOOP, "relay", "0", ports[0], "0", ports[1]]
    if name != "bare":
        words = [sys.executable, "-I", __file__, "relay", *ports]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.kill()


def measure(pairs: int) -> dict[str, Any]:
    """Ring there and wait for it here, by our relay and by the C program."""
    series = Series()
    words = [LOOP, "ping"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        _, *ports = process.stdout.readline().split()
        for turn in range(pairs + 1):  # the first is to warm up
            figures: dict[str, float] = {}
            for name in turned(("ours", "bare"), turn):
                with relaying(name, ports):
                    print(f"go {ROUNDS}", file=process.stdin, flush=True)
                    figures[name] = int(process.stdout.readline().split()[1]) / 1e9
            if turn:
                series.add(figures)
            note(f"bells {turn}/{pairs}: " + " ".join(f"{k}={v:.4f}" for k, v in figures.items()))
        process.stdin.close()
    return {"series": series.columns, "rounds": ROUNDS}


if __name__ == "__main__":
    if sys.argv[1] == "relay":
        trio.run(relay, int(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(measure(int(sys.argv[1]))))
