#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A scenario must see what Xen itself says, and see it at once: this answers from inside dom0.

    xen-probe.py serve              one JSON question a line in, one JSON answer a line out
    xen-probe.py kill-when PID MOMENT
                                    kill -9 PID at the moment xenstore shows; says "watching" first

`serve` lives as long as the machine does, since starting Python costs seconds under emulation. It
uses xshmd's own binding, but nothing of its engine: what it says is what Xen says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xshmd.units import DomId, Gfn

STORE_SOCKET = "/run/xenstored/socket"
DIRECTORY, READ, ERROR, IS_INTRODUCED = 1, 2, 16, 17
KILL_LIMIT_S = 150.0


class XenStore:
    """The three questions to xenstored that are asked here (xen/include/public/io/xs_wire.h)."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(STORE_SOCKET)

    def ask(self, kind: int, payload: str) -> bytes | None:
        data = payload.encode() + b"\0"
        self._socket.sendall(struct.pack("<IIII", kind, 1, 0, len(data)) + data)
        got, _, _, length = struct.unpack("<IIII", self._exactly(16))
        answer = self._exactly(length)
        return None if got == ERROR else answer

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise ConnectionError("xenstored closed the connection")
            data += piece
        return data

    def children(self, path: str) -> list[str]:
        answer = self.ask(DIRECTORY, path)
        return [name.decode() for name in (answer or b"").split(b"\0") if name]

    def documents(self, path: str) -> list[dict[str, Any]]:
        """The JSON records below a node."""
        texts = [self.ask(READ, f"{path}/{name}") for name in self.children(path)]
        return [json.loads(text) for text in texts if text]


def is_window_in(store: XenStore, phase: str) -> bool:
    """Whether a sealed group stands still for a change that has come to this phase."""
    return any(window["phase"] == phase for window in store.documents("/xshmd/windows"))


# The moments of a guest's way through the gate, and of a set of changes to guests, as the daemon's
# own journal shows them.
MOMENTS: dict[str, Callable[[XenStore], bool]] = {
    "held": lambda store: bool(store.children("/xshmd/guests")),
    "holder": lambda store: any(h["domid"] >= 0 for h in store.documents("/xshmd/holders")),
    "mapping": lambda store: any(
        guest["state"] == "mapping" for guest in store.documents("/xshmd/guests")
    ),
    "populating": lambda store: bool(store.children("/xshmd/regions")),
    "populated": lambda store: any(r["ready"] for r in store.documents("/xshmd/regions")),
    "changing": lambda store: bool(store.children("/xshmd/changes")),
    "changing-maps": lambda store: any(
        part["mapping"]
        for change in store.children("/xshmd/changes")
        for part in store.documents(f"/xshmd/changes/{change}")
    ),
    "window-preparing": lambda store: is_window_in(store, "preparing"),
    "window-swapping": lambda store: is_window_in(store, "swapping"),
    "published": lambda store: any(
        store.children(f"/local/domain/{guest['domid']}/xshm")
        for guest in store.documents("/xshmd/guests")
    ),
}


def kill_when(pid: int, moment: str) -> int:
    """Kill the process as soon as the moment is there; 1 if it never came."""
    store, reached = XenStore(), MOMENTS[moment]
    print("watching", flush=True)
    deadline = time.monotonic() + KILL_LIMIT_S
    while not reached(store):
        if time.monotonic() > deadline:
            print(f"never saw {moment}", flush=True)
            return 1
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    print(f"killed at {moment}", flush=True)
    return 0


class Probe:
    """Everything `serve` answers; each public method is a question."""

    def __init__(self) -> None:
        # Only here: kill-when must start fast.
        from xshmd.varlink.client import Client
        from xshmd.xen import _ffi
        from xshmd.xen.hypervisor import XenHypervisor

        self._xen = XenHypervisor()
        self._ffi, self._lib = _ffi.xenctrl()
        self._xc = self._lib.xshm_xc_open()
        self._new_client = Client
        self._store = XenStore()

    def free_pages(self) -> int:
        return self._xen.host_info().free_pages

    def domains(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(info) for info in self._xen.domains()]

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Ask the daemon, over Varlink."""
        # A new connection: the daemon may be another by now.
        with self._new_client(timeout_s=90) as client:
            return client.call(method, **parameters)

    def read(self, domid: DomId, gfn: Gfn, offset: int, length: int) -> str:
        with self._xen.map_pages(domid, gfn, 1, writable=False) as page:
            return page.read(offset, length).hex()

    def write(self, domid: DomId, gfn: Gfn, offset: int, data: str) -> None:
        with self._xen.map_pages(domid, gfn, 1, writable=True) as page:
            page.write(offset, bytes.fromhex(data))

    def nonzero_bytes(self, domid: DomId, gfn: Gfn, nr_frames: int) -> int:
        """How many bytes of these frames are not 0."""
        with self._xen.map_pages(domid, gfn, nr_frames, writable=False) as pages:
            data = pages.read(0, nr_frames << 12)
        return len(data) - data.count(0)

    def map_once(self, domid: DomId, gfn: Gfn, nr_frames: int) -> None:
        """Map these frames into dom0, all at the same time, and let go of them."""
        self._xen.map_pages(domid, gfn, nr_frames, writable=False).close()

    def populated(self, domid: DomId, gfns: list[Gfn]) -> list[int]:
        return list(self._xen.populated_frames(domid, gfns))

    def populate(self, domid: DomId, gfn: Gfn, nr_frames: int) -> str:
        """Try to give a domain memory; the name of the error, or an empty text if it got it."""
        from xshmd.errors import XshmError

        try:
            self._xen.populate(domid, gfn, nr_frames)
        except XshmError as error:
            return type(error).__name__
        return ""

    def shut_down(self, domid: DomId, reason: int) -> None:
        """Let a domain end as if by itself; reasons: xen/include/public/sched.h."""
        self._xen.shut_down(domid, reason)

    def take_free_pages(self, domid: DomId, leave: int) -> int:
        """Have a domain's paging pool take the host's free memory; how many pages are left."""
        free = self._xen.host_info().free_pages
        pool_bytes = self._xen.paging_pool_bytes(domid)
        self._xen.set_paging_pool_bytes(domid, pool_bytes + ((free - leave) << 12))
        return self._xen.host_info().free_pages

    def event_channel_errno(self, domid: DomId) -> int:
        """One attempt to allocate an event channel in a domain: the errno, 0 if there is one.

        With max_evtchn_port=0 it must be ENOSPC. Nothing further is tried on a holder, ever.
        """
        port = self._lib.xc_evtchn_alloc_unbound(self._xc, domid, 0)
        return 0 if port >= 0 else int(self._ffi.errno)

    def pause_count(self, domid: DomId) -> int:
        """How many pauses are on a paused domain: Xen takes 255 and refuses the next."""
        from xshmd.errors import HypercallFailed

        taken = 0
        try:
            while taken < 256:
                self._xen.pause(domid)
                taken += 1
        except HypercallFailed:
            pass
        for _ in range(taken):
            self._xen.unpause(domid)
        return 255 - taken

    def is_introduced(self, domid: DomId) -> bool:
        return self._store.ask(IS_INTRODUCED, str(domid)) == b"T\0"


def serve() -> int:
    """Answer until there are no more questions."""
    probe = Probe()
    print(json.dumps({"answer": "ready"}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"answer": getattr(probe, question["ask"])(*question["with"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


def main() -> int:
    """Do what the first word says."""
    if sys.argv[1:2] == ["kill-when"]:
        return kill_when(int(sys.argv[2]), sys.argv[3])
    return serve()


if __name__ == "__main__":
    sys.exit(main())
