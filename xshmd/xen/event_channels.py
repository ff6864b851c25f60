# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real :class:`~xshmd.ports.EventChannels`: doorbells go through dom0 in a thread of C.

A ring that is passed on never waits for Python: the thread reads the lines that rang from
/dev/xen/evtchn, rings the others and unmasks, without the interpreter's lock.  Rings that somebody
is to be told of come to the daemon's loop by a socket, one at a time for each line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from typing import Final, Self

import trio

from xshmd.errors import XenUnavailable
from xshmd.ports import PortStatus
from xshmd.units import DOMID_FIRST_RESERVED, DomId
from xshmd.xen import _ffi
from xshmd.xen.errno_table import failure

MAX_LINES: Final = 1 << 17
"""Ports a domain can have at the most (xen/include/public/event_channel.h, the FIFO ABI)."""
TOLD_BYTES: Final = 4096
_TELL: Final = 0xFFFFFFFF


class XenEventChannels:
    """Event channels, through Xen's own libraries.  Opening it needs root in a control domain.

    Synchronization: calls take turns; :meth:`run` and :meth:`heard` have one caller each.
    """

    def __init__(self) -> None:
        self._ffi, self._lib = _ffi.evtchn()
        error = self._ffi.new("int *")
        self._relay = self._lib.xshm_relay_open(MAX_LINES, error)
        if self._relay == self._ffi.NULL:
            raise XenUnavailable(
                f"cannot open /dev/xen/evtchn: {os.strerror(error[0])}",
                hint="load the module xen-evtchn; be root in a Xen control domain",
            )
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give every line up; may be called again without harm."""
        if self._relay != self._ffi.NULL:
            self._lib.xshm_relay_close(self._relay)
            self._relay = self._ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- ports of guests --------------------------------------------------------------------------

    def allocate(self, domid: DomId, remote: DomId) -> int:
        with self._lock:
            port: int = self._lib.xshm_evtchn_allocate(self._relay, _guest(domid), remote)
        if port < 0:
            raise failure("EVTCHNOP_alloc_unbound", domid, -port)
        return port

    def status(self, domid: DomId, port: int) -> PortStatus | None:
        remote, remote_port = self._ffi.new("uint32_t *"), self._ffi.new("uint32_t *")
        with self._lock:
            found: int = self._lib.xshm_evtchn_status(
                self._relay, _guest(domid), port, remote, remote_port
            )
        if found == -errno.EINVAL:  # beyond the ports the domain has used so far
            return None
        if found < 0:
            raise failure("EVTCHNOP_status", domid, -found)
        if found not in (self._lib.EVTCHNSTAT_unbound, self._lib.EVTCHNSTAT_interdomain):
            return None
        return PortStatus(DomId(remote[0]), remote_port[0])

    # -- lines of ours ----------------------------------------------------------------------------

    def bind(self, domid: DomId, port: int) -> int:
        line: int = self._lib.xshm_relay_bind(self._relay, _guest(domid), port)
        if line < 0:
            raise failure("EVTCHNOP_bind_interdomain", domid, -line, port=port)
        return line

    def unbind(self, line: int) -> None:
        self._check("IOCTL_EVTCHN_UNBIND", self._lib.xshm_relay_unbind(self._relay, line))

    def notify(self, line: int) -> None:
        self._check("IOCTL_EVTCHN_NOTIFY", self._lib.xshm_relay_notify(self._relay, line))

    def pass_on(self, line: int, to: int | None) -> None:
        target = _TELL if to is None else to
        self._check("xshm_relay_to", self._lib.xshm_relay_to(self._relay, line, target))

    def rings(self, line: int) -> int:
        return int(self._lib.xshm_relay_rings(self._relay, line))

    def held_up(self) -> int:
        return int(self._lib.xshm_relay_held(self._relay))

    @staticmethod
    def _check(call: str, rc: int) -> None:
        if rc < 0:
            raise failure(call, None, -rc)

    # -- the relay --------------------------------------------------------------------------------

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_thread)
            try:
                await trio.sleep_forever()
            finally:
                self._lib.xshm_relay_stop(self._relay)

    async def _run_thread(self) -> None:
        # Not abandoned when cancelled: it ends by xshm_relay_stop(), and uses what close() frees.
        rc = await trio.to_thread.run_sync(
            self._lib.xshm_relay_run, self._relay, limiter=trio.CapacityLimiter(1)
        )
        self._check("xshm_relay_run", rc)

    async def heard(self) -> tuple[int, ...]:
        told = self._lib.xshm_relay_fd(self._relay)
        while True:
            await trio.lowlevel.wait_readable(told)
            with contextlib.suppress(BlockingIOError):
                data = os.read(told, TOLD_BYTES)
                lines = struct.unpack(f"={len(data) // 4}I", data)
                for line in lines:
                    # A line given up meanwhile is nobody's, and cannot be unmasked.
                    self._lib.xshm_relay_unmask(self._relay, line)
                return lines


def _guest(domid: DomId) -> int:
    if not 0 <= domid < DOMID_FIRST_RESERVED:
        raise ValueError(f"{domid:#x} is not a domain")
    return int(domid)
