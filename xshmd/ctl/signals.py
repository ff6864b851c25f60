# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns the signals that end a command into an exception, so that what it began can be undone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The user, or the system, wants the command to end.

    Args:
        signum: The signal that said so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class Signals:
    """While entered, SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted` in the main thread."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        before = {signum: signal.signal(signum, self._arrived) for signum in _ENDING}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let no signal interrupt the block; one that came meanwhile does so after it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        signum, self._waiting = self._waiting, 0
        if signum:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def dropped(self) -> Iterator[None]:
        """Let no signal interrupt the block, now or after it: it undoes what was interrupted."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._waiting = 0

    def _arrived(self, signum: int, _frame: FrameType | None) -> None:
        if self._held:
            self._waiting = signum
        else:
            raise Interrupted(signum)
