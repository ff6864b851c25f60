#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""For how long a sealed group stands still when a guest joins it, next to copying that much memory.

windows_in_dom0.py PAIRS
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xshmd.keeper.wire import SOCKET
from xshmd.varlink.client import Client
from xshmd.xen.hypervisor import XenHypervisor

if TYPE_CHECKING:
    from integration.bench import in_dom0 as bench
else:  # beside this file, in dom0
    sys.path.insert(0, str(Path(__file__).parent))
    import in_dom0 as bench

SIZES_MIB: Final = (1, 16, 256)
GROUPS: Final = (2, 4)
FEW: Final = 3
"""Windows of the largest region: they take seconds each under emulation."""
CEILING_S: Final = 600
POLICY: Final = Path("/etc/xshmd/xshmd.toml")


@contextlib.contextmanager
def keeper() -> Iterator[None]:
    """Have the daemon's keeper run."""
    with subprocess.Popen(["xshmd-keeper"]) as process:
        bench.wait(SOCKET.exists, "the keeper listens")
        yield
        process.kill()


def copying(size_bytes: int) -> float:
    """How long memcpy() takes for as much of dom0's own memory, in seconds."""
    with mmap.mmap(-1, size_bytes) as one, mmap.mmap(-1, size_bytes) as other:
        places = [ctypes.c_char.from_buffer(each) for each in (one, other)]
        target, source = (ctypes.addressof(place) for place in places)
        ctypes.memmove(target, source, size_bytes)  # so that all of it is there
        began = time.perf_counter()
        ctypes.memmove(target, source, size_bytes)
        seconds = time.perf_counter() - began
        del places
    return seconds


def pause_s(client: Client, change: dict[str, Any]) -> float:
    """Make a change to who has the region; for how long the group stood still for it."""
    client.call("Apply", changes=[change], dryRun=False)
    shown = client.call("ShowRegion", id="sealed")["region"]
    return int(shown["pauseMicroseconds"]) / 1e6


def measure_group(guests: bench.Guests, size_mib: int, nr_guests: int, pairs: int) -> bench.Series:
    """Let the last guest of a group join it and leave it, again and again."""
    size_bytes, series = size_mib * bench.MIB, bench.Series()
    owner = f"{bench.entry('sealed', 'owner', size_bytes)}, isolation=sealed"
    names = [f"w{number}" for number in range(nr_guests)]
    borrower = bench.entry("sealed", "borrower", size_bytes)
    entries = [(owner,), *[(borrower,)] * (nr_guests - 2), ()]
    for name, own in zip(names, entries, strict=True):
        guests.create(bench.config(name, *own))
    begin = (bench.SMALL_AT if size_mib <= 64 else bench.GUEST_AT)[bench.ARCH] >> 12
    part = {"region": "sealed", "firstFrame": begin, "frameCount": size_bytes >> 12}
    join = {"attach": {"guest": names[-1], "entry": part}}
    leave = {"detach": {"guest": names[-1], "region": "sealed"}}
    with Client(timeout_s=CEILING_S) as client:
        for turn in range(pairs + 1):
            figures = {"copy": copying(size_bytes), "join": pause_s(client, join)}
            figures["leave"] = pause_s(client, leave)
            if turn:
                series.add(figures)
            bench.note(f"windows {size_mib} MiB, {nr_guests} guests, {turn}/{pairs}: {figures}")
    for left, name in reversed(list(enumerate(names))):
        subprocess.run(["xl", "destroy", name], check=True)
        bench.note(f"{left} guests are left")
    bench.wait(lambda: guests.domains() == 1, "all guests are gone")
    for path in Path("/etc/xen").glob("*.cfg"):
        path.unlink()
    return series


def measure(pairs: int) -> dict[str, Any]:
    """All groups."""
    result: dict[str, Any] = {}
    POLICY.parent.mkdir(parents=True, exist_ok=True)
    POLICY.write_text(f'[limits]\npause = "{CEILING_S} s"\n')
    with keeper(), XenHypervisor() as xen, bench.Daemon():
        for nr_guests in GROUPS:
            for size_mib in SIZES_MIB:
                few = min(pairs, FEW) if size_mib > 16 else pairs
                series = measure_group(bench.Guests(xen), size_mib, nr_guests, few)
                result[f"{size_mib} {nr_guests}"] = series.columns
    POLICY.unlink()
    return result


if __name__ == "__main__":
    with bench.console_of_xl_quiet():
        found = measure(int(sys.argv[1]))
    print(json.dumps(found))
