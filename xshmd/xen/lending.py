# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control domain's own memory lent to guests: pages of its kernel's, and references to them.

Linux makes both by ``/dev/xen/gntalloc`` (include/uapi/xen/gntalloc.h).  libxengntshr, which wraps
it, maps the pages in the order in which it got references, and that may be any; guests are told
ranges of references, so here the order is that of the references.

As drivers/xen/gntalloc.c has it: a page is granted to one domain, when it is made, and to no other
ever; it is zeroed; all such pages together are ``xen_gntalloc.limit``, and whoever wants more gets
ENOSPC.  When the last process that has a page mapped lets go of it, its reference is ended; one
that the guest has mapped at that moment is tried again each second (``gnttab_end_foreign_access()``
in drivers/xen/grant-table.c), and until then the guest may map that page again.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from xshmd.errors import XenUnavailable
from xshmd.units import PAGE_SIZE, DomId, bytes_of, is_within
from xshmd.xen.errno_table import failure

DEVICE: Final = Path("/dev/xen/gntalloc")
LIMIT: Final = Path("/sys/module/xen_gntalloc/parameters/limit")
_HEAD: Final = struct.Struct("=HHIQ")
"""domid, flags, count, index of struct ioctl_gntalloc_alloc_gref; its gref_ids follow."""
_STRUCT_BYTES: Final = 24
"""Its size with one reference, and padding."""
_WRITABLE: Final = 1
ALLOC_GREF: Final = _STRUCT_BYTES << 16 | ord("G") << 8 | 5
"""IOCTL_GNTALLOC_ALLOC_GREF."""


class LentMemory:
    """Pages that a guest may map.  See :class:`~xshmd.ports.LentPages`.

    Args:
        view: The pages, in the order in which the kernel made them.
        made: The reference to each.

    Synchronization: none; one user at a time.
    """

    def __init__(self, view: mmap.mmap, made: Sequence[int]) -> None:
        self._view = view
        self._order = sorted(range(len(made)), key=made.__getitem__)
        self.refs = tuple(sorted(made))

    def _pieces(self, offset_bytes: int, nr_bytes: int) -> Iterator[slice]:
        if not is_within(offset_bytes, nr_bytes, bytes_of(len(self.refs))):
            raise ValueError(f"{nr_bytes} bytes at {offset_bytes} are outside the mapping")
        while nr_bytes:
            frame, inside = divmod(offset_bytes, PAGE_SIZE)
            count = min(nr_bytes, PAGE_SIZE - inside)
            start = bytes_of(self._order[frame]) + inside
            yield slice(start, start + count)
            offset_bytes, nr_bytes = offset_bytes + count, nr_bytes - count

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes:
        return b"".join(self._view[piece] for piece in self._pieces(offset_bytes, nr_bytes))

    def write(self, offset_bytes: int, data: bytes) -> None:
        done = 0
        for piece in self._pieces(offset_bytes, len(data)):
            count = piece.stop - piece.start
            self._view[piece] = data[done : done + count]
            done += count

    def wipe(self) -> None:
        for piece in self._pieces(0, bytes_of(len(self.refs))):
            self._view[piece] = bytes(PAGE_SIZE)

    def close(self) -> None:
        self._view.close()


class LendingCalls:
    """The calls of :class:`~xshmd.ports.Hypervisor` that are about dom0's own memory.

    Synchronization: any thread may call anything.
    """

    def lendable_frames(self) -> int:
        return int(LIMIT.read_text()) if LIMIT.exists() else 0

    def lend_pages(self, guest: DomId, nr_frames: int, *, readonly: bool) -> LentMemory:
        try:
            file = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise XenUnavailable(
                f"cannot open {DEVICE}: {error.strerror}", hint="modprobe xen-gntalloc"
            ) from error
        try:
            head = _HEAD.pack(guest, 0 if readonly else _WRITABLE, nr_frames, 0)
            call = bytearray(head.ljust(max(_STRUCT_BYTES, len(head) + 4 * nr_frames), b"\0"))
            fcntl.ioctl(file, ALLOC_GREF, call)
            index = _HEAD.unpack_from(call)[-1]
            # It has the file for as long as it lasts, and the kernel the pages for as long as that.
            view = mmap.mmap(file, bytes_of(nr_frames), offset=index)
        except OSError as error:
            what = "IOCTL_GNTALLOC_ALLOC_GREF"
            raise failure(what, guest, error.errno or 0, nr_frames=nr_frames) from error
        finally:
            os.close(file)
        return LentMemory(view, struct.unpack_from(f"={nr_frames}I", call, _HEAD.size))
