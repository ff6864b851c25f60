# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface's methods about hypercall buffers: each client has its own, for its life.

The buffers of a client are freed when its connection ends, and when the process that opened it
does, though a child of it may have the connection still.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

import structlog
import trio

from xshmd.varlink import caller
from xshmd.varlink.caller import Caller
from xshmd.varlink.dispatch import InvalidParameter, Method, Stream
from xshmd.varlink.wire import Parameters
from xshmd.xen.buffers import BufferId, Buffers, Lent, MemRef, Owner
from xshmd.xen.safe_calls import make_safe_call

MAX_READ_BYTES: Final = 64 * 1024

log = structlog.get_logger()


class Xen(Protocol):
    """What has buffers and makes hypercalls with them."""

    @property
    def buffers(self) -> Buffers: ...

    def xen_version(self, subcall: int, memory: Lent | None) -> int: ...


class BufferMethods:
    """Answers them."""

    def __init__(self, xen: Xen) -> None:
        self._xen = xen
        self._nursery: trio.Nursery | None = None

    def methods(self) -> dict[str, Method | Stream]:
        """Return the method table, by the names of the interface definition."""
        return {
            "AllocateBuffer": Method(run=self._allocate_buffer),
            "FreeBuffer": Method(run=self._free_buffer),
            "AllocateMemory": Method(run=self._allocate_memory),
            "FreeMemory": Method(run=self._free_memory),
            "ReadMemory": Method(run=self._read),
            "WriteMemory": Method(run=self._write),
            "CallXen": Method(run=self._call_xen),
        }

    def counters(self) -> Mapping[str, int]:
        """Return how many hypercall buffers there are, the daemon's own included."""
        buffers = self._xen.buffers
        return {"buffers": buffers.nr_buffers, "buffer_pages": buffers.nr_pages}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch for the end of clients' processes; for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    # -- whose buffers they are -----------------------------------------------------------------

    def _owner(self) -> Owner:
        client = caller.current()
        return client.keep(self, lambda: self._new_owner(client))

    @contextlib.contextmanager
    def _new_owner(self, client: Caller) -> Iterator[Owner]:
        with self._xen.buffers.owner(f"client {client.peer.pid}") as owner:
            watch = trio.CancelScope()
            try:
                pidfd = client.open_pidfd()
            except ProcessLookupError:
                owner.close()
            else:
                assert self._nursery is not None
                self._nursery.start_soon(self._end_with_process, watch, pidfd, owner)
            try:
                yield owner
            finally:
                watch.cancel()

    @staticmethod
    async def _end_with_process(watch: trio.CancelScope, pidfd: int, owner: Owner) -> None:
        try:
            with watch:
                await trio.lowlevel.wait_readable(pidfd)  # pidfd_open(2): when it has ended
                log.info("buffers freed, their process ended", owner=owner.name)
                owner.close()
        finally:
            os.close(pidfd)

    # -- the methods ----------------------------------------------------------------------------

    async def _allocate_buffer(self, parameters: Parameters) -> Parameters:
        return {"buffer": self._owner().alloc_buf(parameters["pageCount"])}

    async def _free_buffer(self, parameters: Parameters) -> Parameters:
        self._owner().free_buf(BufferId(parameters["buffer"]))
        return {}

    async def _allocate_memory(self, parameters: Parameters) -> Parameters:
        buffer = BufferId(parameters["buffer"])
        return {"reference": self._owner().alloc_mem(buffer, parameters["byteCount"])}

    async def _free_memory(self, parameters: Parameters) -> Parameters:
        self._owner().free_mem(MemRef(parameters["reference"]))
        return {}

    async def _read(self, parameters: Parameters) -> Parameters:
        nr_bytes = parameters["byteCount"]
        if not 0 <= nr_bytes <= MAX_READ_BYTES:
            raise InvalidParameter("byteCount")
        reference = MemRef(parameters["reference"])
        data = self._owner().read(reference, parameters["offsetBytes"], nr_bytes)
        return {"data": base64.b64encode(data).decode("ascii")}

    async def _write(self, parameters: Parameters) -> Parameters:
        try:
            data = base64.b64decode(parameters["data"], validate=True)
        except (binascii.Error, ValueError):
            raise InvalidParameter("data") from None
        self._owner().write(MemRef(parameters["reference"]), parameters["offsetBytes"], data)
        return {}

    async def _call_xen(self, parameters: Parameters) -> Parameters:
        reference = parameters["reference"]
        result = make_safe_call(
            self._xen, self._owner(), parameters["call"],
            None if reference is None else MemRef(reference),
        )  # fmt: skip
        return {"result": result}
