# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which process is at the other end of a connection, as the kernel named it when it connected."""

from __future__ import annotations

import dataclasses
import socket
import struct
from typing import Final

import trio

_PEERCRED: Final = struct.Struct("=iII")
"""struct ucred: pid, uid, gid."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The process that connected."""

    pid: int
    """0: it is in a PID namespace that is hidden from us."""
    uid: int

    @classmethod
    def of(cls, connected: trio.socket.SocketType) -> Peer:
        """Ask the kernel who it was."""
        packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        pid, uid, _ = _PEERCRED.unpack(packed)
        return cls(pid=pid, uid=uid)
