# SPDX-License-Identifier: LGPL-2.1-or-later
"""A step that takes seconds must say what it is doing, and then how long it took.

One line a step, on stderr, alike on a terminal and in a CI log:

    building the arm64 dom0 root ... 34.1 s
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_open_line: str | None = None


def note(text: str) -> None:
    """Print one line of its own."""
    with _lock:
        _end_open_line()
        print(text, file=sys.stderr, flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Announce `what`, run the body, and complete the line with the time it took or FAILED.

    Steps may nest or run side by side: an unfinished line that something else interrupts is
    said again in full when its step ends.
    """
    global _open_line
    with _lock:
        _end_open_line()
        print(f"{what} ... ", end="", file=sys.stderr, flush=True)
        _open_line = what
    began = time.monotonic()
    outcome = "FAILED after "
    try:
        yield
        outcome = ""
    finally:
        seconds = time.monotonic() - began
        with _lock:
            if _open_line != what:
                _end_open_line()
                print(f"{what} ... ", end="", file=sys.stderr)
            _open_line = None
            print(f"{outcome}{seconds:.1f} s", file=sys.stderr, flush=True)


def _end_open_line() -> None:
    """Finish the line of a step that is still running, so that another may be printed."""
    global _open_line
    if _open_line is not None:
        print(file=sys.stderr)
        _open_line = None
