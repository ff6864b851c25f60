# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two daemons would undo each other's work, so the second ends before it has done anything.

The socket cannot say so in time: it is opened when the engine has recovered, and may be another.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xshmd.errors import Conflict, XenUnavailable

LOCKED: Final = Path("/var/lib/xen")
"""libxl's directory, of which every machine has one.  libxl itself locks only files in it."""


@contextlib.contextmanager
def alone(directory: Path = LOCKED) -> Iterator[None]:
    """Be the only daemon of this machine for as long as the body runs; the kernel sees to it.

    Raises:
        Conflict: another one runs.
        XenUnavailable: the directory is not there, or not for us.
    """
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise XenUnavailable(
            f"cannot open {directory}: {error.strerror}",
            hint="be root in a control domain with Xen's tools installed",
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another xshmd runs on this machine (it has {directory} locked)",
                hint="see `systemctl status xshmd`, or `fuser` that directory",
            ) from None
        yield
    finally:
        os.close(lock)
