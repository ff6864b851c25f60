# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program's membership of a region: told to the daemon first, and the last thing to go."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Final

from xshmd.client.mapping import Opener, mapper_for
from xshmd.client.ranges import Part, Whereabouts, part_of
from xshmd.errors import DaemonUnreachable, UsageError, XshmError
from xshmd.model import Prot
from xshmd.units import bytes_of
from xshmd.varlink.client import Client

RENEW_S: Final = 0.5
"""How often a lease that the daemon's end cut off is asked for again."""
NOT_IN_TIME: Final = ""


class Lease:
    """This process' membership of a region, from its making until it is closed or dies.

    While it lasts no frame of the region is given back to the host, so what is mapped is the
    region.  That it is wanted back is only told (:meth:`wait_ending`): nobody can take memory out
    of a process but the process.  A child that is forked has neither the memory nor the lease.

    Synchronization: none; use one per thread.
    """

    def __init__(
        self, region_id: str, prot: Prot, *, path: str, timeout_s: float, xen: Opener
    ) -> None:
        self.region_id = region_id
        self.prot = prot
        self._xen = xen
        self._client = Client(path, timeout_s)
        self._ending = NOT_IN_TIME
        self._nr_mapped = 0
        self._is_closed = False
        self._pid = os.getpid()
        self._where = self._begin()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lease of {self.region_id}, {self.prot}>"

    @property
    def size_bytes(self) -> int:
        """How large the region is."""
        return bytes_of(self._where.nr_frames)

    def fileno(self) -> int:
        """Return a descriptor that is readable when :meth:`poll` has something to say."""
        return self._client.fileno()

    @contextlib.contextmanager
    def map(self, *, offset_bytes: int = 0, size_bytes: int | None = None) -> Iterator[memoryview]:
        """Map the region, or a part of it, for the body.

        Everything made from the memory (slices, arrays) has to be gone when the body ends; what is
        not stays mapped, and the lease with it, until it is.

        Args:
            offset_bytes: Where in the region the memory begins.
            size_bytes: How long it is; None: to the region's end.

        Raises:
            UsageError: it is not in the region, or the lease is closed.
            Conflict, HypercallFailed, XenUnavailable: it cannot be mapped.
            BufferError: at the end of the body: something made from the memory is left.
        """
        mapping = _Mapping()
        memory = self._map(part_of(self.size_bytes, offset_bytes, size_bytes), mapping)
        try:
            yield memory
        finally:
            # What numpy and others export of it keeps it from being released at all.
            with contextlib.suppress(BufferError):
                memory.release()
        if not mapping.is_over:
            raise BufferError(
                f"something made from the memory of region {self.region_id} is still in use: it"
                " stays mapped until that is gone"
            )

    def map_until_unused(
        self, *, offset_bytes: int = 0, size_bytes: int | None = None
    ) -> memoryview:
        """Map the region, or a part of it, until the memory and all made from it are gone."""
        return self._map(part_of(self.size_bytes, offset_bytes, size_bytes), _Mapping())

    def _map(self, part: Part, mapping: _Mapping) -> memoryview:
        if self._is_closed:
            raise UsageError(f"the lease of region {self.region_id} is closed")
        mapper = mapper_for(self._where)

        def unmapped() -> None:
            mapping.is_over = True
            self._nr_mapped -= 1
            if self._is_closed and not self._nr_mapped:
                self._hang_up()

        self._nr_mapped += 1
        writable = self.prot is Prot.RW
        try:
            memory = mapper(self._xen, self._where, part, writable, unmapped)
        except BaseException:
            self._nr_mapped -= 1
            raise
        return memory if writable else memory.toreadonly()

    def wait_ending(self, timeout_s: float | None = None) -> str:
        """Wait until the region is wanted back; return why, or nothing if it is not in time.

        The daemon may be started anew meanwhile: the lease is then taken up again.

        Args:
            timeout_s: How long to wait; None: for ever; 0 only looks.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = RENEW_S if deadline is None else min(RENEW_S, deadline - time.monotonic())
            try:
                if why := self.poll(max(left, 0.0)):
                    return why
            except DaemonUnreachable:
                time.sleep(max(0.0, left))
            if deadline is not None and time.monotonic() >= deadline:
                return NOT_IN_TIME

    def poll(self, timeout_s: float = 0.0) -> str:
        """Return why the region is wanted back, or nothing if it is not.

        Raises:
            DaemonUnreachable: no daemon answers; the lease holds, as this process lives.
        """
        if self._ending:
            return self._ending
        try:
            reply = self._client.next_reply(timeout_s)
        except DaemonUnreachable:
            return self._renew()
        if reply:
            self._ending = reply.get("ending") or NOT_IN_TIME
        return self._ending

    def _renew(self) -> str:
        """Take the lease up with a daemon that was started anew."""
        try:
            where = self._begin()
        except DaemonUnreachable:
            raise
        except XshmError as refusal:
            self._ending = refusal.message
        else:
            if where != self._where:
                self._ending = f"the memory of region {self.region_id} is another now"
        return self._ending

    def _begin(self) -> Whereabouts:
        try:
            reply = self._client.begin("LeaseRegion", id=self.region_id, prot=self.prot.value)
            return Whereabouts.of(reply.get("mapping") or {})
        except BaseException:
            self._client.close()
            raise

    def close(self) -> None:
        """End the lease, at once or when the last of its memory is unmapped."""
        if self._is_closed:
            return
        self._is_closed = True
        # A daemon that was started anew knows of the lease, but not from us: tell it first.
        if os.getpid() == self._pid:
            with contextlib.suppress(XshmError):
                self.poll()
        if not self._nr_mapped:
            self._hang_up()

    def _hang_up(self) -> None:
        # A forked child has a copy of the connection: it must not keep the lease up, nor end it.
        if os.getpid() == self._pid:
            self._client.hang_up()
        else:
            self._client.close()


class _Mapping:
    """One mapping of a lease's memory, and whether it is over."""

    def __init__(self) -> None:
        self.is_over = False
