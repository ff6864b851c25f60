# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which process a call comes from, for the few methods that are about their caller.

It is in the context of the task that serves a connection, as the log's knowledge of it is.
"""

from __future__ import annotations

import contextvars
import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The process at the other end of a connection, as the kernel named it when it connected."""

    pid: int
    """0: it is in a PID namespace that is hidden from us."""
    uid: int


_PEER: contextvars.ContextVar[Peer] = contextvars.ContextVar("xshmd_peer")


def set_peer(peer: Peer) -> None:
    """Say who is served in this task from now on."""
    _PEER.set(peer)


def current_peer() -> Peer:
    """Return who is served in this task; LookupError if nobody is."""
    return _PEER.get()
