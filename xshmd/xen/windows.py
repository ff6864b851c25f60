# SPDX-License-Identifier: LGPL-2.1-or-later
"""A range of this process's addresses behind which memory can be put, and taken away again.

What the program holds are memoryviews of it, and they outlive the memory: once it is withdrawn they
show zeros of nobody's.  So memory can go the moment another says so, whatever the program is
doing with it, and no address of it is ever somebody else's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Final

from xshmd.units import is_within

MAP_FIXED: Final = 0x10
MAP_NORESERVE: Final = 0x4000
"""Both from Linux' asm-generic/mman.h and the same on x86 and Arm; Python names neither."""
_ACCESS: Final = mmap.PROT_READ | mmap.PROT_WRITE
_NOTHING: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
_FAILED: Final = ctypes.c_void_p(-1).value

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
)  # fmt: skip


class Window:
    """A range of addresses, at first with nothing behind it.

    Synchronization: none; views may be used from any thread.

    Args:
        size_bytes: How long it is; a multiple of the page size.
    """

    def __init__(self, size_bytes: int) -> None:
        self._range = mmap.mmap(-1, size_bytes, flags=_NOTHING, prot=_ACCESS)
        self.size_bytes = size_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._range))
        """Where it is in this process."""

    def place(self, fd: int, offset_bytes: int = 0) -> None:
        """Put what a file descriptor stands for behind all of it, shared and writable.

        Raises:
            OSError: It cannot be mapped; the window has nothing behind it.
        """
        try:
            self._replace(mmap.MAP_SHARED, fd, offset_bytes)
        except OSError:
            # A failed MAP_FIXED may have unmapped what was there before.
            self.withdraw()
            raise

    def withdraw(self) -> None:
        """Take away what is behind it."""
        self._replace(_NOTHING, -1, 0)

    def view(self, offset_bytes: int = 0, size_bytes: int | None = None) -> memoryview:
        """Return some of its bytes, to read and write."""
        end = self.size_bytes if size_bytes is None else offset_bytes + size_bytes
        if not is_within(offset_bytes, end - offset_bytes, self.size_bytes):
            raise ValueError(f"bytes {offset_bytes} to {end} are outside the window")
        return memoryview(self._range)[offset_bytes:end]

    def close(self) -> None:
        """Withdraw the memory, and free the range once no view of it is left.

        May be called again without harm.
        """
        if not self._range.closed:
            self.withdraw()
            # A view keeps the range: it is freed with the last of them.
            with contextlib.suppress(BufferError):
                self._range.close()

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replace(self, flags: int, fd: int, offset_bytes: int) -> None:
        done = _libc.mmap(
            self.address, self.size_bytes, _ACCESS, flags | MAP_FIXED, fd, offset_bytes
        )
        if done == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
