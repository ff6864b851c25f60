# SPDX-License-Identifier: LGPL-2.1-or-later
"""Words in which the tests of guests' lives are written."""

from __future__ import annotations

from fakes.world import Daemon, World

from xshmd.model import (
    GuestConfig,
    GuestState,
)


def states(daemon: Daemon) -> dict[str, GuestState]:
    return {guest.name: guest.state for guest in daemon.engine.snapshot().guests}


async def pair(host: World) -> tuple[GuestConfig, GuestConfig]:
    return host.config("a", host.request("r", 3)), host.config("b", host.borrow("r", 3))
