# SPDX-License-Identifier: LGPL-2.1-or-later
"""A member of a sealed group that helps itself, or is helped, gets nothing that matters."""

from __future__ import annotations

import dataclasses

import pytest
from fakes.machine import Call
from fakes.objects import GrantEntry
from fakes.world import world
from sealed import SEALED, a_host, make, own, pauses_of, read, watch, write
from trio.testing import MockClock

from xshmd.engine.holders import ANCHOR_GFN
from xshmd.events import EventKind
from xshmd.model import Lifetime, RegionTerms
from xshmd.units import Gfn


async def test_somebody_who_unpauses_is_noticed(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await make(host, "a", own(host, "r"))
        holder, times = host.holders()[0], 1

        def meddle(call: Call) -> None:
            nonlocal times
            if call.kind == "populate" and call.arguments[0] == holder and times:
                times -= 1
                host.xen.unpause(a.domid)
                host.xen.pause(a.domid)

        async with daemon.engine.monitor() as channel:
            host.xen.after = meddle
            b = await make(host, "b", host.borrow("r", 3))
            host.xen.after = lambda call: None
            events = []
            while channel.statistics().current_buffer_used:
                events.append(channel.receive_nowait())
        assert [one.reason for one in events if one.kind is EventKind.HOLDER_SUSPECT] == [
            "guest a ran while pages were in it"
        ]
        # Whatever it could have taken is not what they have now.
        assert len(pauses_of(events)) == 2
        assert host.pages(a.domid, own(host, "r")) == host.pages(b.domid, host.borrow("r"))
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()
        await daemon.kill()


async def test_what_a_member_put_into_the_grant_table_is_gone(autojump_clock: MockClock) -> None:
    async with a_host() as (host, _):
        a = await make(host, "a", own(host, "r"))
        holder = host.xen.by_domid[a.domid].target
        assert holder is not None
        holder.grants[9] = GrantEntry(valid=True, domid=77, gfn=0x40200)

        def look(call: Call) -> None:
            if call.kind == "populate" and call.arguments[0] == holder.domid:
                assert not any(entry.valid for entry in holder.grants.values())

        host.xen.before = look
        b = await make(host, "b", host.borrow("r", 3))
        host.xen.before = lambda call: None
        await host.tools.end(a)
        await host.tools.end(b)


@pytest.mark.parametrize("terms", [SEALED, RegionTerms(lifetime=Lifetime.MEMBERS)], ids=str)
async def test_what_a_member_takes_out_is_told_once(
    terms: RegionTerms, autojump_clock: MockClock
) -> None:
    async with world() as host:
        daemon = await host.start()
        r = dataclasses.replace(host.request("r", 4), terms=terms)
        a = await make(host, "a", r)
        holder = host.holders()[0]
        (region,) = daemon.engine.snapshot().regions
        async with daemon.engine.monitor() as channel:
            host.xen.depopulate(holder, ANCHOR_GFN, 1)
            host.xen.depopulate(holder, Gfn(region.holder_first_gfn + 3), 1)
            for _ in range(2):
                other = await make(host, "other")
                await host.tools.end(other)
            said = []
            while channel.statistics().current_buffer_used:
                event = channel.receive_nowait()
                said += [event.reason] if event.kind is EventKind.HOLDER_SUSPECT else []
        taken = "was taken out of it: whoever has it keeps it"
        if terms is SEALED:
            assert said == [f"its anchor {taken}"]
        else:
            assert said == [f"its anchor {taken}", f"memory of region r {taken}"]
        await host.tools.end(a)
        await host.check_clean()
        await daemon.kill()


async def test_who_takes_the_anchor_of_a_sealed_group_takes_nothing_else(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        watch(host)
        daemon = await host.start()
        r = own(host, "r")
        a = await make(host, "a", r)
        write(host, a, r, b"before")
        host.xen.depopulate(host.holders()[0], ANCHOR_GFN, 1)
        await daemon.kill()
        daemon = await host.start()
        b = await make(host, "b", host.borrow("r", 3))
        assert read(host, b, host.borrow("r")) == b"before"
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()
        await daemon.kill()


async def test_nobody_who_may_map_runs_for_want_of_being_ours(autojump_clock: MockClock) -> None:
    """A guest that was refused after it had its target, kept to be looked at, and let run."""
    async with world() as host:
        daemon = await host.start(destroy_on_failure=False)
        a = await make(host, "a", own(host, "r"))
        host.xen.fail("map_foreign", 12)
        b = await host.tools.create(host.config("b", host.borrow("r", 3)))
        await host.until(lambda: daemon.guest("b") is not None)
        await host.until(lambda: getattr(daemon.guest("b"), "failure", "") != "")
        host.config("b")
        assert host.xen.by_domid[b.domid].target is not None
        while host.xen.by_domid[b.domid].pauses:
            host.xen.unpause(b.domid)
        before = host.pages(a.domid, own(host, "r"))
        late = await host.tools.create(host.config("late", host.borrow("r", 3)))
        await host.until(lambda: "late" in daemon.engine._passage.failures)
        assert "guest b runs" in daemon.engine._passage.failures["late"].message
        assert host.pages(a.domid, own(host, "r")) == before
        host.config("late")
        for made in (b, late, a):
            await host.tools.end(made)
        await host.check_clean()
        await daemon.kill()
