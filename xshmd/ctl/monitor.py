# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl monitor``: what there is, and then what happens, a line each, until the daemon ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from xshmd.ctl import render
from xshmd.units import human_size
from xshmd.varlink.client import Client


def run(options: Any) -> int:
    """Print what happens as it happens."""
    with Client(options.socket) as client:
        for reply in client.stream("Monitor", timeoutSeconds=options.timeout):
            if not reply:
                break
            if options.json != "off":
                render.print_json(reply, options.json)
            else:
                now = time.strftime("%H:%M:%S")
                for line in _lines(reply):
                    print(render.printable(f"{now}  {line}"))
            render.flush()
    return 0


def _lines(reply: dict[str, Any]) -> Iterator[str]:
    event, state = reply.get("event"), reply.get("state")
    if event:
        yield f"{event['kind'].replace('_', '-'):<16}  {_event(event)}"
    if state:
        if reply.get("resync"):
            yield f"{'resync':<16}  events were missed; this is how it is now"
        for region in state["regions"]:
            members = len(region["members"])
            yield (
                f"{'region':<16}  {region['id']}: {human_size(region['sizeBytes'])}, "
                f"{members} member{'' if members == 1 else 's'}"
            )
        for guest in state["guests"]:
            regions = ", ".join(guest["regions"]) or "no regions"
            yield f"{'guest':<16}  {guest['name']}: {guest['state']}, {regions}"


def _event(event: dict[str, Any]) -> str:
    parts = []
    if region := event.get("region"):
        parts.append(f"region {region}")
    if guest := event.get("guest"):
        domid = event.get("domainId")
        parts.append(f"guest {guest}" if domid is None else f"guest {guest} (domain {domid})")
    if not parts and (holder := event.get("holderUuid")):
        parts.append(f"holder {holder}")
    entry = event.get("entry") or {}
    if (first_gfn := entry.get("firstFrame")) is not None:
        parts.append(f"at {render.address(first_gfn)}")
    if size_bytes := event.get("sizeBytes"):
        parts.append(human_size(size_bytes))
    if lease := event.get("lease"):
        parts.append(f"process {lease['processId']} of dom0, {lease['prot']}")
    text = ", ".join(parts)
    reason = event.get("reason")
    return f"{text}: {reason}" if text and reason else text or reason or ""
