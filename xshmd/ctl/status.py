# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl status``: how the daemon is, in a few lines."""

from __future__ import annotations

import time
from typing import Any

from xshmd.ctl import render
from xshmd.units import human_size
from xshmd.varlink.client import Client


def run(options: Any) -> int:
    """Say how the daemon is."""
    with Client(options.socket) as client:
        reply = client.call("Status")
    if options.json != "off":
        render.print_json(reply, options.json)
        return 0
    status = reply["status"]
    memory, reloaded = status.get("memoryBytes"), status.get("lastReloadAt")
    rows = [
        ("Daemon", f"xshmd {status['version']}, process {status['pid']}, at {options.socket}"),
        ("Running for", _duration(status["uptimeSeconds"])),
        ("Regions", f"{status['regionCount']}, {human_size(status['sharedBytes'])}"),
        ("Guests", str(status["guestCount"])),
        ("Holders", str(status["holderCount"])),
        ("Memory", "not known" if memory is None else human_size(memory)),
        ("Last reload", "none" if reloaded is None else _when(reloaded)),
    ]
    rows += [
        (name.replace("_", " ").capitalize(), str(count))
        for name, count in sorted(status["counters"].items())
    ]
    render.print_fields(rows)
    return 0


def _duration(seconds: int) -> str:
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
