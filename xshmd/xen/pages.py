# SPDX-License-Identifier: LGPL-2.1-or-later
"""Other domains' frames mapped in dom0, by whichever of Xen's libraries: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xshmd.units import bytes_of, is_within


class MappedPages:
    """A dom0 mapping of a domain's frames.  See :class:`~xshmd.ports.PageMap`.

    Args:
        lib: The compiled module.
        ffi: Its own ffi.
        unmap: Its call that undoes the mapping, of a handle, an address and a count.
        handle: What it was mapped by.
        address: Where it is.
        nr_frames: How much of it there is.

    Synchronization: none; one user at a time.
    """

    def __init__(
        self, lib: Any, ffi: Any, unmap: Any, handle: Any, address: Any, nr_frames: int
    ) -> None:
        self._lib, self._ffi, self._unmap, self._handle = lib, ffi, unmap, handle
        self._address, self._nr_frames = address, nr_frames

    def _window(self, offset_bytes: int, nr_bytes: int) -> Any:
        if self._address is None:
            raise ValueError("the mapping is closed")
        if not is_within(offset_bytes, nr_bytes, bytes_of(self._nr_frames)):
            raise ValueError(f"{nr_bytes} bytes at {offset_bytes} are outside the mapping")
        return self._ffi.buffer(self._ffi.cast("char *", self._address) + offset_bytes, nr_bytes)

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes:
        return bytes(self._window(offset_bytes, nr_bytes))

    def write(self, offset_bytes: int, data: bytes) -> None:
        self._window(offset_bytes, len(data))[:] = data

    def decrement(self, offset_bytes: int) -> int | None:
        if offset_bytes % 4:
            raise ValueError(f"the word at {offset_bytes} is not aligned")
        left = int(self._lib.xshm_decrement(self._ffi.from_buffer(self._window(offset_bytes, 4))))
        return None if left < 0 else left

    def fill(self, value: int) -> None:
        """Set every byte of the mapping to ``value``."""
        self._window(0, 0)
        self._lib.memset(self._address, value, bytes_of(self._nr_frames))

    def into_view(self, on_unmapped: Callable[[], None]) -> memoryview:
        """Give the mapping up to a view of it: it lasts as long as that and all made from it.

        Args:
            on_unmapped: Called when it is over, by whichever thread drops the last view; until
                then the hypervisor's own handles must stay open.
        """
        self._window(0, 0)
        address, self._address = self._address, None
        unmap, handle, nr_frames = self._unmap, self._handle, self._nr_frames

        def end(_address: Any) -> None:
            unmap(handle, address, nr_frames)
            on_unmapped()

        owned = self._ffi.gc(self._ffi.cast("char *", address), end)
        return memoryview(self._ffi.buffer(owned, bytes_of(nr_frames)))

    def wipe(self) -> None:
        self.fill(0)

    def close(self) -> None:
        if self._address is not None:
            self._unmap(self._handle, self._address, self._nr_frames)
            self._address = None

    def __enter__(self) -> MappedPages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
