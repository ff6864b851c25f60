# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import contextlib

import pytest
import trio
from fakes import xenstored as xs
from fakes.xenstored import FakeXenstored, everything, only
from store_words import next_paths, no_more
from trio.testing import MockClock, wait_all_tasks_blocked

from xshmd.errors import StoreError, StoreLost
from xshmd.xen import store as store_module
from xshmd.xen.store import MAX_IN_FLIGHT, MAX_PENDING_EVENTS, XenStore

# Watches.


async def test_a_watch(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        assert await next_paths(events, 1) == ["/w"]
        server.write("/w/a/b", "1")
        assert await next_paths(events, 1) == ["/w/a/b"]
        await store.write("/w", "")
        await store.write("/wx", "")
        assert await next_paths(events, 1) == ["/w"]
        server.remove("/w")
        assert await next_paths(events, 1) == ["/w"]
        await no_more(events)


async def test_leaving_a_watch_removes_it(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        assert len(server.connection.watches) == 1
        assert await next_paths(events, 1) == ["/w"]
    assert server.connection.watches == []
    await wait_all_tasks_blocked()
    assert store.connection.nr_tasks == 0
    with pytest.raises(trio.ClosedResourceError):
        await events.receive()
    server.connection.send_event("/w", "xshmd/1")  # a late one
    assert await store.read("/a") is None


async def test_watches_of_one_path_are_apart(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as first:
        async with store.watch("/w") as second:
            assert await next_paths(first, 1) == ["/w"]
            assert await next_paths(second, 1) == ["/w"]
        server.write("/w/a", "")
        assert await next_paths(first, 1) == ["/w/a"]


async def test_special_watches(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("@introduceDomain") as new, store.watch("@releaseDomain") as gone:
        assert await next_paths(new, 1) == ["@introduceDomain"]
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        server.introduce(5)
        assert await next_paths(new, 1) == ["@introduceDomain"]
        server.introduce(5)
        server.shut_down(5)
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        server.release(5)
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        await no_more(new)
        await no_more(gone)


async def test_a_watch_that_is_refused(server: FakeXenstored, store: XenStore) -> None:
    server.faults.refuse = lambda request: "ENOSPC"
    with pytest.raises(StoreError, match="WATCH /w: ENOSPC"):
        async with store.watch("/w"):
            raise AssertionError
    with pytest.raises(StoreError, match="not a xenstore path"):
        async with store.watch("/w/"):
            raise AssertionError


async def test_an_error_in_the_body_of_a_watch(server: FakeXenstored, store: XenStore) -> None:
    with pytest.raises(KeyError):
        async with store.watch("/w"):
            raise KeyError
    assert server.connection.watches == []


async def test_ten_thousand_equal_events_are_one(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events, store.watch("/other") as other:
        assert await next_paths(events, 1) == ["/w"]
        assert await next_paths(other, 1) == ["/other"]
        token = server.connection.watches[0].token
        payload = f"/w/a\0{token}\0".encode()
        event = xs.HEADER.pack(xs.WATCH_EVENT, 0, 0, len(payload)) + payload
        server.connection.send_raw(event * 10_000)
        server.write("/w/b", "")
        server.write("/other", "")
        assert await next_paths(other, 1) == ["/other"]  # nobody waits for a slow reader
        paths: list[str] = []
        while paths[-1:] != ["/w/b"]:
            paths += await next_paths(events, 1)
        assert paths in (["/w/a", "/w/b"], ["/w/a", "/w/a", "/w/b"])
        await no_more(events)


async def test_events_keep_the_order_of_their_first(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        assert await next_paths(events, 1) == ["/w"]
        server.write("/w/0", "")  # this one the pump takes out at once
        await wait_all_tasks_blocked()
        for n in (3, 1, 2, 3, 1, 0):
            server.write(f"/w/{n}", "")
        await wait_all_tasks_blocked()
        assert await next_paths(events, 5) == ["/w/0", "/w/3", "/w/1", "/w/2", "/w/0"]
        await no_more(events)


async def test_too_many_different_events_become_one(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        assert await next_paths(events, 1) == ["/w"]
        count = 10_000
        for n in range(count):
            server.write(f"/w/{n}", "")
        await store.read("/done")  # its answer comes after all events
        seen: list[str] = []
        while not seen or seen[-1] != f"/w/{count - 1}":
            seen += await next_paths(events, 1)
        assert len(seen) <= MAX_PENDING_EVENTS + 1
        assert "/w" in seen  # which speaks for all that are not named
        await no_more(events)


async def test_each_watch_fires_again_after_a_reconnect(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/v") as v, store.watch("@releaseDomain") as gone:
        assert await next_paths(v, 1) == ["/v"]
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        server.stop()
        await wait_all_tasks_blocked()
        server.start(fresh=True)
        assert await next_paths(v, 1) == ["/v"]
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        server.write("/v/a", "")
        assert await next_paths(v, 1) == ["/v/a"]
        await no_more(v)
        await no_more(gone)
    assert server.connection.watches == []


async def test_many_watches_are_set_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    count = 3 * MAX_IN_FLIGHT
    ready = trio.Event()
    nr_ready = 0

    async def watch(n: int) -> None:
        nonlocal nr_ready
        async with store.watch(f"/{n}") as events:
            assert await next_paths(events, 1) == [f"/{n}"]
            nr_ready += 1
            if nr_ready == count:
                ready.set()
            assert await next_paths(events, 1) == [f"/{n}"]

    async with trio.open_nursery() as nursery:
        for n in range(count):
            nursery.start_soon(watch, n)
        await ready.wait()
        server.drop()
    assert server.connection.watches == []


async def test_a_watch_made_while_reconnecting_is_set_once(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/old") as old:
        assert await next_paths(old, 1) == ["/old"]
        server.stop()
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async with store.watch("/new") as new:
                    assert await next_paths(new, 1) == ["/new"]
                    await no_more(new)

            nursery.start_soon(watch)
            await trio.sleep(1)
            server.start()
        assert await next_paths(old, 1) == ["/old"]
    assert server.connection.number == 2


async def test_watches_made_while_disconnected_are_set_once(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.stop()
    await wait_all_tasks_blocked()

    async def watch(n: int) -> None:
        async with store.watch(f"/{n}") as events:
            assert await next_paths(events, 1) == [f"/{n}"]

    async with trio.open_nursery() as nursery:
        for n in range(MAX_IN_FLIGHT):
            nursery.start_soon(watch, n)
        await trio.sleep(1)
        server.start()
    assert len(server.requests(xs.WATCH)) == MAX_IN_FLIGHT


async def test_watches_that_come_and_go_while_others_are_set_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/1") as first:
        assert await next_paths(first, 1) == ["/1"]
        server.stop()
        await wait_all_tasks_blocked()
        server.faults.silent = lambda request: request.strings[:2] == ("/1", "xshmd/1")
        async with contextlib.AsyncExitStack() as stack, trio.open_nursery() as nursery:
            leave = trio.Event()

            async def stay() -> None:
                events = await stack.enter_async_context(store.watch("/2"))
                assert await next_paths(events, 1) == ["/2"]
                leave.set()

            nursery.start_soon(stay)
            await trio.sleep(1)
            server.start()
            await leave.wait()
            server.faults.silent = xs.nothing
            server.answer_held()
            await trio.sleep(1)
        assert await store.read("/x") is None
    assert server.connection.number == 2
    assert [request.path for request in server.requests(xs.WATCH)].count("/2") == 1


async def test_a_watch_left_while_others_are_set_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/1") as first:
        assert await next_paths(first, 1) == ["/1"]
        async with store.watch("/2") as second:
            assert await next_paths(second, 1) == ["/2"]
            server.faults.silent = only(xs.WATCH)
            server.drop()
            await trio.sleep(1)
            assert [r.path for r in server.log if r.connection == 2] == ["/1"]
        server.faults.silent = xs.nothing
        server.answer_held()
        await trio.sleep(1)
        assert [watch.path for watch in server.connection.watches] == ["/1"]


async def test_a_watch_that_is_set_and_lost_at_one_stroke(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.deaf = only(xs.WATCH)

    async def watch() -> None:
        with pytest.raises(StoreLost, match="WATCH /w"):
            async with store.watch("/w"):
                raise AssertionError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await wait_all_tasks_blocked()
        answer = xs.HEADER.pack(xs.WATCH, server.log[0].rq_id, 0, 3) + b"OK\0"
        server.connection.send_raw(answer + xs.HEADER.pack(99, 0, 0, 0))


async def test_a_watch_left_while_disconnected(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    start = trio.current_time()
    async with store.watch("/w"):
        server.stop()
        await wait_all_tasks_blocked()
    assert trio.current_time() == start
    server.start()
    assert await store.read("/a") is None
    assert server.connection.watches == []


async def test_a_watch_whose_connection_is_lost_meanwhile(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.drop_after = only(xs.WATCH)
    with pytest.raises(StoreLost, match="WATCH /w"):
        async with store.watch("/w"):
            raise AssertionError
    server.faults.drop_after = xs.nothing
    assert await store.read("/a") is None
    await wait_all_tasks_blocked()
    assert server.connection.watches == []


async def test_a_watch_that_cannot_be_set_again_is_tried_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/w") as events:
        assert await next_paths(events, 1) == ["/w"]
        server.faults.refuse = lambda request: "ENOMEM" if request.op == xs.WATCH else None
        server.drop()
        await trio.sleep(2)
        assert len(server.requests(xs.WATCH)) > 2
        server.faults.refuse = lambda request: None
        assert await next_paths(events, 1) == ["/w"]


async def test_a_cancelled_watch_leaves_none_behind(server: FakeXenstored, store: XenStore) -> None:
    server.faults.silent = only(xs.WATCH)

    async def watch() -> None:
        async with store.watch("/w"):
            raise AssertionError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await wait_all_tasks_blocked()
        assert len(server.connection.watches) == 1
        nursery.cancel_scope.cancel()
    assert server.connection.watches == []


async def test_leaving_a_watch_is_bounded(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    with trio.CancelScope() as scope:
        async with store.watch("/w"):
            server.faults.deaf = everything
            scope.cancel()
            start = trio.current_time()
            await trio.lowlevel.checkpoint()
    assert trio.current_time() - start == pytest.approx(store_module.CLEANUP_S)


async def test_a_reader_that_closes_its_channel(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        events.close()
        server.write("/w/a", "")
        await wait_all_tasks_blocked()
    assert server.connection.watches == []
