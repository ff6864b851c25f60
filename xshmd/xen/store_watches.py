# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches: no event is missed, across any number of connections, and no reader holds up another."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import structlog
import trio

from xshmd.errors import StoreLost, XshmError
from xshmd.ports import WatchEvent
from xshmd.xen import store_wire as wire
from xshmd.xen.store_connection import Connection
from xshmd.xen.store_link import Link
from xshmd.xen.store_wire import Op

log = structlog.get_logger()

MAX_PENDING_EVENTS: Final = 1024
"""Different paths a watcher may have unread, before they become one event for the watched path."""
CLEANUP_S: Final = 1.0
"""The longest an UNWATCH may hold up a caller that is leaving."""


class Watcher:
    """One watch: the paths its reader has not seen yet, each once, in order of their first event.

    The reader task of the link never waits for a slow consumer; a task of the watcher does.
    """

    def __init__(self, path: str, token: str) -> None:
        self.path = path
        self.token = token
        self.scope = trio.CancelScope()
        self.set_on: Link | None = None
        """The connection on which the server knows (or is being told of) this watch."""
        self.established = False
        """The server has accepted it once: from then on reconnecting sets it again."""
        self._pending: dict[str, None] = {}
        self._event_came = trio.Event()
        self._send, self.receive = trio.open_memory_channel[WatchEvent](0)

    def add(self, path: str) -> None:
        if len(self._pending) >= MAX_PENDING_EVENTS and path not in self._pending:
            self._pending.clear()
            path = self.path  # which says that anything at or below it may have changed
        self._pending[path] = None
        self._event_came.set()

    async def pump(self) -> None:
        with self.scope, self._send:
            while True:
                await self._event_came.wait()
                self._event_came = trio.Event()
                while self._pending:
                    # Taken out first: an event that comes while the reader wakes up is a new one.
                    path = next(iter(self._pending))
                    del self._pending[path]
                    try:
                        await self._send.send(WatchEvent(path))
                    except trio.BrokenResourceError:
                        return  # the reader closed its end before leaving the watch


class Watches:
    """All watches of a store; the connection is told of each, and of all again when it is new."""

    def __init__(self) -> None:
        self._watchers: dict[str, Watcher] = {}
        self._nr_tokens = 0

    @contextlib.asynccontextmanager
    async def watch(
        self, connection: Connection, path: str
    ) -> AsyncIterator[trio.MemoryReceiveChannel[WatchEvent]]:
        """Watch a path, see :meth:`xshmd.ports.Store.watch`."""
        name = wire.encode_path(path, special_allowed=True)
        self._nr_tokens += 1
        watcher = Watcher(path, f"xshmd/{self._nr_tokens}")
        request = wire.join_strings(name, watcher.token.encode())
        connection.start_soon(watcher.pump, f"WATCH {path}", path)
        self._watchers[watcher.token] = watcher
        try:
            await _set_watch(connection, watcher, request)
            yield watcher.receive
        finally:
            del self._watchers[watcher.token]
            watcher.scope.cancel()
            watcher.receive.close()
            await _unset_watch(connection, watcher, request)

    async def set_again(self, connection: Connection, link: Link) -> None:
        """Set every watch on a new connection; each fires, which makes its reader look again."""
        try:
            for watcher in tuple(self._watchers.values()):
                if not watcher.established or watcher.token not in self._watchers:
                    continue  # being set by its own watch(), or left meanwhile
                if watcher.set_on is link:
                    continue  # its own watch() was quicker
                watcher.set_on = link
                name = wire.encode_path(watcher.path, special_allowed=True)
                request = wire.join_strings(name, watcher.token.encode())
                await connection.request(Op.WATCH, watcher.path, request, link=link)
        except StoreLost:
            pass
        except XshmError as exc:
            link.fail(f"a watch could not be set again: {exc.message}")

    def event_came(self, path: str, token: str) -> None:
        """Note an event; one for a watch that was left meanwhile is dropped."""
        if watcher := self._watchers.get(token):
            watcher.add(path)


async def _set_watch(connection: Connection, watcher: Watcher, request: bytes) -> None:
    deadline = connection.deadline()
    link, reply = await connection.submit(Op.WATCH, watcher.path, request, deadline, None, 0)
    watcher.set_on = link
    await connection.outcome(link, reply, deadline)
    if link.broken.is_set():  # between the answer and now: no longer set, nor set again
        raise link.lost(reply.what, watcher.path)
    watcher.established = True


async def _unset_watch(connection: Connection, watcher: Watcher, request: bytes) -> None:
    link = watcher.set_on
    if link is None or link.broken.is_set():
        return
    with trio.move_on_after(CLEANUP_S) as scope:
        scope.shield = True
        try:
            await connection.request(Op.UNWATCH, watcher.path, request, link=link)
        except XshmError as exc:
            log.debug("watch not removed", path=watcher.path, reason=exc.message)
