# SPDX-License-Identifier: LGPL-2.1-or-later
"""xenstore over its socket, such that no caller ever hangs and no change is ever missed.

pyxs's own client blocks for ever once xenstored has gone, so only its codec is used; this is the
rest: one connection at a time with many requests in flight on it (``store_link``), a new one when
it breaks (``store_connection``), on which all watches are set again (``store_watches``).

Only the socket: /dev/xen/xenbus would do without a nursery of threads if the kernel did not wait
for xenstored inside write(2), answer WATCH with request id 0 and act on one message a write
(Linux drivers/xen/xenbus/xenbus_dev_frontend.c, ``xenbus_write_watch``, ``xenbus_file_write``).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, TypeVar

import trio

from xshmd.errors import StoreError
from xshmd.ports import StoreTransaction, WatchEvent
from xshmd.units import DomId
from xshmd.xen import store_wire as wire
from xshmd.xen.store_connection import DEADLINE_S, Connection, socket_paths
from xshmd.xen.store_link import MAX_IN_FLIGHT, is_error
from xshmd.xen.store_session import Session
from xshmd.xen.store_transaction import CLEANUP_S, MAX_COMMITS, transact
from xshmd.xen.store_watches import MAX_PENDING_EVENTS, Watches
from xshmd.xen.store_wire import Op

if TYPE_CHECKING:
    from xshmd.ports import Store

__all__ = [
    "CLEANUP_S",
    "DEADLINE_S",
    "MAX_COMMITS",
    "MAX_IN_FLIGHT",
    "MAX_PENDING_EVENTS",
    "XenStore",
    "open_store",
    "socket_paths",
]

T = TypeVar("T")


@contextlib.asynccontextmanager
async def open_store(
    path: str | None = None, *, deadline_s: float = DEADLINE_S
) -> AsyncIterator[XenStore]:
    """Connect to xenstored, and stay connected for as long as the body runs.

    Args:
        path: The socket; by default where libxenstore would look.
        deadline_s: How long one request may take.

    Raises:
        XenUnavailable: there is no xenstored to connect to now.  Later losses are repaired.
    """
    store = XenStore((path,) if path else socket_paths(), deadline_s=deadline_s)
    stream = await store.connection.connect()
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(store.connection.run, stream)
        try:
            yield store
        except BaseException as exc:
            failure = exc  # raised below, where the nursery does not wrap it in a group
        nursery.cancel_scope.shield = True  # lest an outer cancellation takes its place
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class XenStore(Session):
    """:class:`xshmd.ports.Store` for the xenstored of this host; made by :func:`open_store`.

    Synchronization: any task of the trio loop may call anything at any time.

    Attributes:
        connection: what its requests go through.
    """

    def __init__(self, paths: Sequence[str], *, deadline_s: float) -> None:
        self._watches = Watches()
        self.connection = Connection(
            paths,
            deadline_s=deadline_s,
            on_event=self._watches.event_came,
            on_link=lambda link: self._watches.set_again(self.connection, link),
        )
        super().__init__(self.connection.request)

    @property
    def messages_sent(self) -> int:
        return self.connection.messages_sent

    async def read_many(self, paths: Sequence[str]) -> tuple[str | None, ...]:
        outcomes = await self.connection.pipeline(
            [(Op.READ, path, wire.join_strings(wire.encode_path(path))) for path in paths]
        )
        values: list[str | None] = []
        for outcome in outcomes:
            if isinstance(outcome, bytes):
                values.append(wire.decode_value(outcome))
            elif is_error(outcome, "ENOENT"):
                values.append(None)
            else:
                raise outcome
        return tuple(values)

    async def write_many(self, items: Sequence[tuple[str, str]]) -> None:
        outcomes = await self.connection.pipeline(
            [(Op.WRITE, path, wire.encode_write(path, value)) for path, value in items]
        )
        for outcome in outcomes:
            if isinstance(outcome, StoreError):
                raise outcome

    async def is_introduced(self, domid: DomId) -> bool:
        payload = wire.join_strings(b"%d" % domid)
        answer = await self.connection.request(Op.IS_DOMAIN_INTRODUCED, f"domain {domid}", payload)
        return wire.decode_introduced(answer)

    async def transact(self, body: Callable[[StoreTransaction], Awaitable[T]]) -> T:
        return await transact(self.connection, body)

    def watch(
        self, path: str
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[WatchEvent]]:
        return self._watches.watch(self.connection, path)


if TYPE_CHECKING:

    def _is_a_store(store: XenStore) -> Store:
        return store
