# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages for hypercall buffers from libxencall, the only ones that cannot fault while Xen uses them.

They are pages of /dev/xen/hypercall, which Linux neither moves nor gives to a child
(tools/libs/call/linux.c, Linux drivers/xen/privcmd-buf.c); ordinary memory, even locked, may be
migrated in the middle of a hypercall, which then fails with EFAULT.
"""

from __future__ import annotations

from typing import Any

from xshmd.errors import OutOfMemory
from xshmd.units import bytes_of, is_within


class CallPages:
    """Some of them.  See :class:`xshmd.xen.buffers.Pages`.

    Synchronization: none; :class:`xshmd.xen.buffers.Buffers` has its own.
    """

    def __init__(self, lib: Any, ffi: Any, call: Any, start: Any, nr_pages: int) -> None:
        self._lib, self._ffi, self._call = lib, ffi, call
        self._start, self._nr_pages = start, nr_pages
        self.address = int(ffi.cast("uintptr_t", start))

    def _window(self, offset_bytes: int, nr_bytes: int) -> Any:
        if not is_within(offset_bytes, nr_bytes, bytes_of(self._nr_pages)):
            raise ValueError(f"{nr_bytes} bytes at {offset_bytes} are outside the buffer")
        return self._ffi.buffer(self._ffi.cast("char *", self._start) + offset_bytes, nr_bytes)

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes:
        return bytes(self._window(offset_bytes, nr_bytes))

    def write(self, offset_bytes: int, data: bytes) -> None:
        self._window(offset_bytes, len(data))[:] = data

    def free(self) -> None:
        self._lib.xencall_free_buffer_pages(self._call, self._start, self._nr_pages)
        self._nr_pages = 0


class CallMemory:
    """libxencall's buffers.  See :class:`xshmd.xen.buffers.Memory`.

    Args:
        lib, ffi: The binding of the stable libraries.
        call: An open ``xencall_handle``, which must outlive all pages.
    """

    def __init__(self, lib: Any, ffi: Any, call: Any) -> None:
        self._lib, self._ffi, self._call = lib, ffi, call

    def allocate(self, nr_pages: int) -> CallPages:
        start = self._lib.xencall_alloc_buffer_pages(self._call, nr_pages)
        if start == self._ffi.NULL:
            raise OutOfMemory(
                f"no hypercall buffer of {nr_pages} pages could be had",
                hint="dom0 is out of memory: give it more, or end something in it",
            )
        # libxencall has zeroed them: tools/libs/call/buffer.c, xencall_alloc_buffer_pages().
        return CallPages(self._lib, self._ffi, self._call, start, nr_pages)
