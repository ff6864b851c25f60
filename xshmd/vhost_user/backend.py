# SPDX-License-Identifier: LGPL-2.1-or-later
"""The loop of a back-end: serves any number of front-ends, none of which can harm another.

It is for programs in dom0 that are written in Python; see docs/vhost-user.md for how to use it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from xshmd.vhost_user.channel import Channel, Disconnected
from xshmd.vhost_user.memory import CannotMap, Memory
from xshmd.vhost_user.session import Session
from xshmd.vhost_user.vring import Device
from xshmd.vhost_user.wire import ProtocolViolation

MESSAGE_S: Final = 10.0
"""How long a message may take from its first byte to its last."""
POLL_S: Final = 0.001
"""How often queues are looked at that nobody announces anything in."""
MAX_CONNECTIONS: Final = 64
OTHER_FDS: Final = 64
"""Descriptors of the process that are no connection's: its own files, and those in transit."""
_BURST: Final = 64
"""Messages of one connection that are answered before others have their turn."""

Say = Callable[[str], None]


class _Connection:
    """One front-end, its session and the events of its queues."""

    def __init__(self, channel: Channel, session: Session, name: str) -> None:
        self.channel, self.session, self.name = channel, session, name
        self.begun_at = 0.0
        """When the message that is coming in was begun; 0: none is."""
        self.watched: dict[int, int] = {}
        """Queue by the descriptor that says something is in it."""

    @property
    def polled(self) -> bool:
        return any(vring.is_polled for vring in self.session.vrings)

    @property
    def busy(self) -> bool:
        return any(vring.more for vring in self.session.vrings)


class Backend:
    """Serves a device to whoever connects.

    Synchronization: none; :meth:`stop` alone may be called from elsewhere, also from a signal
    handler.

    Args:
        device: Makes the device of a new connection.
        say: Told in one sentence why a connection ended.
        memory: Makes the memory table of a new connection.
    """

    def __init__(
        self,
        device: Callable[[], Device],
        say: Say = lambda _text: None,
        *,
        memory: Callable[[], Memory] = Memory,
    ) -> None:
        self._device, self._say, self._memory = device, say, memory
        # poll() remembers nothing: epoll would go on telling of a queue's event that is closed here
        # and open at the front-end, and knows kinds of files that it does not take.
        self._selector = selectors.PollSelector()
        self._connections: list[_Connection] = []
        self._count = 0
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._running = True

    # -- who is served --------------------------------------------------------------------------

    def listen(self, path: Path) -> socket.socket:
        """Serve whoever connects to a UNIX socket at this path, which must not be there yet."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(path))
            listener.listen(MAX_CONNECTIONS)
        except BaseException:
            listener.close()
            raise
        self._selector.register(
            listener, selectors.EVENT_READ, lambda: self._accept(listener, str(path))
        )
        return listener

    def connect(self, path: Path) -> None:
        """Serve the front-end that listens at a UNIX socket at this path."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(str(path))
        except BaseException:
            connected.close()
            raise
        self.add(connected, f"the front-end at {path}")

    def add(self, connected: socket.socket, name: str = "the front-end") -> None:
        """Serve the front-end at the other end of this socket, which is ours from now on."""
        self._begin(connected, Session(self._device(), self._memory()), name)

    def _begin(self, connected: socket.socket, session: Session, name: str) -> None:
        connected.setblocking(False)
        connection = _Connection(Channel(connected), session, name)
        self._connections.append(connection)
        self._selector.register(connected, selectors.EVENT_READ, lambda: self._receive(connection))

    @property
    def connection_count(self) -> int:
        """How many front-ends are served."""
        return len(self._connections)

    def _accept(self, listener: socket.socket, path: str) -> None:
        try:
            connected, _ = listener.accept()
        except OSError as error:  # it is gone again, or we are out of descriptors
            self._say(f"a front-end could not be accepted: {error}")
            return
        session = Session(self._device(), self._memory())
        if len(self._connections) >= MAX_CONNECTIONS or not self._has_room_for(session):
            connected.close()
            self._say(f"a front-end was turned away: there are {len(self._connections)}")
            return
        self._count += 1
        self._begin(connected, session, f"front-end {self._count} of {path}")

    def _has_room_for(self, session: Session) -> bool:
        """Return whether it and all others can have every descriptor that they may come to hold.

        Otherwise one of them could take what another is about to receive.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        sessions = [session, *(connection.session for connection in self._connections)]
        needed = OTHER_FDS + sum(1 + each.most_fds for each in sessions)
        return limit == resource.RLIM_INFINITY or needed <= limit

    # -- the loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :meth:`stop` is called; everything is closed then."""
        try:
            while self._running:
                self.turn(self._patience())
        finally:
            self.close()

    def stop(self) -> None:
        """Have :meth:`run` end; once it has, this does nothing."""
        if not self._running:
            return  # there may be another's descriptor by that number by now
        self._running = False
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    def turn(self, timeout_s: float | None = None) -> None:
        """Wait for something, or that long, and do what there is to be done."""
        there = self._selector.get_map()
        for key, _events in self._selector.select(timeout_s):
            if there.get(key.fileobj) is key:  # unless what came before ended it
                key.data()
        now = time.monotonic()
        for connection in tuple(self._connections):
            if connection.begun_at and now - connection.begun_at > MESSAGE_S:
                self._end(connection, "a message was not whole in time")
            else:
                self._process(connection)

    def close(self) -> None:
        """End every connection and close every descriptor; nothing can be served afterwards."""
        self._running = False
        for connection in tuple(self._connections):
            self._end(connection, "")
        for key in tuple(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _patience(self) -> float | None:
        if any(connection.busy for connection in self._connections):
            return 0
        if any(connection.polled for connection in self._connections):
            return POLL_S
        return MESSAGE_S if any(each.begun_at for each in self._connections) else None

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    # -- one connection -------------------------------------------------------------------------

    def _receive(self, connection: _Connection) -> None:
        try:
            for _ in range(_BURST):
                message = connection.channel.receive_some()
                if message is None:
                    break
                reply = connection.session.handle(message)
                if reply is not None:
                    connection.channel.send(reply)
                self._watch(connection)
        except (ProtocolViolation, CannotMap, Disconnected) as why:
            self._end(connection, str(why))
            return
        if not connection.channel.pending:
            connection.begun_at = 0.0
        elif not connection.begun_at:
            connection.begun_at = time.monotonic()

    def _watch(self, connection: _Connection) -> None:
        """Wait for what its queues are announced by now."""
        wanted = {
            vring.kick: index
            for index, vring in enumerate(connection.session.vrings)
            if vring.kick >= 0
        }
        if wanted == connection.watched:
            return
        self._unwatch(connection)
        for fd, index in wanted.items():
            self._selector.register(
                fd, selectors.EVENT_READ, lambda index=index: self._kicked(connection, index)
            )
        connection.watched = wanted

    def _unwatch(self, connection: _Connection) -> None:
        for fd in connection.watched:
            self._selector.unregister(fd)
        connection.watched = {}

    def _kicked(self, connection: _Connection, index: int) -> None:
        vring = connection.session.vrings[index]
        try:
            if not os.read(vring.kick, 8):  # a pipe whose other end is gone
                self._selector.unregister(vring.kick)
                del connection.watched[vring.kick]
        except BlockingIOError:
            pass
        except OSError as error:  # the end of a pipe that is for writing
            self._end(connection, f"the event of queue {index} cannot be read: {error}")
            return
        connection.session.process(index)

    def _process(self, connection: _Connection) -> None:
        """Look into queues that nobody announces anything in, or that have more."""
        for index, vring in enumerate(connection.session.vrings):
            if vring.is_polled or vring.more:
                connection.session.process(index)

    def _end(self, connection: _Connection, why: str) -> None:
        self._connections.remove(connection)
        self._unwatch(connection)
        self._selector.unregister(connection.channel)
        connection.session.close()
        connection.channel.close()
        if why:
            self._say(f"{connection.name} was disconnected: {why}")
