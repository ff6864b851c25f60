# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the interface says of the machine and of the daemon itself, rather than of regions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from xshmd import __version__
from xshmd.machine import HostInfo
from xshmd.model import Snapshot
from xshmd.policy.host import Finding, findings
from xshmd.units import PAGE_SIZE
from xshmd.varlink.wire import Parameters

_STATE: Final = (
    "regions", "guests", "holders", "bytes_shared", "uptime_seconds", "last_reload_at",
)  # fmt: skip
"""Of the statistics, those that Status says in fields of its own."""


def status_fields(snapshot: Snapshot, statistics: Mapping[str, int]) -> Parameters:
    """Return how the daemon is as the interface's ``DaemonStatus``."""
    return {
        "version": __version__,
        "pid": os.getpid(),
        "uptimeSeconds": statistics.get("uptime_seconds", 0),
        "regionCount": len(snapshot.regions),
        "guestCount": len(snapshot.guests),
        "holderCount": len(snapshot.holders),
        "sharedBytes": sum(region.size_bytes for region in snapshot.regions),
        "memoryBytes": _resident_bytes(),
        "lastReloadAt": statistics.get("last_reload_at", 0) or None,
        "counters": {name: each for name, each in statistics.items() if name not in _STATE},
    }


def host_fields(host: HostInfo) -> Parameters:
    """Return the host, and what follows from it, as the interface's ``Host``."""
    return {
        "arch": host.arch.value,
        "xenVersion": host.xen_text,
        "xenCommandLine": host.xen_command_line,
        "hvm": host.has_hvm,
        "hap": host.has_hap,
        "freePages": host.free_pages,
        "totalPages": host.total_pages,
        "pageSize": PAGE_SIZE,
        "findings": [_finding_fields(finding) for finding in findings(host)],
    }


def _finding_fields(finding: Finding) -> Parameters:
    return {
        "topic": finding.topic,
        "verdict": finding.verdict.value,
        "text": finding.text,
        "hint": finding.hint or None,
    }


def _resident_bytes() -> int | None:
    """Return how much memory this process takes, if the kernel says (proc(5), statm)."""
    try:
        frames = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return frames * os.sysconf("SC_PAGE_SIZE")
