# SPDX-License-Identifier: LGPL-2.1-or-later
"""The trio shell around :mod:`xshmd.varlink.dispatch`: UNIX sockets, peers, limits and timeouts.

One task a connection, which reads, answers and only then reads on: replies are in order, at most
one is under way, and a client that is slow or silent costs its own connection and nobody else's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

import structlog
import trio

from xshmd.errors import Conflict, Refused
from xshmd.varlink import wire
from xshmd.varlink.admission import Admission, Complaints, Limits, Seat
from xshmd.varlink.caller import Caller, peer_pidfd
from xshmd.varlink.dispatch import Dispatcher, permission_denied
from xshmd.varlink.peer import Peer
from xshmd.varlink.wire import Call, ProtocolViolation, Reply

_FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START."""
_FD_NAME: Final = "varlink"
"""What UAPI.20 has the listening socket called among several."""
_BACKLOG: Final = 64
_RECEIVE_BYTES: Final = 64 * 1024
_FAREWELL_S: Final = 1.0
"""How long a client may take to read the last reply of a stream when the daemon stops."""

log = structlog.get_logger()


async def serve(
    listener: trio.SocketListener,
    dispatcher: Dispatcher,
    *,
    limits: Limits | None = None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer calls on the listener until cancelled; started once connections are accepted."""
    server = _Server(dispatcher, limits or Limits())
    await trio.serve_listeners(server.connection, [listener], task_status=task_status)


class _Server:
    """What the connections have in common."""

    def __init__(self, dispatcher: Dispatcher, limits: Limits) -> None:
        self.dispatcher = dispatcher
        self.limits = limits
        self.complaints = Complaints()
        self._admission = Admission(limits)

    async def connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection until it ends.  Whatever goes wrong ends this one alone."""
        try:
            async with stream:
                peer = Peer.of(stream.socket)
                # Whatever is logged on this connection's behalf says who it is.
                structlog.contextvars.bind_contextvars(client_uid=peer.uid, client_pid=peer.pid)
                scope = trio.CancelScope()
                with self._admission.seat(peer, scope.cancel) as seat:
                    if seat is None:
                        self.complaints.warn("connection refused, too many", uid=peer.uid)
                        return
                    client = Caller(peer, lambda: peer_pidfd(stream.socket, peer.pid))
                    with client.serving():
                        await _Connection(stream, seat, scope, self).run()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("client went away")
        except Exception:
            log.exception("connection failed")


class _Connection:
    def __init__(
        self, stream: trio.SocketStream, seat: Seat, scope: trio.CancelScope, server: _Server
    ) -> None:
        self._stream, self._seat, self._scope = stream, seat, scope
        self._dispatcher, self._limits = server.dispatcher, server.limits
        self._complaints = server.complaints
        self._uid = seat.peer.uid
        self._allowed = self._uid in self._limits.allowed_uids
        self._decoder = wire.Decoder(
            wire.MAX_LARGE_CALL_BYTES if self._allowed else wire.MAX_CALL_BYTES
        )
        self._sending = False
        """True from the first byte of a reply to its last, and for ever if one was cut off."""

    async def run(self) -> None:
        with self._scope:
            try:
                while await self._serve_one():
                    pass
            except ProtocolViolation as exc:
                self._complaints.warn(
                    "protocol violated, connection closed", uid=self._uid, reason=str(exc)
                )

    async def _serve_one(self) -> bool:
        """Take a message and answer it; False if that was the last."""
        try:
            message = await self._next_message()
            if message is None:
                return False
            if not self._allowed:
                self._complaints.warn("client refused", uid=self._uid)
                await self._send(permission_denied())
                return False
            await self._seat.turn(wire.weight_to_read(message))
            call = self._dispatcher.parse(message)
            del message  # a large one takes its memory once
            self._seat.begin()
            await self._answer(call)
        finally:
            self._seat.end()
        return True

    async def _next_message(self) -> bytes | None:
        """Return the next message, or None when the client has ended or been silent too long."""
        deadline: float | None = None
        while (message := self._decoder.next_message()) is None:
            if not self._decoder.pending:
                expiry = trio.current_time() + self._limits.idle_timeout_s
            elif deadline is None:
                expiry = deadline = trio.current_time() + self._limits.request_timeout_s
            else:
                expiry = deadline
            if self._decoder.buffered_bytes > wire.MAX_CALL_BYTES and not self._seat.is_large:
                await self._seat.make_room()
                # Waiting for its turn was not the client's delay.
                expiry = deadline = trio.current_time() + self._limits.request_timeout_s
            data = b""
            with trio.CancelScope(deadline=expiry):
                data = bytes(await self._stream.receive_some(_RECEIVE_BYTES))
            if not data:
                return None
            self._decoder.feed(data)
        return message

    async def _answer(self, call: Call) -> None:
        if not self._dispatcher.interruptible(call):
            await self._dispatcher.handle(call, self._send)
            return
        answered = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_on_hangup)
                await self._dispatcher.handle(call, self._send)
                answered = True
                nursery.cancel_scope.cancel()
        finally:
            if not answered:
                await self._end_stream(call)

    async def _end_stream(self, call: Call) -> None:
        """Tell a client that listens that the daemon stops; else it could but be a crash."""
        last = self._dispatcher.last_reply(call)
        if last is not None and not self._sending and not self._scope.cancel_called:
            with trio.move_on_after(_FAREWELL_S, shield=True):
                await self._send(last)

    async def _end_on_hangup(self) -> None:
        """End the connection if its client closes it; a half-closed one still gets its reply."""
        await trio.lowlevel.wait_readable(self._stream.socket)
        try:
            if await self._stream.socket.recv(1, socket.MSG_PEEK):
                return
        except OSError:
            self._scope.cancel()
            return
        poll = select.poll()
        poll.register(self._stream.socket.fileno(), 0)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            self._scope.cancel()

    async def _send(self, reply: Reply) -> None:
        """Send a reply, or end the connection if the client does not take it."""
        self._sending = True
        with trio.move_on_after(self._limits.send_timeout_s):
            try:
                await self._stream.send_all(wire.encode_reply(reply))
                self._sending = False
            except trio.BrokenResourceError:
                log.debug("client went away")
        if self._sending:
            self._scope.cancel()


def open_listener(
    path: Path, *, environ: MutableMapping[str, str] | None = None
) -> trio.SocketListener:
    """Return the socket systemd passed, or else a new one bound at ``path``, for root only.

    Args:
        path: Where to listen if nothing is passed.
        environ: Where LISTEN_* are looked for and taken out of; None is ``os.environ``.

    Raises:
        Conflict: Another daemon answers there, or something is in the way that is no socket.
        Refused: The directory is open to others, or what systemd passed is no such socket.
    """
    passed = _passed_socket(os.environ if environ is None else environ)
    return trio.SocketListener(trio.socket.from_stdlib_socket(passed or _bound_socket(path)))


def _passed_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    given = {
        name: environ.pop(f"LISTEN_{name}", "") for name in ("FDS", "PID", "PIDFDID", "FDNAMES")
    }
    if given["PID"] != str(os.getpid()) or not given["FDS"].isdecimal() or given["FDS"] == "0":
        return None
    if given["PIDFDID"] and given["PIDFDID"] != str(_own_pidfd_inode()):
        return None
    fds = range(_FIRST_FD, _FIRST_FD + int(given["FDS"]))
    for fd in fds:
        os.set_inheritable(fd, False)
    names = given["FDNAMES"].split(":")
    if len(fds) == 1:
        chosen = _FIRST_FD
    elif _FD_NAME in names[: len(fds)]:
        chosen = _FIRST_FD + names.index(_FD_NAME)
    else:
        raise Refused(
            f"systemd passed {len(fds)} sockets and none of them is called {_FD_NAME}",
            hint=f"say FileDescriptorName={_FD_NAME} in xshmd.socket",
        )
    passed = socket.socket(fileno=chosen)
    if (
        passed.family != socket.AF_UNIX
        or passed.type != socket.SOCK_STREAM
        or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        passed.detach()
        raise Refused(
            "what systemd passed is not a listening UNIX stream socket",
            hint="say ListenStream=/run/xshmd/io.xshmd.Regions in xshmd.socket",
        )
    return passed


def _own_pidfd_inode() -> int:
    fd = os.pidfd_open(os.getpid())
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _bound_socket(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        about = os.fstat(directory)
        if about.st_mode & 0o022 or about.st_uid not in (0, os.geteuid()):
            raise Refused(
                f"others may write in {path.parent}, so it is no place for the socket",
                hint=f"chown root {path.parent} and chmod 0700 {path.parent}",
            )
        # Two daemons that start together must not both find the socket stale.
        fcntl.flock(directory, fcntl.LOCK_EX)
        _remove_if_stale(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Linux gives the inode made by bind() the mode of the socket: no moment of openness.
            os.fchmod(listening.fileno(), 0o600)
            listening.bind(str(path))
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
    finally:
        os.close(directory)
    with contextlib.suppress(OSError):  # Kernels before 7.0 have no attributes on sockets.
        os.setxattr(path, "user.varlink", b"entrypoint")
    return listening


def _remove_if_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Conflict(f"{path} is there and is no socket", hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # Its backlog is full: somebody listens.
    raise Conflict(f"another daemon answers at {path}", hint="see systemctl status xshmd")
