# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes plain ``xl create`` wait for us, with a lock libxl itself takes before a guest may run.

Before it reports success and unpauses, libxl stores the domain's configuration under the lock
file ``userdata-l.<domid>.<uuid>.domain-userdata-lock`` (tools/libs/light/libxl_create.c,
``domcreate_complete``; libxl_internal.c, ``libxl__lock_domain_userdata``).  While we hold it xl
waits, and if the domain is gone when it gets it, ``xl create`` fails.  Destroying, saving and
hotplug take it too, so it is held for no longer than the regions take.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

from xshmd.ports import HeldLock
from xshmd.units import DomId

XEN_LIB_DIR: Final = Path("/var/lib/xen")


class _Held:
    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd

    def release(self) -> None:
        if self._fd >= 0:
            # Unlink before close, as libxl does: who then gets the old inode sees that it is no
            # longer the file of that name, and tries again.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1


class LibxlCreationLock:
    """The real :class:`~xshmd.ports.CreationLock`."""

    def __init__(self, directory: Path = XEN_LIB_DIR) -> None:
        self._directory = directory

    def try_hold(self, domid: DomId, uuid: str) -> HeldLock | None:
        path = self._directory / f"userdata-l.{domid}.{uuid}.domain-userdata-lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours, named = os.fstat(fd), os.stat(path)
        except OSError:
            os.close(fd)
            return None
        if (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino):
            os.close(fd)
            return None
        return _Held(path, fd)

    def is_finished(self, domid: DomId, uuid: str) -> bool:
        """Return whether libxl has stored the domain's configuration: the creation is over."""
        return (self._directory / f"userdata-d.{domid}.{uuid}.libxl-json").exists()
