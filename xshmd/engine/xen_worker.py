# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the long Xen calls in a thread, so that the daemon answers while Xen works.

Long is what works through memory or tears a domain down.  Everything else (a domain's or the host's
facts, pausing, setting a limit) takes Xen microseconds, a tenth of what going to a thread and back
costs, and is called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class XenWorker:
    """A lane for blocking calls: one at a time, never abandoned.

    A hypercall that changes state cannot be called back, so cancelling waits for it to return.
    """

    def __init__(self) -> None:
        self._lane = trio.CapacityLimiter(1)

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        """Return ``call(*arguments)``, run in a thread."""
        return await trio.to_thread.run_sync(lambda: call(*arguments), limiter=self._lane)
