#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmd that says what it holds and has asked for: from outside neither can be seen exactly.

    XSHMD_HELD=FILE watched_daemon.py [xshmd's arguments]

At SIGUSR1 it writes a JSON object into FILE, which is replaced as a whole.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = {"rss_kib": ("status", "VmRSS"), "pss_kib": ("smaps_rollup", "Pss")}
"""Which line of which file below /proc/self has a figure."""


class Tally:
    """How often Xen and xenstored were asked for something, since the daemon's start."""

    def __init__(self) -> None:
        self._counter = Counter(calls=0, messages=0)
        self._lock = threading.Lock()  # Xen is asked on a thread of its own

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, each run of which is one of these."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self._counter[name] += 1
            return function(*arguments, **options)

        return call

    def instrument(self) -> None:
        """Count what the whole daemon asks for."""
        xen = importlib.import_module("xshmd.xen.hypervisor").XenHypervisor
        for name, function in inspect.getmembers(xen, inspect.isfunction):
            if not name.startswith("_"):
                setattr(xen, name, self.counted("calls", function))
        link: Any = importlib.import_module("xshmd.xen.store_link").Link
        link.enqueue = self.counted("messages", link.enqueue)

    def figures(self) -> dict[str, int]:
        return dict(self._counter)


def held() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    proc = Path("/proc/self")
    figures = {
        "objects": len(gc.get_objects()),
        "tasks": importlib.import_module("trio").lowlevel.current_statistics().tasks_living,
        "descriptors": len(os.listdir(proc / "fd")) - 1,  # that of this look
        "threads": len(os.listdir(proc / "task")),
    }
    for name, (file, key) in MEMORY.items():
        found = re.search(rf"^{key}:\s+(\d+) kB$", (proc / file).read_text(), re.MULTILINE)
        figures[name] = int(found[1]) if found else -1
    return figures


def main() -> int:
    """Run xshmd, with a signal more."""
    file, tally = Path(os.environ["XSHMD_HELD"]), Tally()
    fresh = file.with_name(f"{file.name}.new")

    def answer(*_: Any) -> None:
        fresh.write_text(json.dumps(held() | tally.figures()))
        fresh.rename(file)

    tally.instrument()
    signal.signal(signal.SIGUSR1, answer)
    daemon = importlib.import_module("xshmd.daemon.__main__")
    return int(daemon.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
