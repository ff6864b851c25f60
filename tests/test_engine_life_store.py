# SPDX-License-Identifier: LGPL-2.1-or-later
"""xenstored goes away or answers late while guests come and go."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from crash import sampled
from fakes import xenstored as xs
from fakes.world import World, world
from life import pair, states
from trio.testing import MockClock

from xshmd.changes import AddRegion
from xshmd.machine import SHUTDOWN_REBOOT
from xshmd.model import GuestState, RegionConfig
from xshmd.units import DomId

# -- xenstored ------------------------------------------------------------------------------------


async def _share_and_end(host: World) -> None:
    one, other = await pair(host)
    a = await host.tools.create(one)
    await host.until(lambda: host.running(a))
    b = await host.tools.create(other)
    await host.until(lambda: host.running(b))
    assert host.pages(a.domid, one.requests[0]) == host.pages(b.domid, other.requests[0])
    again = await host.tools.reboot(a)
    await host.until(lambda: host.running(again))
    assert host.pages(again.domid, one.requests[0]) == host.pages(b.domid, other.requests[0])
    await host.tools.end(again)
    await host.tools.end(b)


CHANGES = (xs.WRITE, xs.RM, xs.SET_PERMS)


async def _count_requests() -> int:
    async with world() as host:
        await host.start()
        before = len(host.server.log)
        await _share_and_end(host)
        await host.check_clean()
        return len(host.server.log) - before


@pytest.mark.parametrize("how", ["drop_before", "drop_after"])
def test_a_connection_lost_at_any_message(how: str) -> None:
    """Not a guest is lost by it, nor a page or a node."""
    total = trio.run(_count_requests, clock=MockClock(autojump_threshold=0))
    assert total > 30

    async def one(nth: int) -> None:
        async with world() as host:
            await host.start()
            start = len(host.server.log)
            lost: list[xs.Request] = []

            def choose(request: xs.Request) -> bool:
                if len(host.server.log) - start == nth and not lost:
                    lost.append(request)
                    return True
                return False

            setattr(host.server.faults, how, choose)
            await _share_and_end(host)
            await host.check_clean()

    failed = []
    for nth in sampled(range(1, total + 1)):
        try:
            trio.run(one, nth, clock=MockClock(autojump_threshold=0))
        except Exception as error:
            failed.append((nth, error))
    assert failed == []


def test_an_answer_late_at_any_change() -> None:
    """xenstored stands still for longer than the deadline, once, at each message that changes."""

    async def one(nth: int) -> int:
        async with world() as host:
            await host.start()
            seen: list[xs.Request] = []

            def choose(request: xs.Request) -> bool:
                if request.op in CHANGES:
                    seen.append(request)
                return request.op in CHANGES and len(seen) == nth

            host.server.faults.silent = choose
            await _share_and_end(host)
            await host.check_clean()
            return len(seen)

    total = trio.run(one, 0, clock=MockClock(autojump_threshold=0))
    failed = []
    for nth in sampled(range(1, total + 1)):
        try:
            trio.run(one, nth, clock=MockClock(autojump_threshold=0))
        except Exception as error:
            failed.append((nth, error))
    assert failed == []


async def test_a_look_while_the_gate_writes(autojump_clock: MockClock) -> None:
    """What is in memory is in xenstore, though a record was on its way when somebody looked."""
    async with world() as host:
        daemon = await host.start()
        await host.tools.create(host.config("first", host.request("old", at=64)))

        def is_new_record(request: xs.Request) -> bool:
            return request.op == xs.WRITE and request.path.startswith("/xshmd/guests/")

        host.server.faults.silent = is_new_record
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.tools.create, host.config("a", host.request("r")))
            await trio.sleep(0.5)
            assert len(host.server.connection.held) == 1
            host.server.introduce(99)  # something happens elsewhere
            await trio.sleep(0.5)
            host.server.faults.silent = lambda request: False
            host.server.answer_held()
            await host.until(lambda: daemon.guest("a") is not None or daemon.is_attached("a"))
            for guest in daemon.engine.snapshot().guests:
                assert f"/xshmd/guests/{guest.generation}" in host.server.nodes
        assert host.ran_wrongly == []


async def test_nothing_is_mapped_while_xenstored_is_gone(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        host.server.drop()
        await trio.sleep(30)
        assert host.running(a)
        b = await host.tools.create(host.config("b", host.borrow("r")))
        await host.until(lambda: host.running(b))
        assert daemon.is_attached("b")
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()


async def test_a_doomed_guest_is_finished_after_a_restart(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(destroy_on_failure=False)
        made = await host.tools.create(host.config("b", host.borrow("nobodys")))
        await daemon.kill()
        assert host.xen.by_domid[made.domid].pauses == 1
        await host.start()
        await host.until(lambda: made.domid not in host.xen.by_domid, "its destruction")
        host.locks.finished.clear()
        await host.check_clean()


async def test_an_unreadable_record_is_left_and_reported(autojump_clock: MockClock) -> None:
    async with world() as host:
        host.server.write("/xshmd/regions/x", "nonsense")
        host.server.write("/xshmd/guests/y", '{"v":99}')
        host.tree = host.dump()
        daemon = await host.start()
        assert daemon.engine.snapshot().regions == ()
        made = await host.tools.create(host.config("a", host.request("r")))
        assert host.missing(made.domid, made.config) == ""
        await host.tools.end(made)
        await host.check_clean()


async def test_a_preserved_guest_keeps_its_memory(autojump_clock: MockClock) -> None:
    """on_reboot="rename-restart": the old domain stays, shut down, under another name."""
    async with world() as host:
        await host.start()
        config = host.config("a", host.request("r"))
        a = await host.tools.create(config)
        host.tools.shut_down(a, SHUTDOWN_REBOOT)
        host.server.write(f"/local/domain/{a.domid}/name", "a-20260101T0000Z")
        again = await host.tools.create(a.config)
        assert host.pages(again.domid, config.requests[0]) == host.pages(
            DomId(a.domid), config.requests[0]
        )
        old = dataclasses.replace(a, config=dataclasses.replace(a.config, uuid="0" * 8))
        await host.tools.destroy(again)
        await host.tools.destroy(old)
        await host.check_clean()


async def test_a_xenstored_that_has_lost_everything(autojump_clock: MockClock) -> None:
    """Killed and started anew it knows nothing: our records are written again, so the next life of
    the daemon knows its guests, and gives back what they had when they end."""
    async with world() as host:
        daemon = await host.start()
        one, other = await pair(host)
        a = await host.tools.create(one)
        b = await host.tools.create(other)
        await host.until(lambda: host.running(a) and host.running(b))
        before = host.server.below("/xshmd")
        host.server.stop()
        await trio.sleep(60)
        assert host.running(a)
        host.server.start(fresh=True)
        await host.until(lambda: host.server.below("/xshmd") == before)
        assert host.server.permissions("/xshmd") == ("n0",)
        await daemon.kill()
        daemon = await host.start()
        assert states(daemon) == {"a": GuestState.ATTACHED, "b": GuestState.ATTACHED}
        assert host.pages(a.domid, one.requests[0]) == host.pages(b.domid, other.requests[0])
        await host.tools.end(a)
        await host.tools.end(b)
        await host.until(lambda: not daemon.engine.snapshot().regions)


async def test_a_record_that_waited_does_not_hide_the_loss(autojump_clock: MockClock) -> None:
    """A change asked for while xenstored was away is written before anything else is."""
    async with world() as host:
        daemon = await host.start()
        one, _ = await pair(host)
        a = await host.tools.create(one)
        await host.until(lambda: host.running(a))
        host.server.stop()
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            change = AddRegion(config=RegionConfig(region_id="late", nr_frames=1))
            nursery.start_soon(daemon.engine.apply, [change])
            await trio.sleep(1)
            host.server.start(fresh=True)
        await host.until(lambda: "/xshmd/regions/r" in host.server.below("/xshmd"))
        assert "/xshmd/regions/late" in host.server.below("/xshmd")
