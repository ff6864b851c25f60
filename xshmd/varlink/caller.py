# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is being answered, for methods that give a client something which ends with the client.

The server says it once a connection; every method that the connection calls runs in its context.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol, TypeVar, cast

from xshmd.varlink.peer import Peer

T = TypeVar("T")

SO_PEERPIDFD: Final = 77
"""Linux 6.5 (include/uapi/asm-generic/socket.h); Python has no name for it yet."""


class Caller:
    """One connection's client.

    Args:
        peer: The process that opened the connection.
        open_pidfd: Returns a new descriptor of that process, or raises ProcessLookupError.
    """

    def __init__(self, peer: Peer, open_pidfd: Callable[[], int]) -> None:
        self.peer, self.open_pidfd = peer, open_pidfd
        self._kept: dict[object, Any] = {}
        self._ending = contextlib.ExitStack()

    def keep(self, key: object, make: Callable[[], AbstractContextManager[T]]) -> T:
        """Return what this client has under ``key``: made at the first use, left at its end."""
        if key not in self._kept:
            self._kept[key] = self._ending.enter_context(make())
        return cast(T, self._kept[key])

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Be the caller of everything that this task does until the block ends, and then end."""
        token = _current.set(self)
        try:
            with self._ending:
                yield
        finally:
            _current.reset(token)


_current: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller")


def current() -> Caller:
    """Return who is being answered."""
    return _current.get()


class HasOptions(Protocol):
    """A socket, as far as it matters here."""

    def getsockopt(self, level: int, optname: int) -> int: ...


def peer_pidfd(connection: HasOptions, pid: int) -> int:
    """Return a new descriptor of the process that opened a connection.

    Before Linux 6.5 it is of whatever process has that pid by now.

    Raises:
        ProcessLookupError: it has ended.
    """
    try:
        fd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise ProcessLookupError(*error.args) from error
        return os.pidfd_open(pid)
    os.set_inheritable(fd, False)
    return fd
