# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a sealed group stands still is measured, and what would take too long is given up."""

from __future__ import annotations

import pytest
from fakes.machine import Call
from fakes.toolstack import XlFailed
from sealed import a_host, make, own, pauses_of, read, write
from trio.testing import MockClock

from xshmd.changes import AttachRegion
from xshmd.errors import Refused
from xshmd.host_policy import HostPolicy, Limit, Limits
from xshmd.model import Place

ONE_SECOND = HostPolicy(
    limits=Limits(
        pause=Limit(value=1000, place=Place(file="xshmd.toml", key="limits.pause", line=2))
    )
)


async def test_the_pause_is_measured(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon), daemon.engine.monitor() as channel:
        r = own(host, "r", 4)
        a = await make(host, "a", r)

        def slow(call: Call) -> None:
            if call.kind == "populate":
                autojump_clock.jump(0.25)

        host.xen.before = slow
        b = await make(host, "b", host.borrow("r", 4))
        host.xen.before = lambda call: None
        events = []
        while channel.statistics().current_buffer_used:
            events.append(channel.receive_nowait())
        (pause,) = pauses_of(events)  # the first had nobody to wait for it
        assert pause.size_bytes == 4 * 4096
        assert 250_000 <= pause.pause_us < 400_000
        assert pause.reason == "guest created; 1 guest stood still"
        (region,) = daemon.engine.snapshot().regions
        assert region.pause_us == pause.pause_us
        await host.tools.end(a)
        await host.tools.end(b)


async def test_a_pause_that_would_be_too_long_is_given_up(autojump_clock: MockClock) -> None:
    async with a_host() as (host, daemon):
        host.finder.rules = ONE_SECOND
        r = own(host, "r", 8192 + 7)
        a = await make(host, "a", r)
        write(host, a, r, b"before")
        before = host.pages(a.domid, r)
        b = await make(host, "b")

        def slow(call: Call) -> None:
            if call.kind == "populate":
                autojump_clock.jump(0.6)

        host.xen.before = slow
        with pytest.raises(
            Refused, match=r"2 guests of its group would stand still for about 1.* s"
        ) as caught:
            await daemon.engine.apply([AttachRegion(guest="b", request=host.borrow("r"))])
        assert caught.value.hint.endswith("raise xshmd.toml:2: limits.pause")
        assert daemon.engine.statistics()["refusals_too-long-a-pause"] == 1
        host.xen.before = lambda call: None
        assert host.pages(a.domid, r) == before
        assert read(host, a, r) == b"before"
        assert host.running(a)
        assert host.running(b)
        assert host.xen.foreign_frames(b.domid) == {}
        assert len(host.keeper.kept()) == 1
        await host.tools.end(a)
        await host.tools.end(b)


async def test_what_was_slow_once_is_refused_at_once(autojump_clock: MockClock) -> None:
    async with a_host() as (host, _):
        host.finder.rules = ONE_SECOND

        def slow(call: Call) -> None:
            if call.kind == "populate":
                autojump_clock.jump(0.5)

        host.xen.before = slow
        a = await make(host, "a", own(host, "r", 4))
        counted = host.xen.counts["pause"]
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("b", own(host, "s", 16), host.borrow("r", at=32)))
        assert host.xen.counts["pause"] <= counted + 1  # the gate's own
        host.config("b")
        await host.tools.end(a)


async def test_a_guest_that_is_paused_by_others_stays_so(autojump_clock: MockClock) -> None:
    async with a_host() as (host, _):
        a = await make(host, "a", own(host, "r"))
        for _ in range(2):
            host.xen.pause(a.domid)
        b = await make(host, "b", host.borrow("r", 3))
        assert host.xen.by_domid[a.domid].pauses == 2
        for _ in range(2):
            host.xen.unpause(a.domid)
        await host.tools.end(a)
        await host.tools.end(b)
