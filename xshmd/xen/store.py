# SPDX-License-Identifier: LGPL-2.1-or-later
"""xenstore over its socket, such that no caller ever hangs and no change is ever missed.

pyxs's own client blocks for ever once xenstored has gone, so only its codec is used; this is the
rest: one connection at a time (:class:`_Link`), many requests in flight on it, a new one with all
watches set again when it breaks.

Only the socket: /dev/xen/xenbus would do without a nursery of threads if the kernel did not wait
for xenstored inside write(2), answer WATCH with request id 0 and act on one message a write
(Linux drivers/xen/xenbus/xenbus_dev_frontend.c, ``xenbus_write_watch``, ``xenbus_file_write``).
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import structlog
import trio

from xshmd.errors import StoreError, StoreLost, StoreTimedOut, XenUnavailable, XshmError
from xshmd.ports import StoreTransaction, WatchEvent
from xshmd.units import DomId
from xshmd.xen import store_wire as wire
from xshmd.xen.store_wire import Frame, Op

if TYPE_CHECKING:
    from xshmd.ports import Store

T = TypeVar("T")
log = structlog.get_logger()

DEADLINE_S: Final = 5.0
MAX_IN_FLIGHT: Final = 32
"""Requests sent and not answered; a request over it waits, within its deadline."""
MAX_PENDING_EVENTS: Final = 1024
"""Different paths a watcher may have unread, before they become one event for the watched path."""
MAX_COMMITS: Final = 16
"""Tries of a transaction that conflicts, some 2 s in all, before it is given up."""
MAX_LISTINGS: Final = 16
"""Tries of a long directory that changes while it is read in parts."""
CLEANUP_S: Final = 1.0
"""The longest an UNWATCH or an abort may hold up a caller that is leaving."""
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_LAST_S: Final = 5.0
_RECEIVE_BYTES: Final = 65536

_DEVICE: Final = "/dev/xen/xenbus"


def socket_paths(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return where xenstored's socket may be, as libxenstore looks for it (xenstore-common.h)."""
    if path := environ.get("XENSTORED_PATH"):
        return (path,)
    if rundir := environ.get("XENSTORED_RUNDIR"):
        return (f"{rundir}/socket",)
    return ("/run/xenstored/socket", "/var/run/xenstored/socket")


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
    stream = await store.connect()
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run, stream)
        try:
            yield store
        except BaseException as exc:
            failure = exc  # raised below, where the nursery does not wrap it in a group
        nursery.cancel_scope.shield = True  # lest an outer cancellation takes its place
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _hint_unavailable() -> str:
    hint = "is xenstored running? on Debian it is started by xen.service"
    if os.path.exists(_DEVICE):
        hint += f"; one in a stub domain has only {_DEVICE}, which xshmd cannot use"
    return hint


class _Reply:
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
        self._outcome = outcome
        self.settled.set()

    def result(self) -> bytes:
        """Return the payload of the answer, or raise what came instead of it."""
        if isinstance(self._outcome, XshmError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class _Link:
    """One connection.  Broken once, it is never used again: ids and transactions die with it.

    Synchronization: none needed; all but the loops are synchronous.
    """

    def __init__(self, store: XenStore, stream: trio.SocketStream) -> None:
        self.slots = trio.Semaphore(MAX_IN_FLIGHT)
        self.broken = trio.Event()
        self.reason = ""
        self.proven = False
        """xenstored has said something sensible, rather than accept and die."""
        self._store = store
        self._stream = stream
        self._unsent: deque[Frame] = deque()
        self._more_to_send = trio.Event()
        self._in_flight: dict[int, _Reply] = {}
        self._last_rq_id = 0

    def enqueue(self, reply: _Reply, payload: bytes, tx_id: int = 0) -> None:
        """Put a request in line; the caller has taken a slot, which the answer gives back."""
        rq_id = self._last_rq_id % wire.RQ_ID_MAX + 1
        while rq_id in self._in_flight:
            rq_id = rq_id % wire.RQ_ID_MAX + 1
        self._last_rq_id = rq_id
        self._in_flight[rq_id] = reply
        self._unsent.append(Frame(op=reply.op, rq_id=rq_id, tx_id=tx_id, payload=payload))
        self._more_to_send.set()

    def forget(self, reply: _Reply) -> None:
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
        self._store.link_lost(self)

    def lost(self, what: str, path: str) -> StoreLost:
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
                nursery.start_soon(self._store.set_watches_again, self)
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
            self._store.messages_sent += len(self._unsent)
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
            self._store.event_came(*wire.decode_event(frame.payload))
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
        abort = _Reply(Op.TRANSACTION_END, "abort of a transaction", "")
        abort.abandoned = True
        self.enqueue(abort, wire.join_strings(b"F"), tx_id)


def _refusal(reply: _Reply, error: str) -> StoreError:
    return StoreError(
        f"xenstored refused {reply.what}: {error}",
        hint=wire.ERROR_HINTS[error],
        path=reply.path,
        error=error,
    )


def _is(exc: StoreError, *errors: str) -> bool:
    return exc.facts.get("error") in errors


class _Watcher:
    """One watch: the paths its reader has not seen yet, each once, in order of their first event.

    The reader task of the link never waits for a slow consumer; a task of the watcher does.
    """

    def __init__(self, path: str, token: str) -> None:
        self.path = path
        self.token = token
        self.scope = trio.CancelScope()
        self.set_on: _Link | None = None
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


class _Session:
    """Reads and writes, in a transaction or not: one request each, within the deadline."""

    def __init__(self, store: XenStore) -> None:
        self._store = store

    async def call(self, op: Op, path: str, payload: bytes) -> bytes:
        raise NotImplementedError

    async def read(self, path: str) -> str | None:
        payload = wire.join_strings(wire.encode_path(path))
        try:
            return wire.decode_value(await self.call(Op.READ, path, payload))
        except StoreError as exc:
            if _is(exc, "ENOENT"):
                return None
            raise

    async def directory(self, path: str) -> tuple[str, ...] | None:
        payload = wire.join_strings(wire.encode_path(path))
        try:
            names = await self.call(Op.DIRECTORY, path, payload)
        except StoreError as exc:
            if _is(exc, "ENOENT"):
                return None
            if not _is(exc, "E2BIG"):
                raise
            too_long = exc
        else:
            return wire.split_strings(names)
        for _ in range(MAX_LISTINGS):
            try:
                listing = await self._directory_in_parts(path)
            except StoreError as exc:
                if _is(exc, "ENOENT"):
                    return None
                if _is(exc, "ENOSYS"):
                    raise too_long from exc
                raise
            if listing is not None:
                return wire.split_strings(listing)
        raise StoreTimedOut(
            f"{path} changed {MAX_LISTINGS} times while it was being listed",
            hint="something creates or removes nodes there without pause",
            path=path,
        )

    async def _directory_in_parts(self, path: str) -> bytes | None:
        """Return the names, or None if the node changed between two parts."""
        names = b""
        first_generation: bytes | None = None
        while True:
            payload = wire.join_strings(wire.encode_path(path), b"%d" % len(names))
            answer = await self.call(Op.DIRECTORY_PART, path, payload)
            generation, part, is_last = wire.decode_directory_part(answer)
            if first_generation not in (None, generation):
                return None
            first_generation = generation
            names += part
            if is_last:
                return names

    async def write(self, path: str, value: str) -> None:
        await self.call(Op.WRITE, path, wire.encode_write(path, value))

    async def remove(self, path: str) -> None:
        payload = wire.join_strings(wire.encode_path(path))
        try:
            await self.call(Op.RM, path, payload)
        except StoreError as exc:
            if not _is(exc, "ENOENT"):  # which C xenstored says only if the parent is absent too
                raise

    async def set_permissions(self, path: str, permissions: Sequence[str]) -> None:
        await self.call(Op.SET_PERMS, path, wire.encode_permissions(path, permissions))


class _Transaction(_Session):
    """Bound to its connection: on another one its id could be another's transaction."""

    def __init__(self, store: XenStore, link: _Link, tx_id: int) -> None:
        super().__init__(store)
        self.link = link
        self.tx_id = tx_id
        self.open = True
        self.conflict = False
        self.first_path = ""

    async def call(self, op: Op, path: str, payload: bytes) -> bytes:
        if not self.open:
            raise RuntimeError("this transaction has ended")
        self.first_path = self.first_path or path
        try:
            return await self._store.request(op, path, payload, link=self.link, tx_id=self.tx_id)
        except StoreError as exc:
            self.conflict = self.conflict or _is(exc, "EAGAIN")
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
            await self._store.request(
                op, self.first_path, payload, link=self.link, tx_id=self.tx_id, sent=sent
            )
        except StoreError as exc:
            if _is(exc, "EAGAIN", "ENOENT"):
                return False
            raise
        return True


class XenStore(_Session):
    """:class:`xshmd.ports.Store` for the xenstored of this host; made by :func:`open_store`.

    Synchronization: any task of the trio loop may call anything at any time.
    """

    def __init__(self, paths: Sequence[str], *, deadline_s: float) -> None:
        super().__init__(self)
        self.messages_sent = 0
        self._paths = tuple(paths)
        self._deadline_s = deadline_s
        self._link: _Link | None = None
        self._link_changed = trio.Event()
        self._closed = False
        self._watchers: dict[str, _Watcher] = {}
        self._nr_tokens = 0
        self._nursery: trio.Nursery | None = None

    # The connection.

    async def connect(self) -> trio.SocketStream:
        """Return a new connection.

        Raises:
            XenUnavailable: none of the paths is a socket that answers.
        """
        failures = []
        for path in self._paths:
            try:
                return await trio.open_unix_socket(path)
            except (OSError, ValueError) as exc:
                failures.append(f"{path}: {getattr(exc, 'strerror', None) or exc}")
        raise XenUnavailable(f"no xenstored at {'; '.join(failures)}", hint=_hint_unavailable())

    async def run(
        self,
        stream: trio.SocketStream,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve this connection and the ones that replace it, until cancelled."""
        wait_s = BACKOFF_FIRST_S
        try:
            async with trio.open_nursery() as self._nursery:
                while True:
                    link = _Link(self, stream)
                    self._set_link(link)
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    await link.serve()
                    log.warning("xenstored lost", reason=link.reason)
                    if link.proven:
                        wait_s = BACKOFF_FIRST_S
                    stream, wait_s = await self._reconnect(wait_s)
                    log.info("xenstored found again")
        finally:
            self._closed = True
            self._set_link(None)

    async def _reconnect(self, wait_s: float) -> tuple[trio.SocketStream, float]:
        while True:
            await trio.sleep(wait_s)
            wait_s = min(wait_s * 2, BACKOFF_LAST_S)
            try:
                return await self.connect(), wait_s
            except XenUnavailable as exc:
                log.debug("xenstored not back yet", reason=exc.message)

    def _set_link(self, link: _Link | None) -> None:
        self._link = link
        self._link_changed.set()
        self._link_changed = trio.Event()

    def link_lost(self, link: _Link) -> None:
        """Stop handing out a connection that has just broken."""
        if self._link is link:
            self._set_link(None)

    async def _wait_link(self, what: str, path: str, deadline: float) -> _Link:
        with trio.move_on_at(deadline):
            while self._link is None and not self._closed:
                await self._link_changed.wait()
        if self._link is not None:
            return self._link
        if self._closed:
            raise StoreLost(f"the store is closed, so no {what}", path=path)
        raise StoreLost(
            f"not connected to xenstored, so no {what}",
            hint="see whether xenstored runs; xshmd keeps trying",
            path=path,
        )

    # Requests.

    async def _submit(
        self, op: Op, path: str, payload: bytes, deadline: float, link: _Link | None, tx_id: int
    ) -> tuple[_Link, _Reply]:
        """Put a request in line, once there is a connection and a free slot on it."""
        reply = _Reply(op, f"{op.name} {path}".rstrip(), path)
        if link is None:
            link = await self._wait_link(reply.what, path, deadline)
        with trio.move_on_at(deadline) as scope:
            await link.slots.acquire()
        if scope.cancelled_caught:
            raise self._timed_out(reply)
        if link.broken.is_set():
            link.slots.release()
            raise link.lost(reply.what, path)
        link.enqueue(reply, payload, tx_id)
        return link, reply

    async def _outcome(self, link: _Link, reply: _Reply, deadline: float) -> bytes:
        try:
            with trio.move_on_at(deadline):
                await reply.settled.wait()
        finally:
            link.forget(reply)
        if not reply.settled.is_set():
            raise self._timed_out(reply)
        return reply.result()

    def _timed_out(self, reply: _Reply) -> StoreTimedOut:
        return StoreTimedOut(
            f"xenstored did not answer {reply.what} within {self._deadline_s:g} s",
            hint="it is stopped, overloaded or waiting for a live update",
            path=reply.path,
        )

    async def request(
        self,
        op: Op,
        path: str,
        payload: bytes,
        *,
        link: _Link | None = None,
        tx_id: int = 0,
        sent: Callable[[], None] = lambda: None,
    ) -> bytes:
        """Return the payload of the answer.

        Args:
            op: What is asked for.
            path: What it is about, for messages.
            payload: The request's payload.
            link: The only connection it may go to; by default the present or next one.
            tx_id: The transaction of that connection it belongs to.
            sent: Called once it will reach the server unless the connection breaks.
        """
        deadline = trio.current_time() + self._deadline_s
        used, reply = await self._submit(op, path, payload, deadline, link, tx_id)
        sent()
        return await self._outcome(used, reply, deadline)

    async def call(self, op: Op, path: str, payload: bytes) -> bytes:
        return await self.request(op, path, payload)

    async def _pipeline(
        self, requests: Sequence[tuple[Op, str, bytes]]
    ) -> list[bytes | StoreError]:
        """Send all in this order without waiting for answers; each has its own deadline."""
        under_way: deque[tuple[_Link, _Reply, float]] = deque()
        outcomes: list[bytes | StoreError] = []
        try:
            for op, path, payload in requests:
                deadline = trio.current_time() + self._deadline_s
                link, reply = await self._submit(op, path, payload, deadline, None, 0)
                under_way.append((link, reply, deadline))
            while under_way:
                try:
                    outcomes.append(await self._outcome(*under_way.popleft()))
                except StoreError as exc:
                    outcomes.append(exc)
        finally:
            for link, reply, _ in under_way:
                link.forget(reply)
        return outcomes

    async def read_many(self, paths: Sequence[str]) -> tuple[str | None, ...]:
        outcomes = await self._pipeline(
            [(Op.READ, path, wire.join_strings(wire.encode_path(path))) for path in paths]
        )
        values: list[str | None] = []
        for outcome in outcomes:
            if isinstance(outcome, bytes):
                values.append(wire.decode_value(outcome))
            elif _is(outcome, "ENOENT"):
                values.append(None)
            else:
                raise outcome
        return tuple(values)

    async def write_many(self, items: Sequence[tuple[str, str]]) -> None:
        outcomes = await self._pipeline(
            [(Op.WRITE, path, wire.encode_write(path, value)) for path, value in items]
        )
        for outcome in outcomes:
            if isinstance(outcome, StoreError):
                raise outcome

    async def is_introduced(self, domid: DomId) -> bool:
        payload = wire.join_strings(b"%d" % domid)
        answer = await self.request(Op.IS_DOMAIN_INTRODUCED, f"domain {domid}", payload)
        return wire.decode_introduced(answer)

    # Transactions.

    async def transact(self, body: Callable[[StoreTransaction], Awaitable[T]]) -> T:
        first_path = ""
        for attempt in range(MAX_COMMITS):
            if attempt:
                await trio.sleep(random.uniform(0, min(0.01 * 2**attempt, 0.3)))
            transaction = await self._begin()
            try:
                result = await body(transaction)
                if await transaction.end(commit=True):
                    return result
            except Exception:
                if await self._abort(transaction) and not transaction.conflict:
                    raise
            except BaseException:
                await self._abort(transaction)
                raise
            first_path = transaction.first_path
        raise StoreTimedOut(
            f"a transaction on {first_path} conflicted {MAX_COMMITS} times",
            hint="something else writes the same xenstore nodes without pause",
            path=first_path,
        )

    async def _begin(self) -> _Transaction:
        deadline = trio.current_time() + self._deadline_s
        payload = wire.join_strings(b"")
        link, reply = await self._submit(Op.TRANSACTION_START, "", payload, deadline, None, 0)
        try:
            answer = await self._outcome(link, reply, deadline)
        except trio.Cancelled:
            if reply.settled.is_set():  # the answer came between the cancellation and now
                with contextlib.suppress(XshmError):
                    tx_id = wire.decode_transaction_id(reply.result())
                    await self._abort(_Transaction(self, link, tx_id))
            raise
        return _Transaction(self, link, wire.decode_transaction_id(answer))

    async def _abort(self, transaction: _Transaction) -> bool:
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

    # Watches.

    @contextlib.asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[trio.MemoryReceiveChannel[WatchEvent]]:
        name = wire.encode_path(path, special_allowed=True)
        self._nr_tokens += 1
        watcher = _Watcher(path, f"xshmd/{self._nr_tokens}")
        request = wire.join_strings(name, watcher.token.encode())
        if self._nursery is None or self._closed:
            raise StoreLost(f"the store is closed, so no WATCH {path}", path=path)
        self._watchers[watcher.token] = watcher
        self._nursery.start_soon(watcher.pump)
        try:
            await self._set_watch(watcher, request)
            yield watcher.receive
        finally:
            del self._watchers[watcher.token]
            watcher.scope.cancel()
            watcher.receive.close()
            await self._unset_watch(watcher, request)

    async def _set_watch(self, watcher: _Watcher, request: bytes) -> None:
        deadline = trio.current_time() + self._deadline_s
        link, reply = await self._submit(Op.WATCH, watcher.path, request, deadline, None, 0)
        watcher.set_on = link
        await self._outcome(link, reply, deadline)
        if link.broken.is_set():  # between the answer and now: no longer set, nor set again
            raise link.lost(reply.what, watcher.path)
        watcher.established = True

    async def _unset_watch(self, watcher: _Watcher, request: bytes) -> None:
        link = watcher.set_on
        if link is None or link.broken.is_set():
            return
        with trio.move_on_after(CLEANUP_S) as scope:
            scope.shield = True
            try:
                await self.request(Op.UNWATCH, watcher.path, request, link=link)
            except XshmError as exc:
                log.debug("watch not removed", path=watcher.path, reason=exc.message)

    async def set_watches_again(self, link: _Link) -> None:
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
                await self.request(Op.WATCH, watcher.path, request, link=link)
        except StoreLost:
            pass
        except XshmError as exc:
            link.fail(f"a watch could not be set again: {exc.message}")

    def event_came(self, path: str, token: str) -> None:
        """Note an event; one for a watch that was left meanwhile is dropped."""
        if watcher := self._watchers.get(token):
            watcher.add(path)


if TYPE_CHECKING:

    def _is_a_store(store: XenStore) -> Store:
        return store
