# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl wait``: return once a guest has its regions, for scripts that start what needs them."""

from __future__ import annotations

from typing import Any, Final

from xshmd.ctl import render
from xshmd.varlink.client import Client

_SPARE_S: Final = 10
"""How much longer than the daemon we wait: its reason is better than our timeout."""


def run(options: Any) -> int:
    """Wait for the guest."""
    with Client(options.socket) as client:
        reply = client.call_within(
            options.timeout + _SPARE_S,
            "WaitGuest",
            name=options.guest,
            timeoutSeconds=options.timeout,
        )
    if options.json != "off":
        render.print_json(reply, options.json)
        return 0
    guest = reply["guest"]
    regions = ", ".join(guest["regions"]) or "no regions"
    text = f"{guest['name']}: domain {guest.get('domainId')}, {guest['state']}, with {regions}"
    print(render.printable(text))
    return 0
