# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection to xenstored: many requests in flight on it, until it breaks for good."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable
from typing import Final, Protocol

import structlog
import trio

from xshmd.errors import StoreError, StoreLost, XshmError
from xshmd.xen import store_wire as wire
from xshmd.xen.store_wire import Frame, Op

log = structlog.get_logger()

MAX_IN_FLIGHT: Final = 32
"""Requests sent and not answered; a request over it waits, within its deadline."""
_RECEIVE_BYTES: Final = 65536


class LinkOwner(Protocol):
    """What a link needs of those for whom it is there."""

    messages_sent: int

    def link_made(self, link: Link, /) -> Awaitable[None]:
        """Do what every new connection needs, beside its loops."""
        ...

    def link_lost(self, link: Link, /) -> None:
        """Hear that the link has just broken."""
        ...

    def event_came(self, path: str, token: str, /) -> None:
        """Take an event of a watch."""
        ...


class Reply:
    """A request that is on its way, and what came back."""

    def __init__(self, op: Op, what: str, path: str) -> None:
        self.op = op
        self.what = what
        self.path = path
        self.abandoned = False
        """Its caller has gone: nobody will look at the outcome."""
        self.settled = trio.Event()
        self._outcome: bytes | XshmError | None = None

    def settle(self, outcome: bytes | XshmError) -> None:
        """Wake up the caller with the payload of the answer, or with what came instead of it."""
        self._outcome = outcome
        self.settled.set()

    def result(self) -> bytes:
        """Return the payload of the answer, or raise what came instead of it."""
        if isinstance(self._outcome, XshmError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class Link:
    """One connection.  Broken once, it is never used again: ids and transactions die with it.

    Synchronization: none needed; all but the loops are synchronous.
    """

    def __init__(self, owner: LinkOwner, stream: trio.SocketStream) -> None:
        self.slots = trio.Semaphore(MAX_IN_FLIGHT)
        self.broken = trio.Event()
        self.reason = ""
        self.proven = False
        """xenstored has said something sensible, rather than accept and die."""
        self._owner = owner
        self._stream = stream
        self._unsent: deque[Frame] = deque()
        self._more_to_send = trio.Event()
        self._in_flight: dict[int, Reply] = {}
        self._last_rq_id = 0

    def enqueue(self, reply: Reply, payload: bytes, tx_id: int = 0) -> None:
        """Put a request in line; the caller has taken a slot, which the answer gives back."""
        rq_id = self._last_rq_id % wire.RQ_ID_MAX + 1
        while rq_id in self._in_flight:
            rq_id = rq_id % wire.RQ_ID_MAX + 1
        self._last_rq_id = rq_id
        self._in_flight[rq_id] = reply
        self._unsent.append(Frame(op=reply.op, rq_id=rq_id, tx_id=tx_id, payload=payload))
        self._more_to_send.set()

    def forget(self, reply: Reply) -> None:
        """Note that the caller has left.  An unanswered request keeps its slot: it is in flight."""
        reply.abandoned = True
        if len(self._in_flight) == MAX_IN_FLIGHT and all(
            waiting.abandoned for waiting in self._in_flight.values()
        ):
            self.fail("xenstored answers nothing any more")

    def fail(self, reason: str) -> None:
        """Give up the connection: every caller hears of it at once."""
        if self.broken.is_set():
            return
        self.reason = reason
        self.broken.set()
        for reply in self._in_flight.values():
            reply.settle(self.lost(reply.what, reply.path))
            self.slots.release()
        self._in_flight.clear()
        self._owner.link_lost(self)

    def lost(self, what: str, path: str) -> StoreLost:
        """Return what a caller hears whose request was under way when the connection broke."""
        return StoreLost(
            f"lost xenstored during {what}: {self.reason}",
            hint="it may or may not have been done; xshmd connects again by itself",
            path=path,
        )

    async def serve(self) -> None:
        """Send and receive until the connection breaks, then close it."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_loop)
                nursery.start_soon(self._receive_loop)
                nursery.start_soon(self._owner.link_made, self)
                await self.broken.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.fail("the store is being closed")
            self._stream.socket.close()

    async def _send_loop(self) -> None:
        # The one sender: a request whose caller is cancelled is still sent whole.
        while True:
            await self._more_to_send.wait()
            self._more_to_send = trio.Event()
            frames = b"".join(wire.encode_frame(frame) for frame in self._unsent)
            self._owner.messages_sent += len(self._unsent)
            self._unsent.clear()
            try:
                await self._stream.send_all(frames)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                self.fail(f"cannot send: {exc.__cause__ or exc}")
                return

    async def _receive_loop(self) -> None:
        decoder = wire.FrameDecoder()
        try:
            while data := await self._stream.receive_some(_RECEIVE_BYTES):
                decoder.feed(data)
                while frame := decoder.next_frame():
                    self._take(frame)
            self.fail("it closed the connection")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self.fail(f"cannot receive: {exc.__cause__ or exc}")
        except wire.WireError as exc:
            log.warning("xenstored broke the protocol", reason=str(exc))
            self.fail(f"it broke the protocol: {exc}")

    def _take(self, frame: Frame) -> None:
        if frame.op == Op.WATCH_EVENT:
            self._owner.event_came(*wire.decode_event(frame.payload))
            return
        reply = self._in_flight.get(frame.rq_id)
        if reply is None:
            raise wire.WireError(f"an answer to request {frame.rq_id}, which was not made")
        if frame.op not in (reply.op, Op.ERROR):
            raise wire.WireError(f"{reply.op.name} was answered by {Op(frame.op).name}")
        wire.check_reply(frame)
        self.proven = True
        del self._in_flight[frame.rq_id]
        if reply.abandoned and frame.op == Op.TRANSACTION_START:
            # Nobody knows of this transaction; xenstored would keep it as long as we live, and
            # live update would wait for it.  The abort takes over the slot.
            self.enqueue_abort(wire.decode_transaction_id(frame.payload))
            return
        self.slots.release()
        if frame.op == Op.ERROR:
            reply.settle(_refusal(reply, wire.decode_error(frame.payload)))
        else:
            reply.settle(frame.payload)

    def enqueue_abort(self, tx_id: int) -> None:
        """Put the abort of a transaction in line; the caller has a slot for it."""
        abort = Reply(Op.TRANSACTION_END, "abort of a transaction", "")
        abort.abandoned = True
        self.enqueue(abort, wire.join_strings(b"F"), tx_id)


def _refusal(reply: Reply, error: str) -> StoreError:
    return StoreError(
        f"xenstored refused {reply.what}: {error}",
        hint=wire.ERROR_HINTS[error],
        path=reply.path,
        error=error,
    )


def is_error(exc: StoreError, *errors: str) -> bool:
    """Return whether xenstored refused with one of these."""
    return exc.facts.get("error") in errors
