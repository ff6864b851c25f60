# SPDX-License-Identifier: LGPL-2.1-or-later
"""xenstored fails in the middle of a change: it is taken back, or found done afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from crash import sampled
from fakes import xenstored as xs
from fakes.machine import Call
from fakes.world import Daemon, World, world
from hot_changes import add, attach, detach, frames, guest, remove, span
from trio.testing import MockClock

from xshmd.errors import StoreTrouble

# -- xenstored fails us ---------------------------------------------------------------------------


async def _changes_with(host: World, daemon: Daemon, arm: Callable[[], None]) -> None:
    """Make and unmake a set of changes with xenstored failing somewhere in it."""
    a = await guest(host, "a", host.request("r", 3))
    late = await guest(host, "late")
    wanted = host.borrow("n", 2, at=64)
    arm()
    for changes, after in (
        ((add("n", 2), attach("a", wanted), attach("late", wanted)), span(wanted)),
        ((detach("a", "n"), remove("n", force=True)), set()),
    ):
        while True:
            try:
                await daemon.engine.apply(changes)
                break
            except StoreTrouble:
                await trio.sleep(20)  # it is undone, or finished
                has = frames(host, late)
                assert has in (set(), span(wanted))
                assert frames(host, a) == span(host.request("r", 3)) | has
                if has == after:
                    break
        assert frames(host, late) == after
        assert host.running(a)
        assert host.running(late)
    await host.tools.end(a)
    await host.tools.end(late)
    await host.check_clean()


@pytest.mark.parametrize("how", ["drop_before", "drop_after", "silent"])
def test_xenstored_fails_at_any_message(how: str) -> None:
    async def one(nth: int) -> int:
        async with world() as host:
            daemon = await host.start()
            seen: list[xs.Request] = []

            def choose(request: xs.Request) -> bool:
                if request.op in (xs.WRITE, xs.RM):
                    seen.append(request)
                    return len(seen) == nth
                return False

            def arm() -> None:
                setattr(host.server.faults, how, choose)

            await _changes_with(host, daemon, arm)
            return len(seen)

    total = trio.run(one, 0, clock=MockClock(autojump_threshold=0))
    assert total > 20
    failed = []
    for nth in sampled(range(1, total + 1)):
        try:
            trio.run(one, nth, clock=MockClock(autojump_threshold=0))
        except Exception as error:
            failed.append((nth, error))
    assert failed == []


@pytest.mark.parametrize("how", ["drop_before", "drop_after"])
async def test_a_commit_that_is_in_doubt_is_taken_back(autojump_clock: MockClock, how: str) -> None:
    """xenstored may have it or not: before anything is undone, it says that there was none."""
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        lost: list[xs.Request] = []

        def choose(request: xs.Request) -> bool:
            is_it = b'"committed":true' in request.payload and not lost
            lost.extend([request] * is_it)
            return is_it

        setattr(host.server.faults, how, choose)
        said: list[bool] = []

        def look(call: Call) -> None:
            if call.kind == "unmap" and lost:
                (intent,) = host.server.nodes["/xshmd/changes"].children
                text = host.server.read(f"/xshmd/changes/{intent}")
                said.append('"committed":false' in (text or ""))

        host.xen.before = look
        with pytest.raises(StoreTrouble):
            await daemon.engine.apply([add("n", 2), attach("a", host.borrow("n", 2, at=64))])
        await host.until(lambda: len(frames(host, a)) == 3, "it to be undone")
        assert said == [True]
        assert host.running(a)


async def test_what_a_guest_puts_where_a_region_was_is_its_own(autojump_clock: MockClock) -> None:
    """Unmapped it is, but xenstored did not get to know: it is not unmapped a second time."""
    async with world() as host:
        daemon = await host.start()
        a = await guest(host, "a", host.request("r", 3))
        await guest(host, "b", host.borrow("r", 3))
        host.xen.set_max_pages(a.domid, 1 << 16)
        unmapped: list[Call] = []
        host.xen.after = lambda call: unmapped.extend([call] * (call.kind == "unmap"))

        def choose(request: xs.Request) -> bool:
            is_it = request.path.startswith("/xshmd/guests/") and len(unmapped) == 1
            unmapped.extend(unmapped * is_it)
            return is_it

        host.server.faults.drop_before = choose
        with pytest.raises(StoreTrouble):
            await daemon.engine.apply([detach("a", "r")])
        gfn = host.request("r").first_gfn
        host.xen.populate(a.domid, gfn, 1)
        await host.until(lambda: not host.server.nodes["/xshmd/changes"].children, "its end")
        assert host.server.read(f"/local/domain/{a.domid}/xshm/r") is None
        assert host.xen.by_domid[a.domid].p2m[gfn].page.owner.domid == a.domid
