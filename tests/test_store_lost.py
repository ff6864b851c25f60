# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import pytest
import trio
from fakes import xenstored as xs
from fakes.xenstored import FakeXenstored, everything, only
from trio.testing import MockClock, wait_all_tasks_blocked

from xshmd.errors import StoreError, StoreLost, XenUnavailable
from xshmd.ports import StoreTransaction
from xshmd.units import DomId
from xshmd.xen import store as store_module
from xshmd.xen.store import MAX_IN_FLIGHT, XenStore, open_store

# Losing the connection.


async def loses(store: XenStore, path: str) -> None:
    with pytest.raises(StoreLost, match=path) as caught:
        await store.read(path)
    assert caught.value.facts["path"] == path


async def test_all_waiters_hear_of_the_loss_at_once(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.silent = everything
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for n in range(3 * MAX_IN_FLIGHT):  # a third waits for an answer, the rest for a slot
            nursery.start_soon(loses, store, f"/{n}")
        await wait_all_tasks_blocked()
        server.drop()
    assert trio.current_time() == start


@pytest.mark.parametrize("fault", ["drop_before", "drop_after"])
async def test_a_request_that_kills_the_connection(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore, fault: str
) -> None:
    setattr(server.faults, fault, only(xs.WRITE))
    with pytest.raises(StoreLost, match="WRITE /a"):
        await store.write("/a", "1")
    setattr(server.faults, fault, xs.nothing)
    assert await store.read("/a") == (None if fault == "drop_before" else "1")
    assert server.connection.number == 2


@pytest.mark.parametrize(
    "junk",
    [
        b"x",
        xs.HEADER.pack(99, 0, 0, 0),
        xs.HEADER.pack(xs.READ, 1, 0, 5000),
        xs.HEADER.pack(xs.READ, 12345, 0, 0),
        xs.HEADER.pack(xs.WATCH_EVENT, 0, 0, 2) + b"/a",
        xs.HEADER.pack(xs.WRITE, 1, 0, 3) + b"OK\0",
        xs.HEADER.pack(xs.READ, 1, 0, 10) + b"cut",
    ],
    ids=["cut header", "type", "length", "request id", "event", "answer type", "cut payload"],
)
async def test_junk_is_a_lost_connection(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore, junk: bytes
) -> None:
    server.faults.deaf = everything
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loses, store, "/a")
        await wait_all_tasks_blocked()
        server.connection.send_raw(junk)
        await wait_all_tasks_blocked()
        if junk in (b"x", xs.HEADER.pack(xs.READ, 1, 0, 10) + b"cut"):
            server.drop()
    server.faults.deaf = xs.nothing
    assert await store.read("/a") is None


@pytest.mark.parametrize(
    ("op", "answer"), [(xs.IS_DOMAIN_INTRODUCED, b"maybe\0"), (xs.TRANSACTION_START, b"-1\0")]
)
async def test_an_answer_that_makes_no_sense_is_a_lost_connection(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore, op: int, answer: bytes
) -> None:
    async def body(transaction: StoreTransaction) -> None:
        raise AssertionError

    async def call() -> None:
        if op == xs.TRANSACTION_START:
            await store.transact(body)
        else:
            await store.is_introduced(DomId(1))

    async def call_is_lost() -> None:
        with pytest.raises(StoreLost, match="broke the protocol"):
            await call()

    server.faults.deaf = everything
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call_is_lost)
        await wait_all_tasks_blocked()
        rq_id = server.log[0].rq_id
        server.connection.send_raw(xs.HEADER.pack(op, rq_id, 0, len(answer)) + answer)


async def test_a_request_waits_for_the_reconnect(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.write("/a", "1")
    server.stop()
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            assert await store.read("/a") == "1"

        nursery.start_soon(read)
        nursery.start_soon(store.read_many, ["/a", "/b"])
        await trio.sleep(3)
        server.start()


async def test_a_request_waits_no_longer_than_its_deadline(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.stop()
    await wait_all_tasks_blocked()
    start = trio.current_time()
    with pytest.raises(StoreLost, match="not connected"):
        await store.read("/a")
    assert trio.current_time() - start == pytest.approx(5)


async def test_reconnecting_backs_off_and_starts_afresh_once_answered(
    autojump_clock: MockClock,
    server: FakeXenstored,
    store: XenStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[float] = []
    connect = store.connection.connect

    async def noted() -> trio.SocketStream:
        tries.append(trio.current_time())
        return await connect()

    monkeypatch.setattr(store.connection, "connect", noted)

    def waits() -> list[float]:
        return [round(b - a, 3) for a, b in zip([lost, *tries], tries, strict=False)]

    lost = trio.current_time()
    server.stop()
    await trio.sleep(30)
    assert waits()[:8] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    server.start()
    await trio.sleep(5)
    assert await store.read("/a") is None
    tries.clear()
    lost = trio.current_time()
    server.stop()
    await trio.sleep(1)
    assert waits()[:2] == [0.1, 0.2]


async def test_a_server_that_accepts_and_dies_is_not_hammered(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.drop_before = everything
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(60):
            while True:
                nursery.start_soon(loses, store, "/a")
                await trio.sleep(0.5)
        await trio.sleep(5)
    assert server.connection.number < 22 if server.connections else True
    assert len({request.connection for request in server.log}) < 22


async def test_no_server_at_all() -> None:
    with pytest.raises(XenUnavailable, match="/nonexistent/socket: No such file") as caught:
        async with open_store("/nonexistent/socket"):
            raise AssertionError
    assert "xenstored" in caught.value.hint


def test_where_the_socket_is() -> None:
    assert store_module.socket_paths({}) == (
        "/run/xenstored/socket",
        "/var/run/xenstored/socket",
    )
    assert store_module.socket_paths({"XENSTORED_RUNDIR": "/r"}) == ("/r/socket",)
    both = {"XENSTORED_RUNDIR": "/r", "XENSTORED_PATH": "/p"}
    assert store_module.socket_paths(both) == ("/p",)


# The life of the store.


async def test_an_error_in_the_body_comes_out_as_it_is(server: FakeXenstored) -> None:
    with pytest.raises(StoreError, match="EINVAL") as caught:
        async with open_store(str(server.path)) as store:
            await store.remove("/")
    assert type(caught.value) is StoreError


async def test_an_error_in_a_cancelled_body_comes_out_too(server: FakeXenstored) -> None:
    async def fail() -> None:
        async with open_store(str(server.path)):
            scope.cancel()
            raise KeyError

    with trio.CancelScope() as scope, pytest.raises(KeyError):
        await fail()


async def test_cancelling_the_body_is_no_error(server: FakeXenstored) -> None:
    with trio.CancelScope() as scope:
        async with open_store(str(server.path)) as store:
            scope.cancel()
            await store.read("/a")
    assert scope.cancelled_caught


async def test_a_closed_store_is_lost(server: FakeXenstored) -> None:
    server.faults.silent = everything
    async with trio.open_nursery() as nursery, open_store(str(server.path)) as store:
        nursery.start_soon(loses, store, "/pending")
        await wait_all_tasks_blocked()
    with pytest.raises(StoreLost, match="closed"):
        await store.read("/a")
    with pytest.raises(StoreLost, match="closed"):
        async with store.watch("/a"):
            raise AssertionError
    await wait_all_tasks_blocked()
    assert server.connections == []
