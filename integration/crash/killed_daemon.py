#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmd that ends, as by kill -9, before its n-th effect on Xen, xenstore, keeper or a lock file.

    XSHMD_KILL=FILE killed_daemon.py [xshmd's arguments]

Nothing is counted until FILE is there; it has the number of the effect, 0 for none.  Every effect
from then on is a line of FILE.log, written before it is done.  A call for many frames is two: there
is its first half, and the whole of it.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

HALVED = {
    "populate": (2, 1), "depopulate": (2, 1), "zero": (2, 1), "unmap": (2, 1),
    "map_foreign": (4, 1, 3), "write_grants": (2, 1, 3), "end_grants": (2, 1),
}  # fmt: skip
"""Hypercalls for many frames: which of their arguments is how many, and which are the first."""
WHOLE = (
    "create_holder_domain", "destroy", "pause", "unpause", "shut_down", "set_target",
    "set_max_pages", "set_paging_pool_bytes", "map_host_range", "unmap_host_range",
    "set_memory_map",
)  # fmt: skip
KEEPER = ("keep", "copy", "lend", "park", "write", "drop")
CHANNELS = ("allocate", "bind", "unbind", "notify", "pass_on")
MESSAGES = ("WRITE", "RM", "SET_PERMS", "TRANSACTION_END")
"""Those that change something, or may."""


class Fate:
    """Counts the effects, and ends the process at one of them."""

    def __init__(self, file: Path) -> None:
        self._file, self._log = file, file.with_name(file.name + ".log")
        self._number = -1
        self._count = 0
        self._lock = threading.Lock()

    def comes(self, what: str) -> None:
        """An effect is about to happen."""
        with self._lock:
            if self._number < 0:
                try:
                    self._number = int(self._file.read_text())
                except FileNotFoundError:
                    return
            self._count += 1
            with self._log.open("a") as log:
                log.write(f"{what}\n")
            if self._count == self._number:
                os.kill(os.getpid(), signal.SIGKILL)


def fateful(
    fate: Fate, name: str, function: Callable[..., Any], place: int = 0, *firsts: int
) -> Callable[..., Any]:
    """Return the function as one effect, or as two if it takes a number of frames."""

    @functools.wraps(function)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        fate.comes(name)
        if place and arguments[place] > 1:
            half = [*arguments]
            half[place] = arguments[place] // 2
            rest = [*arguments]
            rest[place] = arguments[place] - half[place]
            for moved in firsts:
                rest[moved] = arguments[moved] + half[place]
            first = function(self, *half, **options)
            fate.comes(f"{name} (second half)")
            second = function(self, *rest, **options)
            return None if first is None else first + second
        return function(self, *arguments, **options)

    return call


def instrument(fate: Fate) -> None:
    """Make fate of everything that the daemon does to the outside."""
    xen = importlib.import_module("xshmd.xen.hypervisor").XenHypervisor
    for name in (*HALVED, *WHOLE):
        setattr(xen, name, fateful(fate, name, getattr(xen, name), *HALVED.get(name, ())))
    locks = importlib.import_module("xshmd.xen.libxl_lock")
    keeper = importlib.import_module("xshmd.keeper.client").KeeperClient
    channels = importlib.import_module("xshmd.xen.event_channels").XenEventChannels
    for owner, name in (
        (locks.LibxlCreationLock, "try_hold"), (locks._Held, "release"),
        *((keeper, name) for name in KEEPER), *((channels, name) for name in CHANNELS),
    ):  # fmt: skip
        setattr(owner, name, fateful(fate, name, getattr(owner, name)))
    link: Any = importlib.import_module("xshmd.xen.store_link").Link
    enqueue = link.enqueue

    def counted(self: Any, reply: Any, payload: bytes, tx_id: int = 0) -> None:
        if reply.op.name in MESSAGES:
            fate.comes(f"{reply.op.name} {reply.path}")
        enqueue(self, reply, payload, tx_id)

    link.enqueue = counted


def main() -> int:
    """Run xshmd, with its fate."""
    instrument(Fate(Path(os.environ["XSHMD_KILL"])))
    daemon = importlib.import_module("xshmd.daemon.__main__")
    return int(daemon.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
