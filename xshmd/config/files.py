# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads configuration files, whatever they turn out to be: nothing here hangs or fills memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from xshmd.errors import ConfigUnreadable

MAX_FILE_BYTES: Final = 2 << 20
"""As long as what any language of ours may have is: a device tree for Xen."""
MAX_FILES: Final = 4096
"""How many entries of one directory are looked at."""


class NotRegularError(ConfigUnreadable):
    """It is a directory, a FIFO or a device: nothing to read, and nothing to wait for."""


def read_regular(path: Path, *, file: str = "") -> bytes:
    """Return what is in a file, cut off after :data:`MAX_FILE_BYTES` and one more.

    Args:
        path: Where it is.
        file: What messages call it; its path where nothing is said.

    Raises:
        NotRegularError: it is something else than a file.
        ConfigUnreadable: it cannot be read.
    """
    file = file or os.fspath(path)
    try:
        # Looked at before it is opened, as opening a device can have effects, and after, as it may
        # have been replaced in between.
        _must_be_regular(os.stat(path), file)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(fd, "rb") as stream:
            _must_be_regular(os.fstat(fd), file)
            return stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as err:
        # ValueError: the path has a NUL byte.
        why = getattr(err, "strerror", None) or str(err)
        raise ConfigUnreadable(
            f"{file}: it cannot be read: {why}",
            hint="check its name and its permissions",
            file=file,
            rule="unreadable",
        ) from err


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory in order, without hidden ones; none if there is no such."""
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry, _ in zip(entries, range(MAX_FILES), strict=False)]
    except OSError:
        return []
    return sorted(name for name in names if not name.startswith("."))


def _must_be_regular(status: os.stat_result, file: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    what = "it is a directory" if stat.S_ISDIR(status.st_mode) else "it is not a file"
    raise NotRegularError(
        f"{file}: {what}", hint="name a configuration file", file=file, rule="not-a-file"
    )
