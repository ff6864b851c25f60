# SPDX-License-Identifier: LGPL-2.1-or-later
"""Transactions: run again when they conflict, and none left open in xenstored, whatever happens."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog
import trio

from xshmd.errors import StoreError, StoreTimedOut, XshmError
from xshmd.ports import StoreTransaction
from xshmd.xen import store_wire as wire
from xshmd.xen.store_connection import Connection
from xshmd.xen.store_link import Link, is_error
from xshmd.xen.store_session import Session
from xshmd.xen.store_wire import Op

T = TypeVar("T")
log = structlog.get_logger()

MAX_COMMITS: Final = 16
"""Tries of a transaction that conflicts, some 2 s in all, before it is given up."""
CLEANUP_S: Final = 1.0
"""The longest an abort may hold up a caller that is leaving."""


class Transaction(Session):
    """Bound to its connection: on another one its id could be another's transaction."""

    def __init__(self, connection: Connection, link: Link, tx_id: int) -> None:
        super().__init__(self._send)
        self._connection = connection
        self.link = link
        self.tx_id = tx_id
        self.open = True
        self.conflict = False
        self.first_path = ""

    async def _send(self, op: Op, path: str, payload: bytes) -> bytes:
        if not self.open:
            raise RuntimeError("this transaction has ended")
        self.first_path = self.first_path or path
        try:
            return await self._connection.request(
                op, path, payload, link=self.link, tx_id=self.tx_id
            )
        except StoreError as exc:
            self.conflict = self.conflict or is_error(exc, "EAGAIN")
            raise

    async def end(self, *, commit: bool) -> bool:
        """End it; return whether it was still there and, if to be committed, did not conflict.

        ENOENT means that the server has dropped it (transaction.c transaction_lookup), as a forced
        live update does: reads in it then found nothing, so it must be run again like a conflict.
        """
        op = Op.TRANSACTION_END
        payload = wire.join_strings(b"T" if commit else b"F")

        def sent() -> None:
            self.open = False

        try:
            await self._connection.request(
                op, self.first_path, payload, link=self.link, tx_id=self.tx_id, sent=sent
            )
        except StoreError as exc:
            if is_error(exc, "EAGAIN", "ENOENT"):
                return False
            raise
        return True


async def transact(connection: Connection, body: Callable[[StoreTransaction], Awaitable[T]]) -> T:
    """Run ``body`` in a transaction, again from the start for as long as it conflicts."""
    first_path = ""
    for attempt in range(MAX_COMMITS):
        if attempt:
            await trio.sleep(random.uniform(0, min(0.01 * 2**attempt, 0.3)))
        transaction = await _begin(connection)
        try:
            result = await body(transaction)
            if await transaction.end(commit=True):
                return result
        except Exception:
            if await _abort(transaction) and not transaction.conflict:
                raise
        except BaseException:
            await _abort(transaction)
            raise
        first_path = transaction.first_path
    raise StoreTimedOut(
        f"a transaction on {first_path} conflicted {MAX_COMMITS} times",
        hint="something else writes the same xenstore nodes without pause",
        path=first_path,
    )


async def _begin(connection: Connection) -> Transaction:
    deadline = connection.deadline()
    payload = wire.join_strings(b"")
    link, reply = await connection.submit(Op.TRANSACTION_START, "", payload, deadline, None, 0)
    try:
        answer = await connection.outcome(link, reply, deadline)
    except trio.Cancelled:
        if reply.settled.is_set():  # the answer came between the cancellation and now
            with contextlib.suppress(XshmError):
                tx_id = wire.decode_transaction_id(reply.result())
                await _abort(Transaction(connection, link, tx_id))
        raise
    return Transaction(connection, link, wire.decode_transaction_id(answer))


async def _abort(transaction: Transaction) -> bool:
    """End it without effect; return False only if it turns out not to have existed any more."""
    if not transaction.open:
        return True
    with trio.move_on_after(CLEANUP_S) as scope:
        scope.shield = True
        try:
            return await transaction.end(commit=False)
        except XshmError as exc:
            log.debug("transaction not aborted", reason=exc.message)
    return True
