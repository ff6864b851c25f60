# SPDX-License-Identifier: LGPL-2.1-or-later
"""Xen as a program in dom0 sees it that maps a holder's frames: bytes, and who owns them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

from xshmd.errors import DomainGone
from xshmd.machine import DomainInfo
from xshmd.units import PAGE_SIZE, DomId, Gfn, is_within


class Dom0Memory:
    """One holder's frames from :attr:`first_gfn` on; call it to open what a client maps with.

    Like :meth:`xshmd.xen.hypervisor.MappedPages.into_view`, a view keeps its mapping.
    """

    def __init__(self, uuid: str, domid: int, first_gfn: int, nr_frames: int) -> None:
        self.uuid, self.domid, self.first_gfn = uuid, domid, first_gfn
        self.content = bytearray(nr_frames * PAGE_SIZE)
        self.nr_open = 0
        """How many connections to Xen are open."""
        self.nr_mapped = 0
        """How many mappings there are."""

    def __call__(self) -> Dom0Memory:
        self.nr_open += 1
        return self

    def close(self) -> None:
        assert self.nr_open > 0
        self.nr_open -= 1

    def domain_info(self, domid: DomId) -> DomainInfo | None:
        if domid != self.domid:
            return None
        return DomainInfo(
            domid=domid, uuid=self.uuid, hvm=True, hap=True, paused=True, shut_down=False,
            shutdown_reason=0, dying=False, tot_pages=1, max_pages=0, max_vcpu_id=0,
            nr_online_vcpus=0, cpu_time_ns=0, gpaddr_bits=40,
        )  # fmt: skip

    def map_pages(self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool) -> Pages:
        start, size = (first_gfn - self.first_gfn) * PAGE_SIZE, nr_frames * PAGE_SIZE
        if domid != self.domid or not is_within(start, size, len(self.content)):
            raise DomainGone("no such frames", call="xenforeignmemory_map", errno=3)
        self.nr_mapped += 1
        return Pages(self, start, start + size)


class Pages:
    """What map_pages returns."""

    def __init__(self, memory: Dom0Memory, start: int, end: int) -> None:
        self._memory, self._start, self._end = memory, start, end

    def into_view(self, on_unmapped: Callable[[], None]) -> memoryview:
        size = self._end - self._start
        data = (ctypes.c_ubyte * size).from_buffer(self._memory.content, self._start)
        weakref.finalize(data, self._unmapped, on_unmapped).atexit = False
        return memoryview(data).cast("B")

    def _unmapped(self, on_unmapped: Callable[[], None]) -> None:
        self.close()
        on_unmapped()

    def close(self) -> None:
        self._memory.nr_mapped -= 1
