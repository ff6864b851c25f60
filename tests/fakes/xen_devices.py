# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stands for /dev/xen/privcmd and /dev/xen/gntdev: domains' memory is memfds of this process."""

from __future__ import annotations

import errno
import os

from xshmd.units import PAGE_SHIFT, DomId, Gfn
from xshmd.xen.windows import Window


class XenDevices:
    """Implements :class:`xshmd.vhost_user.memory.Devices`; its descriptors work with it alone."""

    def __init__(self) -> None:
        self._frames: dict[DomId, tuple[Gfn, int, int]] = {}
        self._allowed: dict[int, DomId | None] = {}
        """By inode of the descriptor: the one domain it may be used for, or all."""

    def put(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        """Give a domain frames, or references; return a memfd of them."""
        fd = os.memfd_create(f"domain{domid}")
        os.ftruncate(fd, nr_frames << PAGE_SHIFT)
        self._frames[domid] = (first_gfn, nr_frames, fd)
        return fd

    def take(self, domid: DomId) -> None:
        """End a domain."""
        os.close(self._frames.pop(domid)[2])

    def close(self) -> None:
        for domid in tuple(self._frames):
            self.take(domid)

    def open(self, domid: DomId | None = None) -> int:
        """Open a device, restricted to one domain or not."""
        fd = os.memfd_create("device")
        self._allowed[os.fstat(fd).st_ino] = domid
        return fd

    def open_restricted(self, domid: DomId) -> int:
        return self.open(domid)

    def map_frames(self, window: Window, fd: int, domid: DomId, first_gfn: Gfn) -> None:
        inode = os.fstat(fd).st_ino
        if inode not in self._allowed:
            raise OSError(errno.ENODEV, "the descriptor is not of /dev/xen/privcmd")
        if self._allowed[inode] not in (None, domid):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        self._place(window, domid, first_gfn)

    def map_grants(self, window: Window, fd: int, domid: DomId, first_reference: int) -> None:
        if os.fstat(fd).st_ino not in self._allowed:
            raise OSError(errno.ENODEV, "the descriptor is not of /dev/xen/gntdev")
        self._place(window, domid, Gfn(first_reference))

    def _place(self, window: Window, domid: DomId, first: Gfn) -> None:
        if domid not in self._frames:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        there, nr_frames, memory = self._frames[domid]
        if not there <= first <= first + (window.size_bytes >> PAGE_SHIFT) <= there + nr_frames:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        window.place(memory, (first - there) << PAGE_SHIFT)
