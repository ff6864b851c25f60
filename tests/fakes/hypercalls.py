# SPDX-License-Identifier: LGPL-2.1-or-later
"""A model of hypercalls with memory: pages that Xen may use, and what ``xen_version`` puts there.

Held to real Xen by ``contract/cases/buffers.py``; the texts are its own, as each Xen's are.
"""

from __future__ import annotations

import errno
import functools
from typing import Final

from xshmd.errors import OutOfMemory
from xshmd.units import PAGE_SIZE, is_within
from xshmd.xen.buffers import Buffers, Lent
from xshmd.xen.errno_table import failure

EXTRA_VERSION: Final = b".4"
BUILD_ID: Final = bytes(range(1, 21))
DOM0_FEATURE: Final = 11
"""XENFEAT_dom0, xen/include/public/features.h"""


class FakePages:
    """Pages of an address space that only :class:`FakeMemory` knows."""

    def __init__(self, memory: FakeMemory, address: int, nr_pages: int) -> None:
        self._memory, self.address, self.nr_pages = memory, address, nr_pages
        self.data = bytearray(nr_pages * PAGE_SIZE)

    def _window(self, offset_bytes: int, nr_bytes: int) -> slice:
        if not is_within(offset_bytes, nr_bytes, len(self.data)):
            raise ValueError(f"{nr_bytes} bytes at {offset_bytes} are outside the buffer")
        return slice(offset_bytes, offset_bytes + nr_bytes)

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes:
        return bytes(self.data[self._window(offset_bytes, nr_bytes)])

    def write(self, offset_bytes: int, data: bytes) -> None:
        self.data[self._window(offset_bytes, len(data))] = data

    def free(self) -> None:
        del self._memory.pages[self.address]  # KeyError: they were free


class FakeMemory:
    """:class:`xshmd.xen.buffers.Memory` of a process that has so many pages."""

    def __init__(self, total_pages: int = 1 << 16) -> None:
        self.total_pages = total_pages
        self.pages: dict[int, FakePages] = {}
        self._next = 0x7F00_0000_0000

    @property
    def nr_pages(self) -> int:
        return sum(each.nr_pages for each in self.pages.values())

    def allocate(self, nr_pages: int) -> FakePages:
        if self.nr_pages + nr_pages > self.total_pages:
            raise OutOfMemory("the fake has no more pages")
        pages = FakePages(self, self._next, nr_pages)
        self.pages[self._next] = pages
        self._next += (nr_pages + 1) * PAGE_SIZE  # one that is not there after each
        return pages

    def poke(self, address: int, data: bytes) -> None:
        """Write where a hypercall does; EFAULT where no page is."""
        for start, pages in self.pages.items():
            if start <= address and address + len(data) <= start + len(pages.data):
                pages.write(address - start, data)
                return
        raise failure("xen_version", None, errno.EFAULT)


class SimulatedCalls:
    """common/kernel.c do_xen_version(), for dom0."""

    @functools.cached_property
    def memory(self) -> FakeMemory:
        return FakeMemory()

    @functools.cached_property
    def buffers(self) -> Buffers:
        return Buffers(self.memory)

    def xen_version(self, subcall: int, memory: Lent | None) -> int:
        if subcall == 0:
            return 4 << 16 | 20
        if subcall == 7:
            if memory is not None:
                raise failure("xen_version", None, errno.EINVAL)
            return PAGE_SIZE
        if memory is None:
            if subcall == 10:
                return len(BUILD_ID)  # xenver_varbuf_op(): a request for the length
            raise failure("xen_version", None, errno.EFAULT)
        texts = {1: (EXTRA_VERSION, 16), 2: (b"cc", 144), 3: (b"xen-3.0-x86_64", 1024),
                 4: (b"", 64), 8: (b"", 16), 9: (b"", 1024)}  # fmt: skip
        if subcall in texts:
            text, size_bytes = texts[subcall]
            self.memory.poke(memory.address, text.ljust(size_bytes, b"\0"))
            return 0
        first = int.from_bytes(memory.read(4), "little")
        if subcall == 6:
            if first != 0:
                raise failure("xen_version", None, errno.EINVAL)
            self.memory.poke(memory.address + 4, (1 << DOM0_FEATURE).to_bytes(4, "little"))
            return 0
        if subcall == 10:
            if len(BUILD_ID) > first:
                raise failure("xen_version", None, errno.ENOBUFS)
            self.memory.poke(memory.address + 4, BUILD_ID)
            return len(BUILD_ID)
        raise failure("xen_version", None, errno.ENOSYS)
