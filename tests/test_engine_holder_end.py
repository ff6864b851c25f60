# SPDX-License-Identifier: LGPL-2.1-or-later
"""A holder that an admin destroys is found out soon, though xenstored announces no such end."""

from __future__ import annotations

import pytest
import trio
from fakes.world import world
from trio.testing import MockClock


@pytest.mark.parametrize("late_s", [0.0, 5.0], ids=["at once", "on a busy machine"])
async def test_an_end_is_noticed_without_another_event(
    autojump_clock: MockClock, late_s: float
) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        # As xl does it: first the nodes, and after a while the domain.
        host.server.remove(f"/local/domain/{holder}")
        await trio.sleep(late_s)
        assert daemon.engine.snapshot().holders
        host.xen.destroy(holder)
        await host.until(lambda: daemon.engine.snapshot().holders == ())
        assert host.running(a)
        await host.tools.end(a)
        await host.check_clean()
