# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's end of the keeper's socket: :class:`xshmd.ports.Keeper` in another process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from xshmd.errors import Conflict
from xshmd.keeper import wire
from xshmd.units import DomId, Gfn

TIMEOUT_S: Final = 60.0
"""How long the keeper may take for a call: it maps or copies some thousand frames at the most."""


class KeeperClient:
    """See the module.

    Synchronization: any thread may call anything; calls take turns.
    """

    def __init__(self, path: Path = wire.SOCKET, *, timeout_s: float = TIMEOUT_S) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._replies: BinaryIO | None = None

    def close(self) -> None:
        """Hang up; the keeper goes on keeping."""
        if self._replies is not None:
            self._replies.close()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._replies = None

    def kept(self) -> Mapping[str, int]:
        # The first call of any piece of work: only here is it no matter that it is another keeper.
        try:
            found = self._call("kept")
        except Conflict:
            found = self._call("kept")
        return {str(name): int(nr_frames) for name, nr_frames in found.items()}

    def keep(self, name: str, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        self._call("keep", name=name, domid=domid, first_gfn=first_gfn, nr_frames=nr_frames)

    def copy(self, name: str, source: str, first_frame: int, nr_frames: int) -> None:
        self._call("copy", name=name, source=source, first_frame=first_frame, nr_frames=nr_frames)

    def lend(
        self, name: str, source: str, domid: DomId, nr_frames: int, *, readonly: bool
    ) -> Sequence[tuple[int, int]]:
        found = self._call(
            "lend", name=name, source=source, domid=domid, nr_frames=nr_frames, readonly=readonly
        )
        return [(int(first), int(count)) for first, count in found]

    def park(self, name: str, source: str, nr_frames: int) -> None:
        self._call("park", name=name, source=source, nr_frames=nr_frames)

    def read(self, name: str, offset_bytes: int, nr_bytes: int) -> bytes:
        found = self._call("read", name=name, offset_bytes=offset_bytes, nr_bytes=nr_bytes)
        return bytes(found)

    def write(self, name: str, offset_bytes: int, data: bytes) -> None:
        self._call("write", name=name, offset_bytes=offset_bytes, data=data)

    def drop(self, name: str, *, wipe: bool) -> None:
        with contextlib.suppress(Conflict):  # without a keeper nothing is kept
            self._call("drop", name=name, wipe=wipe)

    def _call(self, what: str, **arguments: Any) -> Any:
        with self._lock:
            try:
                reply = wire.message(self._exchange(wire.line({"call": what} | arguments)))
            except (OSError, ValueError, EOFError) as broken:
                self.close()
                raise Conflict(
                    "xshmd-keeper, without which nothing can be sealed, nor lent by dom0, does not"
                    f" answer at {self._path}: {broken}",
                    hint="systemctl start xshmd-keeper",
                ) from broken
        if "error" in reply:
            raise wire.error_from(reply["error"])
        return reply["reply"]

    def _exchange(self, call: bytes) -> bytes:
        if self._socket is None or self._replies is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(self._timeout_s)
            self._socket.connect(str(self._path))
            self._replies = self._socket.makefile("rb")
        self._socket.sendall(call)
        reply = self._replies.readline()
        if not reply.endswith(b"\n"):
            raise EOFError("it hung up")
        return reply
