# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lasting connection to xenstored: a new link whenever one breaks, and deadlines on all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog
import trio

from xshmd.errors import StoreError, StoreLost, StoreTimedOut, XenUnavailable
from xshmd.xen.store_link import Link, Reply
from xshmd.xen.store_wire import Op

log = structlog.get_logger()

DEADLINE_S: Final = 5.0
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_LAST_S: Final = 5.0
_DEVICE: Final = "/dev/xen/xenbus"


def socket_paths(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return where xenstored's socket may be, as libxenstore looks for it (xenstore-common.h)."""
    if path := environ.get("XENSTORED_PATH"):
        return (path,)
    if rundir := environ.get("XENSTORED_RUNDIR"):
        return (f"{rundir}/socket",)
    return ("/run/xenstored/socket", "/var/run/xenstored/socket")


def _hint_unavailable() -> str:
    hint = "is xenstored running? on Debian it is started by xen.service"
    if os.path.exists(_DEVICE):
        hint += f"; one in a stub domain has only {_DEVICE}, which xshmd cannot use"
    return hint


class Connection:
    """Takes requests at any time and sees to it that each is answered, refused or lost in time.

    Synchronization: any task of the trio loop may call anything at any time.

    Attributes:
        messages_sent: How many requests went over the wire since the start.
        link: The connection there is now, if any.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        deadline_s: float,
        on_event: Callable[[str, str], None],
        on_link: Callable[[Link], Awaitable[None]],
    ) -> None:
        """Say how to connect; nothing is done before ``connect``.

        Args:
            paths: Where the socket may be.
            deadline_s: How long one request may take.
            on_event: Takes the path and the token of every event.
            on_link: Run beside each new link's loops: what every connection needs.
        """
        self.messages_sent = 0
        self.link: Link | None = None
        self.event_came = on_event
        self.link_made = on_link
        self._paths = tuple(paths)
        self._deadline_s = deadline_s
        self._link_changed = trio.Event()
        self._closed = False
        self._nursery: trio.Nursery | None = None

    def start_soon(self, task: Callable[[], Awaitable[None]], what: str, path: str) -> None:
        """Run a task for as long as the connection is kept up.

        Raises:
            StoreLost: it is not, any more.
        """
        if self._nursery is None or self._closed:
            raise self._is_closed(what, path)
        self._nursery.start_soon(task)

    def deadline(self) -> float:
        """Return until when a request made now may take, in trio's time."""
        return trio.current_time() + self._deadline_s

    @property
    def nr_tasks(self) -> int:
        """How many tasks run for it and for what was started with it."""
        return len(self._nursery.child_tasks) if self._nursery is not None else 0

    @staticmethod
    def _is_closed(what: str, path: str) -> StoreLost:
        return StoreLost(f"the store is closed, so no {what}", path=path)

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
                    link = Link(self, stream)
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

    def _set_link(self, link: Link | None) -> None:
        self.link = link
        self._link_changed.set()
        self._link_changed = trio.Event()

    def link_lost(self, link: Link) -> None:
        """Stop handing out a connection that has just broken."""
        if self.link is link:
            self._set_link(None)

    async def _wait_link(self, what: str, path: str, deadline: float) -> Link:
        with trio.move_on_at(deadline):
            while self.link is None and not self._closed:
                await self._link_changed.wait()
        if self.link is not None:
            return self.link
        if self._closed:
            raise self._is_closed(what, path)
        raise StoreLost(
            f"not connected to xenstored, so no {what}",
            hint="see whether xenstored runs; xshmd keeps trying",
            path=path,
        )

    async def submit(
        self, op: Op, path: str, payload: bytes, deadline: float, link: Link | None, tx_id: int
    ) -> tuple[Link, Reply]:
        """Put a request in line, once there is a connection and a free slot on it."""
        reply = Reply(op, f"{op.name} {path}".rstrip(), path)
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

    async def outcome(self, link: Link, reply: Reply, deadline: float) -> bytes:
        """Return the payload of the answer, or raise what came instead of it."""
        try:
            with trio.move_on_at(deadline):
                await reply.settled.wait()
        finally:
            link.forget(reply)
        if not reply.settled.is_set():
            raise self._timed_out(reply)
        return reply.result()

    def _timed_out(self, reply: Reply) -> StoreTimedOut:
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
        link: Link | None = None,
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
        deadline = self.deadline()
        used, reply = await self.submit(op, path, payload, deadline, link, tx_id)
        sent()
        return await self.outcome(used, reply, deadline)

    async def pipeline(self, requests: Sequence[tuple[Op, str, bytes]]) -> list[bytes | StoreError]:
        """Send all in this order without waiting for answers; each has its own deadline."""
        under_way: deque[tuple[Link, Reply, float]] = deque()
        outcomes: list[bytes | StoreError] = []
        try:
            for op, path, payload in requests:
                deadline = self.deadline()
                link, reply = await self.submit(op, path, payload, deadline, None, 0)
                under_way.append((link, reply, deadline))
            while under_way:
                try:
                    outcomes.append(await self.outcome(*under_way.popleft()))
                except StoreError as exc:
                    outcomes.append(exc)
        finally:
            for link, reply, _ in under_way:
                link.forget(reply)
        return outcomes
