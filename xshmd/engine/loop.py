# SPDX-License-Identifier: LGPL-2.1-or-later
"""The queue of the single writer: all that changes the world waits in it, so nothing needs a lock.

A piece of work runs to its end before the next begins.  Clients *ask* and wait for the answer;
watches and timers *hint* that there may be something to see, and hints are merged into one look.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import structlog
import trio

from xshmd.errors import (
    ConfigError,
    ConfigUnreadable,
    Conflict,
    OutOfMemory,
    Refused,
    StoreLost,
    StoreTrouble,
    XshmError,
)

log = structlog.get_logger()
T = TypeVar("T")
Work = Callable[[], Awaitable[None]]

REFUSALS: Final = (ConfigError, ConfigUnreadable, Refused, Conflict, OutOfMemory)
"""Errors that say no to what somebody wants, rather than that something is not so."""
AGAIN_S: Final = 1.0
"""When to look again after xenstored failed us in the middle of something."""


class Loop:
    """See the module.  Used by the engine's own parts alone.

    Args:
        look: The work that a hint is for.
        after: What is done after each piece of work, if it can be.
        on_refusal: Told of each refusal that a client is given.
    """

    def __init__(
        self, *, look: Work, after: Callable[[], None], on_refusal: Callable[[XshmError], None]
    ) -> None:
        self._look, self._after, self._on_refusal = look, after, on_refusal
        # Unbounded, yet never long: looks are merged into one, and a client asks one thing at a
        # time.
        self._put, self._get = trio.open_memory_channel[Work](math.inf)
        self._look_due = False
        self._nursery: trio.Nursery | None = None
        self.changed = trio.Event()
        """Set when the next piece of work is done; then there is another."""

    @asynccontextmanager
    async def tasks(self) -> AsyncIterator[trio.Nursery]:
        """Have timers and whatever is started beside the loop run until the body ends."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            yield nursery

    async def run(self) -> None:
        """Do what is put in, one after the other, for ever.  Within :meth:`tasks`."""
        async for work in self._get:
            await self._do(work)

    async def _do(self, work: Work) -> None:
        try:
            await work()
        except XshmError as error:
            self._put_off(error)
        try:
            self._after()
        except XshmError as error:
            self._put_off(error)
        self.changed.set()
        self.changed = trio.Event()

    def _put_off(self, error: XshmError) -> None:
        # Whatever was begun is in the records, and the next look goes on with it.
        say = log.warning if isinstance(error, StoreTrouble) else log.error
        say("work put off", reason=error.one_line(), **error.facts)
        self.look_in(AGAIN_S)

    # -- work and questions ---------------------------------------------------------------------

    def put(self, work: Work) -> None:
        """Have something done after all that waits already."""
        self._put.send_nowait(work)

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Have the loop do something, and return or raise what comes of it."""
        outcome: list[T] = []
        failed: list[XshmError] = []
        done = trio.Event()

        async def work() -> None:
            try:
                outcome.append(await question())
            except XshmError as error:
                failed.append(error)
            finally:
                done.set()

        self.put(work)
        await done.wait()
        if failed:
            raise failed[0]
        if not outcome:
            raise StoreLost("xshmd was stopped in the middle of it", hint="ask again")
        return outcome[0]

    async def ask_for(self, question: Callable[[], Awaitable[T]]) -> T:
        """Do as :meth:`ask`, of something that may be refused."""
        try:
            return await self.ask(question)
        except REFUSALS as error:
            self._on_refusal(error)
            raise

    # -- hints and timers -----------------------------------------------------------------------

    def hint(self) -> None:
        """Have a look soon; hints before it begins are one."""
        if not self._look_due:
            self._look_due = True
            self.put(self._look_now)

    async def _look_now(self) -> None:
        self._look_due = False
        await self._look()

    def look_in(self, seconds: float) -> None:
        """Hint later."""
        self.later(seconds, self.hint)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something later; not at all if :meth:`tasks` has not begun, or ends before."""

        async def wait() -> None:
            await trio.sleep(seconds)
            call()

        if self._nursery is not None:
            self._nursery.start_soon(wait)

    def start_soon(self, task: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        """Start a task beside the loop, which ends with it."""
        assert self._nursery is not None
        self._nursery.start_soon(task, *arguments)
