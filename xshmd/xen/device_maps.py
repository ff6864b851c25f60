# SPDX-License-Identifier: LGPL-2.1-or-later
"""Maps a domain's memory through a device that somebody else opened, with no more right than that.

Xen's libraries open /dev/xen/privcmd and /dev/xen/gntdev themselves.  Who is handed a descriptor
of one, as a vhost-user back-end is, must use that: it may be restricted to one domain, and whoever
sent it has shown that he may do what he asks for.  The kernel's interface is Linux'
include/uapi/xen/privcmd.h and gntdev.h.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import stat
import struct
from typing import Final

from xshmd.units import DOMID_FIRST_RESERVED, PAGE_SHIFT, DomId, Gfn
from xshmd.xen.windows import Window

PRIVCMD: Final = "/dev/xen/privcmd"
GNTDEV: Final = "/dev/xen/gntdev"


class _MapBatch(ctypes.Structure):
    """struct privcmd_mmapbatch_v2."""

    _fields_ = (
        ("num", ctypes.c_uint32),
        ("dom", ctypes.c_uint16),
        ("addr", ctypes.c_uint64),
        ("arr", ctypes.c_void_p),
        ("err", ctypes.c_void_p),
    )


_DOMID: Final = struct.Struct("=H")
_GRANTS: Final = struct.Struct("=IIQ")
"""struct ioctl_gntdev_map_grant_ref up to its array, of which its size counts one element."""
_GRANT: Final = struct.Struct("=II")
_UNMAP: Final = struct.Struct("=QII")
"""struct ioctl_gntdev_unmap_grant_ref."""


def _none(kind: str, number: int, size: int) -> int:
    """_IOC(_IOC_NONE, kind, number, size) of asm-generic/ioctl.h."""
    return size << 16 | ord(kind) << 8 | number


_MMAPBATCH_V2: Final = _none("P", 4, ctypes.sizeof(_MapBatch))
_RESTRICT: Final = _none("P", 6, _DOMID.size)
_MAP_GRANT_REF: Final = _none("G", 0, _GRANTS.size + _GRANT.size)
_UNMAP_GRANT_REF: Final = _none("G", 1, _UNMAP.size)


def open_restricted(domid: DomId) -> int:
    """Open /dev/xen/privcmd so that nothing but this domain can be reached through it.

    Returns:
        The descriptor, which is the caller's to close.

    Raises:
        OSError: It cannot be opened: this is no control domain, or not root.
    """
    fd = os.open(PRIVCMD, os.O_RDWR | os.O_CLOEXEC)
    try:
        # From here on the kernel refuses every other domain and every plain hypercall
        # (drivers/xen/privcmd.c, privcmd_ioctl_restrict()).
        fcntl.ioctl(fd, _RESTRICT, _DOMID.pack(domid))
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_frames(window: Window, fd: int, domid: DomId, first_gfn: Gfn) -> None:
    """Put frames of a domain behind a window, all of them or (on error) none.

    Args:
        window: As long as there are to be frames.
        fd: Of /dev/xen/privcmd.
        domid: The domain.
        first_gfn: Its first frame.

    Raises:
        OSError: It is another device, may not be used for this domain, or a frame is not there.
    """
    _check_device(fd, PRIVCMD)
    if not 0 <= domid < DOMID_FIRST_RESERVED:
        raise OSError(errno.EPERM, f"{domid} is not the domid of a domain")
    nr_frames = window.size_bytes >> PAGE_SHIFT
    gfns = array.array("Q", range(first_gfn, first_gfn + nr_frames))
    errors = array.array("i", bytes(4 * nr_frames))
    batch = _MapBatch(
        num=nr_frames, dom=domid, addr=window.address,
        arr=gfns.buffer_info()[0], err=errors.buffer_info()[0],
    )  # fmt: skip
    window.place(fd)
    try:
        # One call for all: on Arm and in a PVH dom0 the driver takes the pages it maps them at for
        # the whole of the mapping at once (drivers/xen/privcmd.c, alloc_empty_pages()).
        fcntl.ioctl(fd, _MMAPBATCH_V2, batch)
        if errors.tobytes().strip(b"\0"):
            code = next(-error for error in errors if error)
            raise OSError(code, os.strerror(code))
    except BaseException:
        window.withdraw()
        raise


def map_grants(window: Window, fd: int, domid: DomId, first_reference: int) -> None:
    """Put what consecutive grant references of a domain name behind a window, all or none.

    Args:
        window: As long as there are to be frames.
        fd: Of /dev/xen/gntdev.
        domid: Who granted them to this domain.
        first_reference: The first reference.

    Raises:
        OSError: It is another device, or a reference cannot be mapped for writing.
    """
    _check_device(fd, GNTDEV)
    nr_frames = window.size_bytes >> PAGE_SHIFT
    references = range(first_reference, first_reference + nr_frames)
    request = bytearray(_GRANTS.pack(nr_frames, 0, 0))
    for reference in references:
        request += _GRANT.pack(domid, reference)
    fcntl.ioctl(fd, _MAP_GRANT_REF, request)
    _, _, index = _GRANTS.unpack_from(request)
    try:
        window.place(fd, index)
    finally:
        # The descriptor lets go of the references; the mapping has them until it goes
        # (drivers/xen/gntdev.c, gntdev_put_map()).  Otherwise they would stay mapped with it.
        fcntl.ioctl(fd, _UNMAP_GRANT_REF, _UNMAP.pack(index, nr_frames, 0))


def _check_device(fd: int, path: str) -> None:
    """Raise unless the descriptor is of this device: the numbers of ioctls are not one's own."""
    about, device = os.fstat(fd), os.stat(path)
    if not stat.S_ISCHR(about.st_mode) or about.st_rdev != device.st_rdev:
        raise OSError(errno.ENODEV, f"the descriptor is not of {path}")
