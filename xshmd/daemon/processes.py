# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes of the control domain by what the kernel says of them (proc(5)), as pids come again."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from xshmd.model import Process

_STARTTIME: Final = 19
"""Of the fields of ``/proc/<pid>/stat`` that follow the command's closing parenthesis, from 0."""


class ProcProcesses:
    """The real :class:`~xshmd.dom0_ports.Processes`.

    Args:
        proc: The proc file system.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def started_at(self, pid: int) -> int | None:
        stat = self._stat(pid)
        return None if stat is None else int(stat.rpartition(")")[2].split()[_STARTTIME])

    def describe(self, pid: int, uid: int) -> Process:
        """Return what is known of a process; of one that is hidden or gone, its numbers alone."""
        stat = self._stat(pid)
        if stat is None:
            return Process(pid=pid, uid=uid)
        name = stat.partition("(")[2].rpartition(")")[0]
        started = int(stat.rpartition(")")[2].split()[_STARTTIME])
        return Process(pid=pid, uid=uid, started=started, name=name)

    def _stat(self, pid: int) -> str | None:
        if pid <= 0:  # SO_PEERCRED's word for a process of another PID namespace
            return None
        try:
            text = (self._proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        # A zombie has no memory any more, and so nothing mapped.
        return None if text.rpartition(")")[2].split()[0] in ("Z", "X") else text
